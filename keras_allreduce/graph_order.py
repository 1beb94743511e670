"""Ops that TensorFlow must not put in a row, and what lives with a graph."""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.compat.distribute import ResourceVariable


def free_running_clock(variable: tf.Variable) -> Any:
    """A function that returns the time, to be called in a graph.

    TensorFlow runs ops with side effects in program order, each after the one
    before it, and the clock counts as one: times taken in plain
    `tf.timestamp()` ops would all be those of the slowest. Ops that read a
    variable are only ordered with those that write it. So the clock pretends
    to read one. Where TensorFlow refuses to take the time, it is `nan`.
    """
    has_clock = runtime.has_clock()

    @tf.function(autograph=False)
    def now() -> tf.Tensor:
        variable.read_value()
        return tf.timestamp() if has_clock else tf.constant(np.nan, tf.float64)

    return now.get_concrete_function()


def new_counter() -> tf.Variable:
    """An int64 variable of 0 on the current device, outside any graph."""
    with tf.init_scope():
        return ResourceVariable(np.int64(0), trainable=False, dtype=tf.int64)


def keep_with_graph(owner: Any) -> None:
    """Keeps `owner` alive, with its variables, as long as the graph can run."""
    tf.compat.v1.get_default_graph().add_to_collection("keras_allreduce", owner)
