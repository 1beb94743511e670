"""One bucket, one tensor: `pack`, its inverse `unpack`, and weights of packs.

A weight of 0 takes precedence over NaN.
"""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce.devices import on_each
from keras_allreduce.reduce.buckets import GradientSpec


def pack(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """Joins gradients into one tensor, on the current device.

    Args:
        gradients: At least one tensor, of one dtype and any shapes.

    Returns:
        1-D tensor of that dtype: the gradients flattened, one after another.
        A gradient that travels alone is its own pack, in its own shape: there
        is nothing to copy. Waits for nothing but these gradients.
    """
    if len(gradients) == 1:
        return gradients[0]
    flat = [tf.reshape(gradient, [-1]) for gradient in gradients]
    return tf.concat(flat, axis=0)


def unpack(
    packed: tf.Tensor, gradients: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Splits a pack into the shapes it was made of, on the current device.

    Args:
        packed: Tensor as `pack(gradients)` makes it; its dtype may differ
            (the mean of integers is a float).
        gradients: The tensors that were packed. Only their shapes are used.

    Returns:
        List of tensors with the shapes of `gradients`, in the same order:
        `unpack(pack(x), x) == x`.
    """
    if len(gradients) == 1:
        return [packed]
    sizes = [_size(gradient) for gradient in gradients]
    parts = tf.split(packed, sizes, num=len(sizes))
    return [_restore(*both) for both in zip(parts, gradients, strict=True)]


def densify(replicas: Sequence[Any], devices: Sequence[str]) -> list[Any]:
    """Makes a sparse gradient dense where it is; a dense one stays."""
    if not isinstance(replicas[0], tf.IndexedSlices):
        return list(replicas)
    return on_each(devices, tf.convert_to_tensor, replicas)


def nbytes_of(tensor: tf.Tensor) -> int | None:
    """Size of a tensor in bytes, `None` if known only while the step runs."""
    elements = tensor.shape.num_elements()
    return None if elements is None else elements * tensor.dtype.size


def spec_of(gradient: tf.Tensor) -> GradientSpec:
    """The spec of a dense gradient, for the plan."""
    return GradientSpec(gradient.dtype.name, nbytes_of(gradient))


def _size(gradient: tf.Tensor) -> int | tf.Tensor:
    static = gradient.shape.num_elements()
    return tf.size(gradient) if static is None else static


def _restore(flat: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    if gradient.shape.is_fully_defined():
        return tf.reshape(flat, gradient.shape)
    restored = tf.reshape(flat, tf.shape(gradient))
    restored.set_shape(gradient.shape)
    return restored


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
