"""Scales values by the weight of their replica; 0 takes precedence over NaN."""

import functools
from typing import Any

import tensorflow as tf


def scale(value: Any, weight: Any) -> Any:
    """`value * weight`, 0 where the weight is 0 even if the value is NaN."""
    if weight is None:
        return value
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(
            scale(value.values, weight), value.indices, value.dense_shape
        )
    return tf.math.multiply_no_nan(value, tf.cast(weight, value.dtype))


def scale_unless_one(value: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """`scale(value, weight)`, at no cost where the weight turns out to be 1.

    Args:
        value: Dense tensor of a floating or complex dtype, in a graph.
        weight: float32 scalar, on the host.
    """
    flat = _scale_unless_one(value.dtype)(tf.reshape(value, [-1]), weight)
    result = tf.reshape(flat, tf.shape(value))
    result.set_shape(value.shape)
    return result


@functools.cache
def _scale_unless_one(dtype: tf.DType) -> Any:
    """One function for all tensors of a dtype: each `tf.cond` takes a while."""
    # float16 times a weight in float16 would round the weight.
    wide = tf.float32 if dtype.size < 4 else dtype

    @tf.function(autograph=False)
    def scale_unless_one(flat: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        with tf.device("/cpu:0"):
            is_one = tf.equal(weight, 1.0)
        return tf.cond(
            is_one,
            lambda: tf.identity(flat),
            lambda: tf.cast(scale(tf.cast(flat, wide), weight), dtype),
        )

    with tf.init_scope():
        return scale_unless_one.get_concrete_function(
            tf.TensorSpec([None], dtype), tf.TensorSpec([], tf.float32)
        )
