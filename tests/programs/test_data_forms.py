"""Every form of data, at every entry of a model, as on one device.

A batch may be x alone, (x,), (x, y), (x, y, w), a dict or four parts that a
custom step takes apart. Each comes as arrays, a `tf.data` data set, a
generator or a `PyDataset`, to every method that takes data, in batches that
three replicas share evenly, unevenly, and of which only one has a sample. All
numbers that come out must be those of one device.
"""

import contextlib
import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy

pytestmark = pytest.mark.slow

REPLICAS = 3
# Even, uneven, and fewer samples than replicas.
BOUNDS = (0, 6, 11, 12)
# Arrays are divided into batches of one size: two uneven ones, and the same.
OF_ARRAYS, BATCH = 11, 5

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 4)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
W = RNG.uniform(0.5, 2, 12).astype("float32")
MASK = (RNG.uniform(size=(12, 4)) > 0.3).astype("float32")


class Autoencoder(keras.Model):
    """Needs no target; its loss is one that it adds itself."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(4)

    def call(self, x):
        if isinstance(x, dict):
            x = x["left"] + x["right"]
        decoded = self.out(x)
        self.add_loss(keras.ops.mean(keras.ops.square(x - decoded)))
        return decoded


class Regression(keras.Model):
    """Learns a target, with Keras's own steps."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1)

    def call(self, x):
        if isinstance(x, dict):
            x = x["left"] + x["right"]
        return self.out(x)


class OfFourParts(Regression):
    """Takes (x, mask, y, weight) apart itself."""

    def loss_of(self, data):
        x, mask, y, weight = data
        error = keras.ops.mean(keras.ops.square(y - self(x * mask)), axis=-1)
        return keras.ops.mean(weight * error)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(data)
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"own": loss}

    def test_step(self, data):
        return {"own": self.loss_of(data)}

    def predict_step(self, data):
        return self(data[0] if isinstance(data, tuple) else data)


FORMS = {
    "x": (Autoencoder, X),
    "(x,)": (Autoencoder, (X,)),
    "dict": (Autoencoder, {"left": X, "right": MASK}),
    "(x, y)": (Regression, (X, Y)),
    "(x, y, w)": (Regression, (X, Y, W)),
    "(dict, y)": (Regression, ({"left": X, "right": MASK}, Y)),
    "four parts": (OfFourParts, (X, MASK, Y, W)),
}


def part(data, start, end):
    return keras.tree.map_structure(lambda x: x[start:end].copy(), data)


def batches(data):
    for start, end in itertools.pairwise(BOUNDS):
        batch = part(data, start, end)
        # Keras takes what is no tuple for an array, but in a data set.
        yield batch if isinstance(batch, tuple) else (batch,)


class Batches(keras.utils.PyDataset):
    def __init__(self, data):
        super().__init__()
        self.batches = list(batches(data))

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def of_arrays(data):
    """x, y and sample_weight, as far as there are."""
    if not isinstance(data, tuple):
        data = (data,)
    return dict(zip(("x", "y", "sample_weight"), data, strict=False))


def of_data_set(data):
    def each():
        for start, end in itertools.pairwise(BOUNDS):
            yield part(data, start, end)

    signature = keras.tree.map_structure(
        lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), data
    )
    return tf.data.Dataset.from_generator(each, output_signature=signature)


SOURCES = {"Dataset": of_data_set, "generator": batches, "PyDataset": Batches}


def scope_of(replicas):
    keras.utils.set_random_seed(3)
    if replicas == 1:
        return contextlib.nullcontext()
    return AllReduceStrategy(DEVICES[:replicas]).scope()


def make_model(form):
    make, data = FORMS[form]
    model: keras.Model = make()
    loss = None if make is Autoencoder else "mse"
    model.compile(keras.optimizers.SGD(0.05), loss)
    return model, data


def numbers_of(form, source, replicas):
    """All numbers that come out of the methods of one model, by name."""
    with scope_of(replicas):
        model, data = make_model(form)
    if source == "arrays":
        arrays = of_arrays(part(data, 0, OF_ARRAYS))
        validation = tuple(arrays.values())
        data = {**arrays, "batch_size": BATCH, "verbose": 0}
        inputs = {"x": arrays["x"], "batch_size": BATCH}
    else:
        validation = SOURCES[source](data)
        inputs = {"x": SOURCES[source](data)}
        data = {"x": SOURCES[source](data), "verbose": 0}
    history = model.fit(**data, validation_data=validation, shuffle=False)
    found = {"fit": history.history}
    if source == "generator":
        data = {"x": batches(FORMS[form][1]), "verbose": 0}
    found["evaluate"] = model.evaluate(**data, return_dict=True)
    found["predict"] = model.predict(**inputs, verbose=0)
    found["weights"] = model.get_weights()
    return found


@functools.cache
def on_one_device(form, are_arrays):
    """What one device gives; the sources of the same batches share it."""
    return numbers_of(form, "arrays" if are_arrays else "Dataset", 1)


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        for got, want in zip(
            keras.tree.flatten(found[name]),
            keras.tree.flatten(wanted[name]),
            strict=True,
        ):
            np.testing.assert_allclose(
                got, want, rtol=1e-5, atol=1e-6, err_msg=str(name)
            )


