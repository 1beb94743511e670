"""Private names of distributed data sets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

# The full name of a device, and the host that it is on.
from tensorflow.python.distribute import device_util as _device_util

# The distributed form of a data set: only a subclass can make other
# iterators, and Keras looks for these classes. What `InputOptions` mean for the
# iterators, and TensorFlow's own for one worker.
from tensorflow.python.distribute.input_lib import (
    DistributedDataset as DistributedDataset,
)
from tensorflow.python.distribute.input_lib import (
    DistributedDatasetsFromFunction as DistributedDatasetsFromFunction,
)
from tensorflow.python.distribute.input_lib import (
    _should_use_multi_device_iterator,
    _SingleWorkerOwnedDatasetIterator,
)


def _with_inputs(dataset: Any) -> Iterator[Any]:
    """A `tf.data.Dataset`, and then all that it is made of.

    There is no public way to look at the inputs of a data set.
    """
    yield dataset
    for source in dataset._inputs():
        yield from _with_inputs(source)


def yields_arrays_of_python(dataset: Any) -> bool:
    """Whether the elements of a `tf.data.Dataset` come from Python code."""
    return any(
        op.type in _OPS_THAT_RUN_PYTHON
        for each in _with_inputs(dataset)
        for wrapper in each._functions()
        for op in wrapper.function.graph.get_operations()
    )


_OPS_THAT_RUN_PYTHON = frozenset(
    {"GeneratorDataset", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
)


def is_deterministic(dataset: Any) -> bool:
    """Whether a data set is told to keep the order of its elements."""
    return dataset.options().deterministic is not False


def seeds_of_shuffles(dataset: Any) -> list[tuple[int, int]]:
    """Both seeds of each `shuffle` of a data set; (0, 0): a random one."""
    return [
        (int(each._seed), int(each._seed2))
        for each in _with_inputs(dataset)
        if hasattr(each, "_seed2")
    ]


def shards_of(dataset: Any) -> list[tuple[int, int]]:
    """`num_shards` and `index` of each `shard` of a data set.

    None if the data set is not divided again over the workers. TensorFlow
    divides it again wherever `shard` is, by files too.
    """
    if _shard_policy(dataset) in (_POLICIES.OFF, _POLICIES.HINT):
        return []
    return [
        (int(each._num_shards), int(each._index))
        for each in _with_inputs(dataset)
        if type(each).__name__ == "_ShardDataset"
        and hasattr(each._num_shards, "numpy")
        and hasattr(each._index, "numpy")
    ]


_POLICIES = tf.data.experimental.AutoShardPolicy


def _shard_policy(dataset: Any) -> tf.data.experimental.AutoShardPolicy:
    return dataset.options().experimental_distribute.auto_shard_policy


def batch_sizes(dataset: Any) -> list[int]:
    """Sizes of the batches that a data set makes, the outermost first."""
    sizes = (
        getattr(each, "_batch_size", None) for each in _with_inputs(dataset)
    )
    return [
        int(size)
        for size in sizes
        if isinstance(size, tf.Tensor) and hasattr(size, "numpy")
    ]


def draws_seeds(dataset: Any) -> bool:
    """Whether making an iterator of a `tf.data.Dataset` draws a seed.

    A data set within another, as of `flat_map`, draws its own when it is read.
    """
    return any(
        word in type(each).__name__
        for each in _with_inputs(dataset)
        for word in ("Shuffle", "Random")
    )


def is_read_whole(dataset: Any) -> bool:
    """Whether every worker reads a `tf.data.Dataset` whole, and keeps a part.

    Not if it may be divided by files, or not at all.
    """
    policy = _shard_policy(dataset)
    return policy == _POLICIES.DATA or (
        policy == _POLICIES.AUTO and not _may_read_files(dataset)
    )


def ends_in_batch(dataset: Any) -> bool:
    """Whether a data set yields batches as one of its `batch`es made them.

    All parts of such a batch have one length.
    """
    name = _name(dataset)
    if name in _BATCHES:
        return True
    sources = dataset._inputs()
    return name in _LEAVE_BATCHES and all(map(ends_in_batch, sources))


_BATCHES = {"Batch", "PaddedBatch", "ParallelBatch"}
_LEAVE_BATCHES = {
    *("Cache", "Concatenate", "Filter", "Options", "Prefetch", "Repeat"),
    *("Shard", "Shuffle", "Skip", "Take"),
}


def ends_in_one_step(dataset: Any, batches: int | None) -> bool:
    """Whether a data set ends in the same step on all workers.

    That is so if TensorFlow splits each of its batches into a part for each
    replica of each worker, and it has a number of batches. Where the parts
    come from files of their own, workers may have more or less.
    """
    if not is_read_whole(dataset) or batches is None:
        return False
    return int(dataset.cardinality()) >= 0 or not yields_arrays_of_python(
        dataset
    )


def _may_read_files(dataset: Any) -> bool:
    return any(
        _name(each) not in _READ_NO_FILES for each in _with_inputs(dataset)
    )


def _name(dataset: Any) -> str:
    """The kind of a data set, such as "Batch"."""
    return type(dataset).__name__.lstrip("_").removesuffix("Dataset")


# Transformations without data sets of their own, and sources that are tensors.
_READ_NO_FILES = {
    *("Batch", "Cache", "Concatenate", "Filter", "Map", "Options"),
    *("PaddedBatch", "ParallelBatch", "ParallelMap", "Prefetch", "Range"),
    *("Repeat", "Shuffle", "Skip", "Take", "Tensor", "TensorSlice", "Zip"),
}


@dataclass(frozen=True)
class Source:
    """The data of one worker of a distributed data set.

    Attributes:
        dataset: A `tf.data.Dataset` of parts: one per replica of this worker,
            the first for the first replica.
        worker: Device on which it is read.
        devices: Devices of the replicas.
        options: The `tf.distribute.InputOptions`, or `None`.
    """

    dataset: Any
    worker: str
    devices: tuple[str, ...]
    options: Any

    @property
    def host(self) -> str:
        """Host device of the worker."""
        return str(
            _device_util.get_host_for_device(
                _device_util.canonicalize(self.worker, _device_util.current())
            )
        )

    @property
    def prefetches(self) -> bool:
        """Whether parts are to be prefetched to the devices."""
        return bool(_should_use_multi_device_iterator(self.options))

    @property
    def buffer_size(self) -> int:
        """Parts per replica that wait in each buffer."""
        if self.options is None:
            return 1
        return int(self.options.experimental_per_replica_buffer_size)

    def make_iterator(self) -> Any:
        """Makes TensorFlow's own iterator."""
        with tf.device(self.worker):
            return _SingleWorkerOwnedDatasetIterator(
                dataset=self.dataset,
                worker=self.worker,
                devices=self.devices,
                options=self.options,
                canonicalize_devices=True,
            )


