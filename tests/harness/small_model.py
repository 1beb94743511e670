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
