"""What is read in a graph that TensorFlow traced."""

import keras
import pytest
import tensorflow as tf

from keras_allreduce.compat import graphs

GENERATOR = tf.random.Generator.from_seed(1)


@tf.function
def noise_of_a_function(x):
    return x + tf.random.uniform([3])


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + tf.random.normal([3]),
        lambda x: x + tf.random.truncated_normal([3]),
        lambda x: x + tf.random.stateless_uniform([3], [1, 2]),
        lambda x: x + GENERATOR.normal([3]),
        lambda x: keras.random.dropout(x, 0.5, seed=1),
        lambda x: tf.random.shuffle(x),
        noise_of_a_function,
        lambda x: tf.cond(x[0] > 0, lambda: noise_of_a_function(x), lambda: x),
    ],
    ids=[
        "normal",
        "truncated",
        "stateless",
        "generator",
        "dropout of Keras",
        "shuffle",
        "in a function",
        "in a branch",
    ],
)
def test_random_numbers_are_seen_in_the_graph(draw):
    assert graphs.is_random(traced(draw))


def test_branches_and_loops_are_not_random():
    def step(x):
        x = tf.cond(x[0] > 0, lambda: x + 1, lambda: x)
        return tf.while_loop(lambda x: x[0] < 9, lambda x: (x + 1,), (x,))

    assert not graphs.is_random(traced(step))


def traced(step):
    return tf.function(step).get_concrete_function(tf.TensorSpec([3]))
