"""Private names of data sets: of distributed ones, and of their parts."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# TensorFlow's splitter of batches, for elements of any structure;
# and the base of data sets that are made of one other.
from tensorflow.python.data.experimental.ops.distribute import (
    _LegacyRebatchDataset,
)
from tensorflow.python.data.ops.dataset_ops import UnaryDataset

# The distributed form of a data set: only a subclass can make other
# iterators, and Keras looks for these classes.
from tensorflow.python.distribute.input_lib import (
    DistributedDataset as DistributedDataset,
)
from tensorflow.python.distribute.input_lib import (
    DistributedDatasetsFromFunction as DistributedDatasetsFromFunction,
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


_BATCHES = frozenset({"Batch", "PaddedBatch", "ParallelBatch"})
_LEAVE_BATCHES = frozenset(
    {
        *("Cache", "Concatenate", "Filter", "Options", "Prefetch", "Repeat"),
        *("Shard", "Shuffle", "Skip", "Take"),
    }
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
    return any(
        _name(each) not in _READ_NO_FILES for each in _with_inputs(dataset)
    )


def _name(dataset: Any) -> str:
    """The kind of a data set, such as "Batch"."""
    return type(dataset).__name__.lstrip("_").removesuffix("Dataset")


# Transformations without data sets of their own, and sources that are tensors.
_READ_NO_FILES = frozenset(
    {
        *("Batch", "Cache", "Concatenate", "Filter", "Map", "Options"),
        *("PaddedBatch", "ParallelBatch", "ParallelMap", "Prefetch", "Range"),
        *("Repeat", "Shuffle", "Skip", "Take", "Tensor", "TensorSlice", "Zip"),
    }
)


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


class SplitDataset(DistributedDataset):
    """A data set of one process, whose batches are split, and not sharded.

    To shard it over one worker, TensorFlow rewrites its graph, and all that
    comes of it is the split. A last batch from files is split evenly here, as
    all others are.

    Each batch becomes one part for every replica, an empty one if it has too
    few samples. So at the end of the data no replica has a part: the iterator
    need not ask for each whether there is one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._enable_get_next_as_optional = False

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


def split(
    dataset: Any, extended: tf.distribute.StrategyExtended
) -> SplitDataset:
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
    specs = tf.nest.flatten(dataset.element_spec)
    if all(_is_batch(spec) for spec in specs):
        parts = _DenseParts(dataset, count)
    elif any(isinstance(spec, tf.SparseTensorSpec) for spec in specs):
        parts = _sparse_parts(dataset, count)
    else:
        parts = _LegacyRebatchDataset(dataset, count)
    return parts.prefetch(count)


def _is_batch(spec: Any) -> bool:
    return isinstance(spec, tf.TensorSpec) and bool(spec.shape.rank)


def _sparse_parts(dataset: Any, count: int) -> Any:
    """As `_LegacyRebatchDataset`, of which a sparse part may not be empty."""

    @tf.autograph.experimental.do_not_convert
    def parts_of(*batch: Any) -> Any:
        structure = batch if len(batch) > 1 else batch[0]

        def part(index: tf.Tensor) -> Any:
            return tf.nest.map_structure(
                lambda value: _part(value, index, count), structure
            )

        return tf.data.Dataset.range(count).map(part)

    return dataset.flat_map(parts_of)


def _part(value: Any, index: tf.Tensor, count: int) -> Any:
    if value is None:
        return None
    if not isinstance(value, tf.SparseTensor):
        rows = tf.cast(first_dimension(value), tf.int64)
        size = -(-rows // count)
        return value[index * size : (index + 1) * size]
    size = -(-value.dense_shape[0] // count)
    start = tf.minimum(index * size, value.dense_shape[0])
    part = sparse_rows(value, start, size)
    inner = value.shape[1:].as_list() if value.shape.rank else None
    if inner is None or None in inner:
        return part
    # `slice` forgets the dimensions that are known.
    shape = tf.concat([part.dense_shape[:1], inner], axis=0)
    return tf.SparseTensor(part.indices, part.values, shape)


def first_dimension(value: Any) -> tf.Tensor:
    """Number of rows of a dense, sparse or ragged tensor."""
    if isinstance(value, tf.SparseTensor):
        return value.dense_shape[0]
    if isinstance(value, tf.RaggedTensor):
        return value.nrows()
    return tf.shape(value, out_type=tf.int64)[0]


def sparse_rows(value: tf.SparseTensor, start: Any, size: Any) -> Any:
    """As many rows of a sparse tensor as there are, `size` at most."""
    rest = value.dense_shape[1:]
    begin = tf.concat([[start], tf.zeros_like(rest)], axis=0)
    return tf.sparse.slice(value, begin, tf.concat([[size], rest], axis=0))


class _DenseParts(UnaryDataset):
    """As `_LegacyRebatchDataset`, of dense tensors only.

    That one traces a function, which sees to sparse and ragged tensors.
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
