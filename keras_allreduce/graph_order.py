"""Ops of a graph that TensorFlow must not put in a row."""

from typing import Any

import tensorflow as tf

from keras_allreduce.compat.distribute import ResourceVariable


def free_running_clock(variable: tf.Variable) -> Any:
    """A function that returns the time, to be called in a graph.

    TensorFlow runs ops with side effects in program order, each after the one
    before it, and the clock counts as one: times taken in plain
    `tf.timestamp()` ops would all be those of the slowest. Ops that read a
    variable are only ordered with those that write it. So the clock pretends
    to read one.
    """

    @tf.function(autograph=False)
    def now() -> tf.Tensor:
        variable.read_value()
        return tf.timestamp()

    return now.get_concrete_function()


def new_token() -> list[tf.Tensor]:
    """What keeps a collective in a graph from waiting for the one before it.

    TensorFlow chains the stateful ops of a function, but for those that read
    or write different variables.
    """
    if tf.executing_eagerly():
        return []
    with tf.init_scope():
        token = ResourceVariable(0.0, trainable=False)
    # The graph keeps it alive, as long as it can run.
    tf.compat.v1.get_default_graph().add_to_collection(
        "keras_allreduce_tokens", token
    )
    return [token.handle]
