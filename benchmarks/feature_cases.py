"""What `features.py` trains that is not as on one device, or asks for more.

The features that train on N replicas as on one are in the table of programs of
the tests, `tests/programs`. Here is what differs by nature, and what is about
the strategy itself.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from programs.custom_steps import Custom
from programs.data import SIZE, X, Y, dense, fit, sgd

STRATEGY_CASES: dict[str, Callable[..., Any]] = {}
"""Called with the function that makes a strategy."""

CASES: dict[str, Callable[..., Any]] = {}
"""Called in the scope of one."""


def case(name: str, where: dict[str, Callable[..., Any]] = CASES):
    def add(train: Callable[..., Any]) -> Callable[..., Any]:
        where[name] = train
        return train

    return add


def strategy_case(name: str):
    return case(name, STRATEGY_CASES)


def with_batch_normalization(samples: int) -> Any:
    layer = keras.layers.BatchNormalization()
    found = fit(dense(layer), samples=samples)
    finite = all(np.isfinite(weight).all() for weight in found["weights"])
    return found if finite else {"note": "NaN weights"}


@case("`BatchNormalization`, not synchronized")
def _():
    return with_batch_normalization(72)


@case("`BatchNormalization`, last batch smaller than the replicas")
def _():
    return with_batch_normalization(25)


@case("`Dice`, which compares samples")
def _():
    y = (X[:, :1] > 0).astype("float32")
    return fit(dense(keras.layers.Dense(1, "sigmoid")), y=y, loss="dice")


@case("Custom `train_step`, uneven batches")
def _():
    return fit(Custom(), samples=39, batch_size=13)


class Noise(keras.layers.Layer):
    """Adds random numbers from the generator that Keras makes by itself."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


@case("`keras.random` without a seed")
def _():
    fit(dense(Noise()), optimizer=sgd(0.0))
    return {}


@case("`Dropout`")
def _():
    # Each sample is 64 ones. The weights start at 0 and their gradient counts
    # the samples, one per replica, whose mask lets an input through.
    samples = len(tf.config.list_logical_devices("CPU"))
    layers = [
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
    ]
    model = keras.Sequential([keras.Input([64]), *layers])
    x = np.ones([samples, 64], "float32")
    model.compile(sgd(1.0), lambda y_true, y_pred: y_pred[:, 0])
    model.fit(x, x[:, :1], batch_size=samples, verbose=0)
    counts = np.unique(np.round(-model.get_weights()[0] / 2 * samples))
    same = set(counts) <= {0.0, samples}
    return {"note": "the same mask on every replica"} if same else {}


def after_export(model: keras.Model) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        exported = tf.saved_model.load(folder)
        return {"weights": [exported.serve(X).numpy()]}


@strategy_case("`export` outside the scope")
def _(make_strategy):
    with make_strategy().scope():
        model = dense()
        fit(model)
    return after_export(model)


@case("`export` inside the scope")
def _():
    model = dense()
    fit(model)
    return after_export(model)


@strategy_case("A second strategy in one process")
def _(make_strategy):
    with make_strategy().scope():
        first = fit(dense())
    with make_strategy().scope():
        second = fit(dense(keras.layers.Dense(5)))
    return {"first": first, "second": second}


@strategy_case("Model made in the scope, `fit` outside")
def _(make_strategy):
    with make_strategy().scope():
        model = dense()
        model.compile(sgd(), "mse")
    history = model.fit(
        X, Y, batch_size=SIZE.batch, shuffle=False, verbose=0
    ).history
    return {"weights": model.get_weights(), "history": history}


@strategy_case("Model made outside the scope, `fit` inside")
def _(make_strategy):
    model = dense()
    with make_strategy().scope():
        return fit(model)


@case("`enable_op_determinism`")
def _():
    tf.config.experimental.enable_op_determinism()
    return fit(dense())


@case("`jit_compile=True` on logical CPU devices")
def _():
    return fit(dense(), jit_compile=True)


@strategy_case("A device named twice")
def _(make_strategy):
    with make_strategy(["/cpu:0", "/cpu:0"]).scope():
        return fit(dense())


@strategy_case("A device that is not there")
def _(make_strategy):
    with make_strategy(["/cpu:0", "/cpu:99"]).scope():
        return fit(dense())
