"""The example of README.md."""

import keras
import numpy as np

import keras_allreduce

x = np.random.default_rng(1).normal(size=(1797, 64))
y = x[:, :10].argmax(axis=1)

devices = keras_allreduce.host_devices(2)  # Default: all GPUs, else CPUs.
strategy = keras_allreduce.AllReduceStrategy(devices)
with strategy.scope():
    hidden = [keras.layers.Dense(512, "relu") for _ in range(3)]
    model = keras.Sequential([*hidden, keras.layers.Dense(10, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
model.fit(x, y, epochs=3)
