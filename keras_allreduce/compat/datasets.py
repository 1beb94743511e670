"""Private names of distributed data sets."""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

# What TensorFlow splits the batches of a data set with, whatever its elements;
# and the base of data sets that are made of one other.
from tensorflow.python.data.experimental.ops.distribute import (
    _LegacyRebatchDataset,
)
from tensorflow.python.data.ops.dataset_ops import UnaryDataset

# The full name of a device, and the host that it is on.
from tensorflow.python.distribute import device_util as _device_util

# What a strategy hands out for a data set: only a subclass can make other
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


class SplitDataset(DistributedDataset):
    """A data set of one process, whose batches are split, and not sharded.

    To shard it over one worker, TensorFlow writes its graph and reads it again:
    10 ms per data set, of whose result only the split is left. A last batch
    from files is split evenly here, as all others are.
    """

    def _create_cloned_datasets_from_dataset(
        self,
        dataset: Any,
        input_context: Any,
        input_workers: Any,
        strategy: Any,
        num_replicas_in_sync: int,
    ) -> None:
        (worker,) = input_workers.worker_devices
        with tf.device(worker):
            self._cloned_datasets = [_parts(dataset, num_replicas_in_sync)]


def split(dataset: Any, extended: Any) -> SplitDataset:
    """Distributes a `tf.data.Dataset` over the replicas of one process.

    Args:
        dataset: The data set.
        extended: The `extended` of a MirroredStrategy.
    """
    return SplitDataset(
        extended._input_workers,
        extended._container_strategy(),
        dataset=dataset,
        num_replicas_in_sync=extended._num_replicas_in_sync,
    )


def _parts(dataset: Any, count: int) -> Any:
    """A data set of the parts of each batch, first those of the first."""
    if count == 1:
        return dataset
    if all(_is_batch(spec) for spec in tf.nest.flatten(dataset.element_spec)):
        parts = _DenseParts(dataset, count)
    else:
        parts = _LegacyRebatchDataset(dataset, count)
    return parts.prefetch(count)


def _is_batch(spec: Any) -> bool:
    return isinstance(spec, tf.TensorSpec) and bool(spec.shape.rank)


class _DenseParts(UnaryDataset):
    """As `_LegacyRebatchDataset`, of dense tensors only.

    That one traces a function that sees to sparse and ragged tensors, which
    takes 10 ms per data set.
    """

    def __init__(self, dataset: Any, count: int):
        def part_of(spec: tf.TensorSpec) -> tf.TensorSpec:
            size = spec.shape[0]
            known = size is not None and size % count == 0
            return tf.TensorSpec(
                [size // count if known else None, *spec.shape[1:]], spec.dtype
            )

        self._element_spec = tf.nest.map_structure(
            part_of, dataset.element_spec
        )
        parts = tf.raw_ops.RebatchDataset(
            input_dataset=dataset._variant_tensor,
            num_replicas=count,
            **self._flat_structure,
        )
        super().__init__(dataset, parts)

    @property
    def element_spec(self) -> Any:
        """Structure of `tf.TensorSpec` of a part."""
        return self._element_spec


def yields_arrays_of_python(dataset: Any) -> bool:
    """Whether the elements of a `tf.data.Dataset` come from Python code.

    There is no public way to look at what a dataset was made of.
    """
    for wrapper in dataset._functions():
        for op in wrapper.function.graph.get_operations():
            if op.type in _OPS_THAT_RUN_PYTHON:
                return True
    return any(yields_arrays_of_python(source) for source in dataset._inputs())


_OPS_THAT_RUN_PYTHON = frozenset(
    {"GeneratorDataset", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
)


def is_deterministic(dataset: Any) -> bool:
    """Whether a data set is told to keep the order of its elements."""
    return dataset.options().deterministic is not False


def seeds_of_shuffles(dataset: Any) -> list[tuple[int, int]]:
    """Both seeds of each `shuffle` of a data set; (0, 0): a random one."""
    found = []
    if hasattr(dataset, "_seed2"):
        found.append((int(dataset._seed), int(dataset._seed2)))
    for source in dataset._inputs():
        found += seeds_of_shuffles(source)
    return found


def draws_seeds(dataset: Any) -> bool:
    """Whether making an iterator of a `tf.data.Dataset` draws a seed.

    A data set within another, as of `flat_map`, draws its own when it is read.
    """
    name = type(dataset).__name__
    return any(word in name for word in ("Shuffle", "Random")) or any(
        draws_seeds(source) for source in dataset._inputs()
    )


def is_read_whole(dataset: Any) -> bool:
    """Whether every worker reads a `tf.data.Dataset` whole, and keeps a part.

    Not if it may be divided by files, or not at all.
    """
    policies = tf.data.experimental.AutoShardPolicy
    policy = dataset.options().experimental_distribute.auto_shard_policy
    return policy == policies.DATA or (
        policy == policies.AUTO and not _may_read_files(dataset)
    )


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
    name = type(dataset).__name__.lstrip("_").removesuffix("Dataset")
    return name not in _READ_NO_FILES or any(
        _may_read_files(source) for source in dataset._inputs()
    )


# Transformations without data sets of their own, and sources that are tensors.
_READ_NO_FILES = frozenset(
    {
        "Batch",
        "Cache",
        "Concatenate",
        "Filter",
        "Map",
        "Options",
        "PaddedBatch",
        "ParallelBatch",
        "ParallelMap",
        "Prefetch",
        "Range",
        "Repeat",
        "Shuffle",
        "Skip",
        "Take",
        "Tensor",
        "TensorSlice",
        "Zip",
    }
)


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
    values = []
    for spec in tf.nest.flatten(element_spec):
        value_specs = getattr(spec, "_value_specs", (spec,))
        part = value_specs[0]
        if not isinstance(part, tf.TensorSpec) or not part.shape.rank:
            return None
        inner = part.shape[1:]
        if not inner.is_fully_defined():
            return None
        values.append(
            tf.zeros([part.shape[0] or batch_size, *inner], part.dtype)
        )
    return tf.nest.pack_sequence_as(element_spec, values)
