"""The example of README.md."""

import keras
from sklearn.datasets import load_digits

import keras_allreduce

x, y = load_digits(return_X_y=True)

devices = keras_allreduce.host_devices(2)  # Without: all GPUs.
strategy = keras_allreduce.AllReduceStrategy(devices)
with strategy.scope():
    hidden = [keras.layers.Dense(512, "relu") for _ in range(3)]
    model = keras.Sequential([*hidden, keras.layers.Dense(10, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
model.fit(x / 16, y, epochs=3)