def sources(dataset: Any) -> list[Source]:
    """The data of each worker of a distributed data set."""
    if isinstance(dataset, DistributedDataset):
        parts = dataset._cloned_datasets
    else:
        parts = dataset._datasets
    workers = dataset._input_workers
    return [
        Source(
            part,
            worker,
            tuple(workers.compute_devices_for_worker(index)),
            dataset._options,
        )
        for index, (part, worker) in enumerate(
            zip(parts, workers.worker_devices, strict=True)
        )
    ]


def example(element_spec: Any, batch_size: int) -> Any:
    """A batch of zeros like `element_spec`, `None` if that is too vague.

    Args:
        element_spec: Spec of the batches of a distributed data set.
        batch_size: Size of the batch, where the spec does not say it.
    """
    values: list[Any] = []
    for spec in tf.nest.flatten(element_spec):
        value_specs = getattr(spec, "_value_specs", (spec,))
        part = value_specs[0]
        if part == tf.type_spec_from_value(None):
            values.append(None)
            continue
        if not isinstance(part, tf.TensorSpec) or not part.shape.rank:
            return None
        inner = part.shape[1:]
        if not inner.is_fully_defined():
            return None
        values.append(
            tf.zeros([part.shape[0] or batch_size, *inner], part.dtype)
        )
    return tf.nest.pack_sequence_as(element_spec, values)
