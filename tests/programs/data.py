"""What programs train on: data, batches, small models, and `fit`."""

import contextlib
import itertools
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from keras import ops

RNG = np.random.default_rng(0)
X = RNG.normal(size=(72, 6)).astype("float32")
Y = (X @ RNG.normal(size=(6, 1))).astype("float32")
CLASSES = (X[:, 0] - X[:, 1] > 0).astype("int32")
WEIGHTS = RNG.uniform(0.1, 3, 72).astype("float32")
IMAGES = RNG.normal(size=(25, 8, 8, 3)).astype("float32")
TOKENS = RNG.integers(1, 20, (72, 5))
# More of the first samples is masked than of the others.
TOKENS[:8, 1:] = 0
TOKENS[8:14, 3:] = 0
TOKEN_WEIGHTS = RNG.uniform(0.2, 2, (72, 5)).astype("float32")


@dataclass
class Size:
    """How many samples programs train on, and in batches of how many.

    Those that are about the size of batches say it themselves.
    """

    samples: int
    batch: int


SIZE = Size(27, 13)
"""Batches of 13, 13 and 1 divide unevenly, and leave replicas empty."""


def sgd(rate=0.05, **arguments):
    return keras.optimizers.SGD(rate, **arguments)


def dense(*layers):
    first, last = keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)
    return keras.Sequential([keras.Input([6]), first, *layers, last])


def of_tokens(*layers, **arguments):
    """One value for each token, unless `layers` make one of all."""
    inputs = keras.Input([5], dtype="int32")
    embedding = keras.layers.Embedding(20, 3, **arguments)
    last = keras.layers.Dense(1)
    return keras.Sequential([inputs, embedding, *layers, last])


def mean_squared(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))


def sum_squared(y_true, y_pred):
    return ops.sum(ops.square(y_true - y_pred))


def _before_fit():
    """Called when a model is compiled."""


@contextlib.contextmanager
def before_fit(function):
    """Has `fit` call a function when it has compiled a model."""
    global _before_fit
    stock, _before_fit = _before_fit, function
    try:
        yield
    finally:
        _before_fit = stock


def begin_fit():
    """To be called when a model is compiled."""
    _before_fit()


OF_FIT = (
    "batch_size",
    "callbacks",
    "class_weight",
    "sample_weight",
    "shuffle",
    "steps_per_epoch",
    "validation_data",
    "validation_split",
)


def fit(
    model,
    x=X,
    y=Y,
    loss="mse",
    optimizer=None,
    samples=None,
    epochs=2,
    **arguments,
):
    """Compiles and fits; `arguments` go to `fit`, or to `compile`."""
    of_fit = {n: arguments.pop(n) for n in OF_FIT if n in arguments}
    model.compile(optimizer or sgd(), loss, **arguments)
    if isinstance(x, np.ndarray | dict | list):
        of_fit = {"y": y, "batch_size": SIZE.batch} | of_fit
        rows = samples or SIZE.samples
        x = keras.tree.map_structure(lambda array: array[:rows], x)
        for name in {"y", "sample_weight"} & set(of_fit):
            of_fit[name] = keras.tree.map_structure(
                lambda array: array[:rows], of_fit[name]
            )
    of_fit = {"shuffle": False, "verbose": 0} | of_fit
    begin_fit()
    history = model.fit(x, epochs=epochs, **of_fit).history
    return {"weights": weights_of_all_replicas(model), "history": history}


def weights_of_all_replicas(model):
    """The weights of a model, which all replicas must have alike."""
    for weight in model.weights:
        first, *others = getattr(weight.value, "values", [weight.value])
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=weight.path)
    return model.get_weights()


def dataset(x):
    """A data set that does not tell the size of its last batch."""
    rows = tf.data.Dataset.from_tensor_slices((x, Y[: x.shape[0]]))
    return rows.batch(SIZE.batch)


def batches(*bounds):
    # Copies: TensorFlow uses the memory of what a generator or a PyDataset
    # gives it, and may write its results there.
    for start, end in itertools.pairwise(bounds):
        yield X[start:end].copy(), Y[start:end].copy()


def dataset_of_batches(*bounds):
    signature = (tf.TensorSpec([None, 6]), tf.TensorSpec([None, 1]))
    return tf.data.Dataset.from_generator(
        lambda: batches(*bounds), output_signature=signature
    )


class Batches(keras.utils.PyDataset):
    """Batches of the samples between two neighbouring `bounds`."""

    def __init__(self, *bounds):
        super().__init__()
        self.bounds = bounds

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, index):
        return next(batches(*self.bounds[index : index + 2]))
