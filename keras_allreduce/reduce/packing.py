"""One bucket, one tensor: `pack` and its inverse `unpack`."""

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
