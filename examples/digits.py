"""Trains on handwritten digits with two replicas, and compares to one device.

Trains a small convolutional network on the UCI handwritten digits of
scikit-learn (1797 images of 8 x 8 pixels), on all GPUs if there are two or
more, otherwise on two logical CPU devices. Then it trains the same network
from the same seed on one device for one epoch, and prints the largest
difference of a weight. (In later epochs differences in the last digit grow,
for example when a ReLU falls on the other side of 0, as between two
processors.)

    python examples/digits.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_allreduce

EPOCHS = 15
BATCH_SIZE = 32


def make_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input([8, 8, 1]),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.002),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(
    strategy: tf.distribute.Strategy, x, y, epochs: int, verbose: int
) -> tuple[keras.Model, list[np.ndarray]]:
    """Returns the trained model, and its weights after the first epoch."""
    weights_of_epoch = {}
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights_of_epoch.setdefault(
            epoch, model.get_weights()
        )
    )
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = make_model()
    model.fit(
        x,
        y,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_split=0.1,
        verbose=verbose,
        callbacks=[keep],
    )
    return model, weights_of_epoch[0]


def main() -> None:
    devices = None
    if len(tf.config.list_physical_devices("GPU")) < 2:
        devices = keras_allreduce.host_devices(2)
    strategy = keras_allreduce.AllReduceStrategy(devices)

    digits = load_digits()
    x = digits.images[..., np.newaxis].astype("float32") / 16
    x, x_test, y, y_test = train_test_split(
        x, digits.target, test_size=297, random_state=0
    )
    model, weights = train(strategy, x, y, EPOCHS, verbose=1)
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"\ntest accuracy: {accuracy:.4f}")

    _, expected = train(tf.distribute.get_strategy(), x, y, 1, verbose=0)
    difference = max(
        np.abs(ours - theirs).max()
        for ours, theirs in zip(weights, expected, strict=True)
    )
    print(
        "largest weight difference from one device after one epoch: "
        f"{difference:.1e}"
    )
    if accuracy < 0.97:
        raise SystemExit("Expected a test accuracy of at least 0.97.")


if __name__ == "__main__":
    main()
