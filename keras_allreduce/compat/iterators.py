"""Private names of distributed iterators.

`tf.distribute.DistributedIterator` is public, but not how to make one that
Keras and `tf.function` take.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

# What `iter` of a distributed data set returns. Keras looks for this class,
# and a function takes only values with a spec of the second.
from tensorflow.python.distribute.input_lib import (
    DistributedIterator as _DistributedIterator,
)
from tensorflow.python.distribute.input_lib import (
    DistributedIteratorSpec as _DistributedIteratorSpec,
)


class RoundRobin:
    """The replicas of one worker read one plain iterator, each in its turn.

    Stands in the place of an iterator per device, with its methods.

    Args:
        iterator: A `tf.data.Iterator` over the parts of the replicas, the
            first part of each batch for the first replica.
        devices: Devices of the replicas.
    """

    def __init__(self, iterator: tf.data.Iterator, devices: Sequence[str]):
        self.iterator = iterator
        self._devices = devices

    def __eq__(self, other: object) -> bool:
        """Whether both read the same iterator: a spec makes others of it."""
        return (
            isinstance(other, RoundRobin)
            and self.iterator is other.iterator
            and tuple(self._devices) == tuple(other._devices)
        )

    def __hash__(self) -> int:
        return id(self.iterator)

    def get_next_as_list(self, name: str | None = None) -> list[Any]:
        """The next part for each replica, on its device.

        Raises:
            tf.errors.OutOfRangeError: If there is none for a replica.
        """
        # TensorFlow counts how often one iterator is read in a graph, and
        # takes a high number for a mistake.
        reader = tf.data.IteratorSpec(
            self.iterator.element_spec
        )._from_components((self.iterator._iterator_resource,))
        return [_on(device, reader.get_next) for device in self._devices]

    def get_next_as_optional_list(self) -> list[Any]:
        """The next part for each replica, empty at the end of the data."""
        return [_next_part(self.iterator, device) for device in self._devices]


class _Optional:
    """A value, or none, with the interface of a `tf.Optional`.

    One of TensorFlow cannot hold None, which a batch may have in the place of
    targets or weights.

    Args:
        element_spec: Spec of the value.
        has_value: Returns whether there is one.
        get_value: Returns it.
    """

    def __init__(
        self,
        element_spec: Any,
        has_value: Callable[[], tf.Tensor],
        get_value: Callable[[], Any],
    ):
        self.element_spec = element_spec
        self.has_value = has_value
        self.get_value = get_value


def _next_part(iterator: tf.data.Iterator, device: str) -> _Optional:
    """The next part of a replica, if there is one, on its device."""
    part = iterator.get_next_as_optional()
    get_value = functools.partial(_on, device, part.get_value)
    return _Optional(part.element_spec, part.has_value, get_value)


def _next_batch(iterator: _DistributedIterator) -> _Optional:
    """The next batch, if there is one."""
    batches = list(itertools.islice(iterator, 1))
    return _Optional(
        iterator.element_spec,
        lambda: tf.constant(bool(batches)),
        lambda: batches[0],
    )


def _has_none(spec: Any) -> bool:
    """Whether a part of a batch is None, which has no tensors."""
    parts = tf.nest.flatten(spec)
    return not all(tf.nest.flatten(part, True) for part in parts)


def _on(device: str, read: Callable[[], Any]) -> Any:
    """What `read` returns where it is, on `device`."""
    with tf.device(None):
        value = read()
    with tf.device(device):
        return tf.nest.map_structure(
            # A batch may have None in the place of targets or weights.
            lambda part: None if part is None else tf.identity(part),
            value,
            expand_composites=True,
        )


class _Steps(threading.local):
    known = False


_steps = _Steps()


def every_worker_knows_its_steps() -> bool:
    """Whether this thread reads data that ends in one step on all workers.

    No worker then has to ask the others whether one of them has data left.
    """
    return _steps.known


# In the collections of a graph that reads a batch, and of the graphs of the
# functions that are called after it.
_READ = "keras_allreduce_read"


def batches_are_read_in_graph() -> bool:
    """Whether the function that is traced here reads its batches itself.

    Then their traced shapes hold for all of them, on all workers. A function
    that is called with a batch is traced with the shapes of that one.
    """
    return not tf.executing_eagerly() and bool(
        tf.compat.v1.get_collection(_READ)
    )


def _note_read() -> None:
    if not tf.executing_eagerly():
        tf.compat.v1.add_to_collection(_READ, True)


@contextlib.contextmanager
def _known(steps_are_known: bool) -> Iterator[None]:
    before, _steps.known = _steps.known, steps_are_known
    try:
        yield
    finally:
        _steps.known = before


class _InputIterator(_DistributedIterator):
    """A distributed iterator whose spec says how it is read.

    TensorFlow keeps one trace of a function for all iterators of one spec.
    """

    _spec_class: type["_Spec"]

    def get_next(self, name: str | None = None) -> Any:
        """See `tf.distribute.DistributedIterator`."""
        _note_read()
        with _known(self._spec_class.steps_are_known):
            return super().get_next(name)

    def get_next_as_optional(self) -> Any:
        """See `tf.distribute.DistributedIterator`."""
        _note_read()
        if tf.executing_eagerly() and _has_none(self.element_spec):
            return _next_batch(self)
        with _known(self._spec_class.steps_are_known):
            return super().get_next_as_optional()

    @property
    def _type_spec(self) -> Any:
        spec = super()._type_spec
        spec.__class__ = self._spec_class
        return spec


class LazyIterator(_InputIterator):
    """A distributed iterator whose iterators are made when they are needed.

    Args:
        dataset: The distributed data set, whose options it takes.
        iterators: Returns the iterators, one per worker device.
        in_turn: Whether they are `RoundRobin`.
        steps_are_known: Whether the data ends in one step on all workers.
    """

    def __init__(
        self,
        dataset: Any,
        iterators: Callable[[], list[Any]],
        in_turn: bool,
        steps_are_known: bool,
    ):
        self._spec_class = _SPECS[in_turn, steps_are_known]
        self._get_iterators = iterators
        # Set one by one: which of them are arguments differs by version.
        for name in (
            "_input_workers",
            "_strategy",
            "_cardinality",
            "_enable_get_next_as_optional",
            "_options",
            "_replica_order",
            "_element_spec",
        ):
            setattr(self, name, getattr(dataset, name, None))

    @property
    def _iterators(self) -> list[Any]:
        return self._get_iterators()


class _Spec(_DistributedIteratorSpec):
    """The spec of a `LazyIterator`."""

    in_turn: bool
    steps_are_known: bool

    @property
    def value_type(self) -> Any:
        """The class of values with this spec."""
        return _InputIterator

    @property
    def _component_specs(self) -> Any:
        specs = super()._component_specs
        if self.in_turn:
            return [tf.data.IteratorSpec(spec._element_spec) for spec in specs]
        return specs

    def _to_components(self, value: Any) -> Any:
        iterators = value._iterators
        return (
            [each.iterator for each in iterators] if self.in_turn else iterators
        )

    def _from_components(self, components: Any) -> Any:
        if self.in_turn:
            workers = self._input_workers
            components = [
                RoundRobin(each, workers.compute_devices_for_worker(index))
                for index, each in enumerate(components)
            ]
        iterator = super()._from_components(components)
        iterator.__class__ = _InputIterator
        iterator._spec_class = type(self)
        return iterator


# TensorFlow keeps one trace for each class of specs.
_SPECS: dict[tuple[bool, bool], type[_Spec]] = {
    (in_turn, known): type(
        f"_Spec_{in_turn}_{known}",
        (_Spec,),
        {"in_turn": in_turn, "steps_are_known": known},
    )
    for in_turn in (False, True)
    for known in (False, True)
}
