"""Private names of data sets whose batches are split over one process."""

from typing import Any

import tensorflow as tf

# TensorFlow's splitter of batches, for elements of any structure;
# and the base of data sets that are made of one other.
from tensorflow.python.data.experimental.ops.distribute import (
    _LegacyRebatchDataset,
)
from tensorflow.python.data.ops.dataset_ops import UnaryDataset

from keras_allreduce.compat.datasets import DistributedDataset


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
