"""One value per replica, made by hand, for the tests of what reduces them."""

import numpy as np
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce.compat import distribute

REAL_DTYPES = [
    tf.float16,
    tf.bfloat16,
    tf.float32,
    tf.float64,
    tf.int32,
    tf.int64,
]
DTYPES = [*REAL_DTYPES, tf.complex64]


def gradient(shape, replica, dtype=tf.float32, step=1):
    """Whole numbers that any dtype holds, different on each replica."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape) % 5 + replica
    return tf.cast(tf.constant(numbers * step), dtype)


def per_replica(tensors):
    """One tensor per replica, each on its own device."""
    placed = []
    for tensor, device in zip(tensors, DEVICES, strict=False):
        with tf.device(device):
            placed.append(tf.identity(tensor))
    return distribute.PerReplica(tuple(placed))


def local(result):
    """One tensor per replica; TensorFlow does not wrap the only one."""
    return result.values if hasattr(result, "values") else (result,)


def sparse_value(rows, table=5):
    """Rows 1, 2, 3 ... at the indices `rows[replica]`."""
    slices = []
    for indices, device in zip(rows, DEVICES, strict=False):
        with tf.device(device):
            slices.append(
                tf.IndexedSlices(
                    tf.range(1, len(indices) + 1, dtype=tf.float32),
                    tf.constant(indices, tf.int64),
                    tf.constant([table], tf.int64),
                )
            )
    return distribute.PerReplica(tuple(slices))
