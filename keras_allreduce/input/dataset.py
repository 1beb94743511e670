"""Distributed data sets whose iterators are quick to make and to free.

    iter(dataset)          nothing is made yet; Keras reads every other one
    first read             the iterators of the workers are made
    iterator collected     a thread of its own frees them

Making an iterator can draw the seed of a shuffle. Seeds are drawn in the order
of the calls of `iter`, as by TensorFlow's own, also for iterators that nobody
reads.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf
from absl import logging

from keras_allreduce.compat import datasets, iterators, multi_device
from keras_allreduce.compat.multi_device import DeviceFunctions, Source
from keras_allreduce.devices import on_gpus
from keras_allreduce.input.release import RELEASER, Handles

# Specs of a program: those of `fit`, `evaluate` and `predict` of some models.
_MAX_SPECS = 32
_functions: dict[tuple[tuple[str, ...], str, str], DeviceFunctions] = {}

_warned = False


def own(dataset: Any) -> Any:
    """Turns a distributed data set into one of this package's, in place.

    Where it is not as this package knows it, it stays TensorFlow's, with a
    warning.

    Args:
        dataset: What `experimental_distribute_dataset` or
            `distribute_datasets_from_function` of TensorFlow returns.
    """
    stock_class = type(dataset)
    if stock_class not in _OWN_CLASSES:
        return dataset
    try:
        iteration = Iteration(dataset)
        dataset.__class__ = _OWN_CLASSES[stock_class]
        dataset.iteration = iteration
    except (AttributeError, TypeError, ValueError) as error:
        _warn(error)
    return dataset


def split(
    dataset: Any,
    extended: tf.distribute.StrategyExtended,
    options: Any,
    stock: Callable[[Any, Any], Any],
) -> Any:
    """Distributes a data set over the replicas of one process.

    Args:
        dataset: A `tf.data.Dataset`.
        extended: The `extended` of the strategy.
        options: The `tf.distribute.InputOptions`, or `None`.
        stock: Distributes a data set as TensorFlow does, which has to do
            where the private part of TensorFlow is not as it is known.
    """
    if options is not None or not tf.executing_eagerly():
        return stock(dataset, options)
    try:
        return datasets.split(dataset, extended)
    except (AttributeError, TypeError) as error:
        _warn(error)
        return stock(dataset, options)


def know_steps(dataset: Any) -> None:
    """Workers need not ask each other whether any has data left.

    Args:
        dataset: A distributed data set that ends in the same step on all.
    """
    iteration = getattr(dataset, "iteration", None)
    if iteration is not None:
        iteration.steps_are_known = True


def _warn(error: Exception) -> None:
    global _warned
    if not _warned:
        logging.warning(
            "Distributed data sets are read by TensorFlow's own iterators, "
            "which take long to make and to free: those of TensorFlow %s are "
            "not as keras_allreduce knows them (%s: %s).",
            tf.__version__,
            type(error).__name__,
            error,
        )
    _warned = True


class Iteration:
    """Makes the iterators of one distributed data set.

    Args:
        dataset: The data set.

    Attributes:
        steps_are_known: Whether the data is known to end in the same step on
            all workers.

    Raises:
        AttributeError, TypeError, ValueError: If TensorFlow's are not as they
            are known.
    """

    def __init__(self, dataset: Any):
        sources = multi_device.sources(dataset)
        self._dataset = weakref.ref(dataset)
        self._lock = threading.RLock()
        # Iterators that are not made yet, in the order of the calls.
        self._late: list[Callable[[], Handles | None]] = []
        self._draws_seeds = any(
            datasets.draws_seeds(source.dataset) for source in sources
        )
        self._reads_python = any(
            datasets.yields_arrays_of_python(source.dataset)
            for source in sources
        )
        self._in_turn = all(
            source.prefetches and not on_gpus(source.devices)
            for source in sources
        )
        self._makers = [_maker(source, self._in_turn) for source in sources]
        self.steps_are_known = False
        # One that is not made, to see whether it can be.
        self._iterator_of(Handles(list, self._lock))

    def start(self) -> Any:
        """Returns an iterator, which is made when it is first read."""
        handles = Handles(self._make, self._lock)
        self._queue_up(weakref.ref(handles))
        iterator = self._iterator_of(handles)
        RELEASER.when_collected(iterator, handles)
        return iterator

    def first_batch(self, *, shapes_only: bool) -> Any:
        """A first batch, which is not missing from the data afterwards.

        Args:
            shapes_only: Whether it is used for nothing but its shapes.

        Returns:
            A distributed batch; an example of zeros if the shapes are all
            that is needed, or if the data cannot be read twice; `()` if there
            is neither data nor an example.
        """
        spec = getattr(self._dataset(), "element_spec", None)
        found = None
        if shapes_only or self._reads_python:
            found = datasets.example(spec, 1 if shapes_only else 2)
        if found is not None:
            self._queue_up(lambda: None)
        else:
            found = next(self.start(), None)
        if found is None:
            found = datasets.example(spec, 1)
        return () if found is None else found

    def _iterator_of(self, handles: Handles) -> Any:
        return iterators.LazyIterator(
            self._dataset(),
            partial(self._made, handles),
            self._in_turn,
            self.steps_are_known,
        )

    def _queue_up(self, handles: Callable[[], Handles | None]) -> None:
        if self._draws_seeds:
            with self._lock:
                self._late.append(handles)

    def _made(self, handles: Handles) -> list[Any]:
        if not handles.are_made:
            with self._lock:
                self._draw_earlier_seeds(handles)
        return handles.get()

    def _draw_earlier_seeds(self, handles: Handles) -> None:
        while self._late:
            earlier = self._late.pop(0)()
            if earlier is handles:
                return
            if earlier is None or not earlier.make():
                self._make()

    def _make(self) -> list[Any]:
        # Also from within a function that is being traced.
        with tf.init_scope():
            return [make() for make in self._makers]


def _maker(source: Source, one_by_one: bool) -> Callable[[], Any]:
    """Makes the iterator of one worker."""
    if not source.prefetches:
        return source.make_iterator
    size = source.buffer_size
    dataset = source.dataset.with_options(
        _read_by_devices(len(source.devices), size)
    )
    if not one_by_one:
        return partial(_prefetched_to_devices, dataset, source)
    if size > 0:
        # As far ahead as TensorFlow reads: it has a buffer on the host and
        # one on the devices.
        dataset = dataset.prefetch(2 * size * len(source.devices))
    return partial(_read_in_turn, dataset, source)


def _read_in_turn(dataset: Any, source: Source) -> iterators.RoundRobin:
    """Logical CPU devices read one iterator in turn.

    TensorFlow hands the parts to an iterator per device, each with threads
    that copy them there; on the host there is nothing to copy.

        parts of the batches     0  1  2  0  1  2 ...
        read by replica          0  1  2  0  1  2 ...

    A graph runs the reads of one iterator in program order.
    """
    with tf.device(source.worker):
        return iterators.RoundRobin(iter(dataset), source.devices)


def _prefetched_to_devices(dataset: Any, source: Source) -> Any:
    """GPUs: parts are prefetched to each, by functions that are traced once.

    The functions of one spec serve all data sets of that spec.
    """
    key = tuple(source.devices), source.host, repr(dataset.element_spec)
    functions = _functions.get(key)
    if functions is None:
        while len(_functions) >= _MAX_SPECS:
            _functions.pop(next(iter(_functions)))
        functions = DeviceFunctions(source.devices, source.host, dataset)
        _functions[key] = functions
    return functions.make(dataset, source)


def _read_by_devices(num_devices: int, buffer_size: int) -> tf.data.Options:
    """The options that TensorFlow sets for a data set that devices read."""
    options = tf.data.Options()
    options.experimental_distribute.num_devices = num_devices
    if buffer_size == 0:
        options.experimental_optimization.inject_prefetch = False
    return options


class _OwnDataset(datasets.SplitDataset):
    """Of `experimental_distribute_dataset`."""

    iteration: Iteration

    def __iter__(self) -> Any:
        # In a graph TensorFlow's iterator is traced with the function.
        if tf.executing_eagerly():
            return self.iteration.start()
        return super().__iter__()


class _OwnDatasetsFromFunction(datasets.DistributedDatasetsFromFunction):
    """Of `distribute_datasets_from_function`."""

    iteration: Iteration

    def __iter__(self) -> Any:
        # In a graph TensorFlow's iterator is traced with the function.
        if tf.executing_eagerly():
            return self.iteration.start()
        return super().__iter__()


_OWN_CLASSES = {
    datasets.DistributedDataset: _OwnDataset,
    datasets.SplitDataset: _OwnDataset,
    datasets.DistributedDatasetsFromFunction: _OwnDatasetsFromFunction,
}
