"""Private names of distributed iterators.

`tf.distribute.DistributedIterator` is public, but not how to make one that
Keras and `tf.function` take.
"""

import contextlib
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


class InTurn:
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
            isinstance(other, InTurn)
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
        return [
            _OptionalPart(self.iterator.get_next_as_optional(), device)
            for device in self._devices
        ]


class _OptionalPart:
    """A part of a replica, or none, with the interface of a `tf.Optional`."""

    def __init__(self, optional: tf.experimental.Optional, device: str):
        self._optional = optional
        self._device = device
        self.element_spec = optional.element_spec

    def has_value(self) -> tf.Tensor:
        return self._optional.has_value()

    def get_value(self) -> Any:
        return _on(self._device, self._optional.get_value)


class _OptionalBatch:
    """The next batch, or none, with the interface of a `tf.Optional`.

    An optional of TensorFlow cannot hold None, which a batch may have in the
    place of targets or weights.
    """

    def __init__(self, iterator: _DistributedIterator):
        self.element_spec = iterator.element_spec
        self._batches = list(itertools.islice(iterator, 1))

    def has_value(self) -> tf.Tensor:
        return tf.constant(bool(self._batches))

    def get_value(self) -> Any:
        return self._batches[0]


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
            return _OptionalBatch(self)
        with _known(self._spec_class.steps_are_known):
            return super().get_next_as_optional()

    @property
    def _type_spec(self) -> Any:
        spec = super()._type_spec
        spec.__class__ = self._spec_class
        return spec


class LateIterator(_InputIterator):
    """A distributed iterator whose iterators are made when they are needed.

    Args:
        dataset: The distributed data set, whose options it takes.
        iterators: Returns the iterators, one per worker device.
        in_turn: Whether they are `InTurn`.
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


class _IteratorInGraph(_InputIterator):
    """The argument of a function for a `LateIterator`."""


class _Spec(_DistributedIteratorSpec):
    """The spec of a `LateIterator`."""

    in_turn = False
    steps_are_known = False

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
                InTurn(each, workers.compute_devices_for_worker(index))
                for index, each in enumerate(components)
            ]
        iterator = super()._from_components(components)
        iterator.__class__ = _IteratorInGraph
        iterator._spec_class = type(self)
        return iterator


class _InTurnSpec(_Spec):
    in_turn = True


class _KnownStepsSpec(_Spec):
    steps_are_known = True


class _InTurnKnownStepsSpec(_InTurnSpec, _KnownStepsSpec):
    pass


_SPECS: dict[tuple[bool, bool], type[_Spec]] = {
    (False, False): _Spec,
    (True, False): _InTurnSpec,
    (False, True): _KnownStepsSpec,
    (True, True): _InTurnKnownStepsSpec,
}
