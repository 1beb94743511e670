"""A model of two weights whose gradients one can work out by hand."""

import keras
import numpy as np

X = np.arange(10, dtype="float32").reshape(5, 2)
Y = np.ones([5, 1], "float32")


def linear(kind=keras.Sequential):
    return kind(
        [
            keras.Input([2]),
            keras.layers.Dense(1, kernel_initializer="ones", use_bias=False),
        ]
    )


def compiled(model, loss="mse", **compile_args):
    model.compile(keras.optimizers.SGD(0.001), loss, **compile_args)
    return model
