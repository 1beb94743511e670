"""Sparse gradients (`tf.IndexedSlices`): gathered, never bucketed.

The sum of sparse gradients is all their rows one after another: rows of the
same index stay separate, as TensorFlow leaves them, and the optimizer adds
them up. But a GPU adds them up in an order of its own each time, so that
replicas would drift apart: for GPUs it is done once, before they get the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_allreduce.devices import is_gpu
from keras_allreduce.reduce import shared_memory


@dataclass(frozen=True)
class RowsSpec:
    """A sparse gradient that is not there yet, as `tf.TensorSpec` is a dense.

    Attributes:
        shape: Shape of the whole variable.
        dtype: Dtype of the rows.
    """

    shape: tf.TensorShape
    dtype: tf.DType


def all_reduce(
    gradients: Sequence[tf.IndexedSlices],
    devices: Sequence[str],
    owner: str,
) -> list[tf.IndexedSlices]:
    """Sums one sparse gradient over the replicas by gathering its rows.

    Args:
        gradients: One `tf.IndexedSlices` per replica; numbers of rows may
            differ.
        devices: Device of each replica.
        owner: Device that does the gathering.

    Returns:
        One `tf.IndexedSlices` per replica, with the rows of replica 0 first;
        on GPUs with one row for each index.
    """
    return share(gather(gradients, owner), devices, owner)


def share(
    gathered: tf.IndexedSlices, devices: Sequence[str], owner: str
) -> list[Any]:
    """Gives a sparse gradient, which is on `owner`, to every device."""
    if any(map(is_gpu, devices)) and list(devices) != [owner]:
        with tf.device(owner):
            gathered = add_up(gathered)
    values = shared_memory.share(gathered.values, devices)
    indices = shared_memory.share(gathered.indices, devices)
    shapes: Sequence[tf.Tensor | None] = [None] * len(devices)
    if gathered.dense_shape is not None:
        shapes = shared_memory.share(gathered.dense_shape, devices)
    return [
        tf.IndexedSlices(*parts)
        for parts in zip(values, indices, shapes, strict=True)
    ]


def gather(
    gradients: Sequence[tf.IndexedSlices], device: str
) -> tf.IndexedSlices:
    """All rows of all `gradients`, one after another, on `device`."""
    with tf.device(device):
        return tf.IndexedSlices(
            tf.concat([g.values for g in gradients], axis=0),
            tf.concat([g.indices for g in gradients], axis=0),
            gradients[0].dense_shape,
        )


def add_up(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """The same gradient with one row for each index that it has."""
    indices, positions = tf.unique(gradient.indices)
    return tf.IndexedSlices(
        tf.math.unsorted_segment_sum(
            gradient.values, positions, tf.size(indices)
        ),
        indices,
        gradient.dense_shape,
    )
