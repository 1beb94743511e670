"""A wire format that is no dtype, and what workers send in tests of the wire.

The format is float16 that cannot overflow: each row is divided by a power of
two that leaves no number above 1, and begins with the exponent of that.
"""

import numpy as np
import tensorflow as tf

from keras_allreduce.workers.wire_formats import WireFormat

NAME = "scaled_float16"


class ScaledFloat16(WireFormat):
    name = NAME

    def carries(self, dtype):
        return dtype.is_floating and dtype.size > 2

    def encode(self, rows):
        flat = tf.reshape(rows, [tf.shape(rows)[0], -1])
        largest = tf.reduce_max(tf.abs(flat), axis=1, keepdims=True)
        largest = tf.where(largest > 0, largest, tf.ones_like(largest))
        two = tf.constant(2, rows.dtype)
        exponent = tf.math.ceil(tf.math.log(largest) / tf.math.log(two))
        numbers = flat * tf.pow(two, -exponent)
        return tf.cast(tf.concat([exponent, numbers], axis=1), tf.float16)

    def decode(self, crossed, like):
        wide = tf.cast(crossed, like.dtype)
        two = tf.constant(2, like.dtype)
        numbers = wide[:, 1:] * tf.pow(two, wide[:, :1])
        shape = tf.concat([tf.shape(wide)[:1], tf.shape(like)[1:]], axis=0)
        return tf.reshape(numbers, shape)

    def nbytes(self, nbytes, dtype):
        return nbytes * 2 / dtype.size


def parts(worker):
    """What a worker sends in the tests of the wire: small and large.

    The last two are too large for an exchange in float32.
    """
    rng = np.random.default_rng(worker)
    return {
        "scalar": np.float32(worker + 0.5),
        "small": np.array([1.0, -2.0, worker], "float32"),
        "counts": np.arange(5) * (worker + 1),
        "halves": np.full([70, 70], 0.5 + worker, "float16"),
        "whole": rng.integers(-8, 8, [271, 273]).astype("float32"),
        "large": rng.normal(size=[267, 301]).astype("float32"),
    }
