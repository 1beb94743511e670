"""A model that trains in a moment, and what to train it on."""

import keras
import numpy as np
import tensorflow as tf
from five_devices import DEVICES

rng = np.random.default_rng(0)
X = rng.normal(size=[24, 3]).astype("float32")
Y = (X.sum(axis=1, keepdims=True) > 0).astype("float32")


def make_model(strategy, **arguments):
    """A compiled model that is the same for every strategy."""
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([3]),
                keras.layers.Dense(4, "relu"),
                keras.layers.Dense(1, "sigmoid"),
            ]
        )
        model.compile(
            "adam", "binary_crossentropy", metrics=["accuracy"], **arguments
        )
    return model


def fit(model, **arguments):
    """Two epochs of three steps."""
    arguments = {"batch_size": 8, "epochs": 2, "verbose": 1} | arguments
    return model.fit(X, Y, **arguments)


def stock():
    return tf.distribute.MirroredStrategy(
        DEVICES[:2], tf.distribute.ReductionToOneDevice()
    )


def summed_in_turn(kernels):
    """Sums of gradients that backprop finishes one after another."""
    with tf.GradientTape() as tape:
        y = tf.ones([1, kernels[0].shape[0]])
        for kernel in kernels:
            y = tf.tanh(tf.matmul(y, kernel))
    gradients = tape.gradient(y, kernels)
    return tf.distribute.get_replica_context().all_reduce("SUM", gradients)


def custom_step(strategy, num_kernels=3):
    """A step of a custom loop; backprop finishes one kernel after another."""
    with strategy.scope():
        kernels = [tf.Variable(tf.ones([4, 4])) for _ in range(num_kernels)]

    def step():
        for kernel, gradient in zip(
            kernels, summed_in_turn(kernels), strict=True
        ):
            kernel.assign_sub(gradient)

    return lambda: strategy.run(step)