# Every form, every source, and the forms that are no (x, y) from two sources.
CELLS = [
    ("x", "arrays"),
    ("(x,)", "PyDataset"),
    ("dict", "Dataset"),
    ("dict", "generator"),
    ("(x, y, w)", "PyDataset"),
    ("(dict, y)", "arrays"),
    ("four parts", "Dataset"),
    ("four parts", "generator"),
]


@pytest.mark.parametrize(("form", "source"), CELLS)
def test_every_method_gives_one_devices_numbers(form, source):
    agree(
        numbers_of(form, source, REPLICAS),
        on_one_device(form, are_arrays=source == "arrays"),
    )


def test_four_parts_of_a_pydataset_end_in_keras_own_error():
    with scope_of(REPLICAS):
        model, data = make_model("four parts")
    with pytest.raises(ValueError, match="must return a tuple"):
        model.fit(Batches(data), verbose=0)


def on_batches(form, replicas):
    """What the methods that take one batch return, and the weights."""
    with scope_of(replicas):
        model, data = make_model(form)
    found = {}
    for samples in (6, 5, 1):
        arguments = of_arrays(part(data, 0, samples))
        found[samples, "train"] = model.train_on_batch(
            **arguments, return_dict=True
        )
        found[samples, "test"] = model.test_on_batch(
            **arguments, return_dict=True
        )
        found[samples, "predict"] = model.predict_on_batch(arguments["x"])
        assert len(found[samples, "predict"]) == samples
    found["weights"] = model.get_weights()
    return found


@pytest.mark.parametrize("form", ["dict", "(x, y, w)"])
def test_methods_of_one_batch_give_one_devices_numbers(form):
    agree(on_batches(form, REPLICAS), on_batches(form, 1))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.Bidirectional(keras.layers.LSTM(3)),
        lambda: keras.layers.Conv1D(3, 2),
    ],
    ids=["Bidirectional", "Conv1D"],
)
def test_one_sample_is_predicted_by_layers_that_need_one(layer):
    x = RNG.normal(size=(1, 6, 4)).astype("float32")

    def predicted():
        keras.utils.set_random_seed(3)
        return keras.Sequential([keras.Input([6, 4]), layer()]).predict(
            x, verbose=0
        )

    with AllReduceStrategy(DEVICES[:2]).scope():
        found = predicted()
    np.testing.assert_allclose(found, predicted(), rtol=1e-5, atol=1e-6)


def test_a_data_set_without_a_batch_ends_in_keras_own_warning():
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = Regression()
        model.compile("sgd", "mse")
    empty = tf.data.Dataset.from_tensor_slices((X[:0], Y[:0])).batch(2)
    with pytest.warns(UserWarning, match="ran out of data"):
        assert model.fit(empty, verbose=0).history == {}


def fitted(*data, **arguments):
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = Regression()
        model.compile("sgd", "mse")
    return model.fit(*data, verbose=0, **arguments)


def graphs_of_several_rows():
    yield np.ones([6, 4], "float32"), np.ones([4, 1], "float32")


def with_a_table():
    rows = tf.data.Dataset.from_tensor_slices((X, Y)).batch(6)
    table = tf.ones([5, 4])
    return rows.map(lambda x, y: ({"left": x, "right": table}, y))


def batches_of_two_sizes():
    x = tf.data.Dataset.from_tensor_slices(X).batch(6)
    y = tf.data.Dataset.from_tensor_slices(Y).batch(4)
    return tf.data.Dataset.zip(x, y).prefetch(1)


@pytest.mark.parametrize(
    "data",
    [graphs_of_several_rows, with_a_table, batches_of_two_sizes],
    ids=lambda each: each.__name__,
)
def test_parts_of_a_batch_with_other_rows_end_in_an_error(data):
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="one row for each"
    ):
        fitted(data())


def test_a_batch_with_other_rows_is_an_error():
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = Regression()
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"Received: parts of \[4, 6\] rows"):
        model.train_on_batch(X[:6], Y[:4])


def test_a_stateful_layer_is_an_error():
    with AllReduceStrategy(DEVICES[:2]).scope():
        inputs = keras.Input([3, 4], batch_size=4)
        layers = [keras.layers.LSTM(3, stateful=True), keras.layers.Dense(1)]
        model = keras.Sequential([inputs, *layers])
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="stateful=True, on 2 replicas"):
        model.fit(np.ones([8, 3, 4]), np.ones([8, 1]), batch_size=4, verbose=0)


class OfOneSize(Regression):
    """A step for batches of six samples."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            error = tf.reshape(self(x), [6, 1]) - y
            loss = tf.reduce_mean(error * error)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


def test_a_step_for_batches_of_one_size_says_what_to_write():
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = OfOneSize()
        model.compile("sgd")
    with (
        pytest.warns(UserWarning, match=r"write `tf.shape\(x\)\[0\]`"),
        pytest.raises(ValueError, match="reshape"),
    ):
        model.fit(X, Y, batch_size=6, verbose=0)


class OneNumber(keras.Model):
    def call(self, x):
        return keras.ops.mean(x)


def test_a_prediction_of_one_number_for_a_batch_is_an_error():
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = OneNumber()
        model.compile()
    with pytest.raises(ValueError, match="one row for each sample"):
        model.predict(X, verbose=0)
