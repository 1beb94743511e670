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
    if all(_is_batch(spec) for spec in tf.nest.flatten(dataset.element_spec)):
        parts = _DenseParts(dataset, count)
    else:
        parts = _LegacyRebatchDataset(dataset, count)
    return parts.prefetch(count)


def _is_batch(spec: Any) -> bool:
    return isinstance(spec, tf.TensorSpec) and bool(spec.shape.rank)


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
