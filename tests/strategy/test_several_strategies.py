"""Strategies in one process: one after another, in turns, one in another."""

import concurrent.futures
import threading

import keras
import numpy as np
import pytest
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy

pytestmark = pytest.mark.slow


def task(width, num_devices, algorithm):
    """A model of its own shape under its own strategy, and data."""
    strategy = AllReduceStrategy(DEVICES[:num_devices], algorithm=algorithm)
    keras.utils.set_random_seed(width)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([width]),
                keras.layers.Dense(2 * width, "tanh"),
                keras.layers.Dense(1),
            ]
        )
        model.compile("adam", "mse")
    rng = np.random.default_rng(width)
    x = rng.normal(size=[18, width]).astype("float32")
    return model, x, x.sum(axis=1, keepdims=True)


TASKS = [(3, 2, "auto"), (5, 3, "ring"), (4, 2, "ring"), (2, 1, "auto")]
BATCHES = [slice(start, start + 6) for start in (0, 6, 12)]


def train(model, x, y):
    for batch in BATCHES + BATCHES:
        model.train_on_batch(x[batch], y[batch])


@pytest.fixture(scope="module")
def alone():
    """The weights of each task when nothing else runs meanwhile."""
    weights = []
    for arguments in TASKS:
        model, x, y = task(*arguments)
        train(model, x, y)
        weights.append(model.get_weights())
    return weights


def assert_close(models, expected):
    for model, weights in zip(models, expected, strict=True):
        for got, theirs in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_allclose(got, theirs, rtol=1e-5, atol=1e-6)


def test_in_turns(alone):
    tasks = [task(*arguments) for arguments in TASKS]
    for batch in BATCHES + BATCHES:
        for model, x, y in tasks:
            model.train_on_batch(x[batch], y[batch])
    assert_close([model for model, _, _ in tasks], alone)


def test_one_while_another_trains(alone):
    inner = [task(*arguments) for arguments in TASKS[1:3]]

    class TrainAnother(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            train(*inner[epoch])

    model, x, y = task(*TASKS[0])
    arguments = {"batch_size": 6, "shuffle": False, "verbose": 0}
    callbacks = [TrainAnother()]
    model.fit(x, y, epochs=2, callbacks=callbacks, **arguments)
    assert_close([model, *(other for other, _, _ in inner)], alone[:3])


def test_at_the_same_time(alone):
    tasks = [task(*arguments) for arguments in TASKS]
    with concurrent.futures.ThreadPoolExecutor(len(TASKS)) as threads:
        for done in [threads.submit(train, *each) for each in tasks]:
            done.result()
    assert_close([model for model, _, _ in tasks], alone)


class Pairs(keras.layers.Layer):
    """Waits until the other thread calls a layer of its kind."""

    barrier = None

    def call(self, x):
        if self.barrier is not None:
            self.barrier.wait(120)
        return x


def test_two_models_of_one_strategy_in_two_threads(alone):
    # Both are built, and their steps traced, at the same time, on each replica.
    first, x, y = task(*TASKS[0])
    models = []
    for _ in range(2):
        with first.distribute_strategy.scope():
            layers = keras.models.clone_model(first).layers
            models.append(
                keras.Sequential([keras.Input([3]), Pairs(), *layers])
            )
            models[-1].compile("adam", "mse")
        models[-1].set_weights(first.get_weights())
    barrier = threading.Barrier(2)
    for model in models:
        model.layers[0].barrier = barrier
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        trained = [threads.submit(train, each, x, y) for each in models]
        for done in trained:
            done.result()
    assert_close(models, [alone[0], alone[0]])
