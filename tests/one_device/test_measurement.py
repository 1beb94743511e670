"""Measuring a step leaves no trace, and happens once."""

import random
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from programs import Custom, X, Y, dense, fit, mean_squared, sgd

import keras_allreduce
from keras_allreduce.one_device import measurement, samples
from keras_allreduce.one_device.reduction import Reductions
from keras_allreduce.one_device.samples import probe

pytestmark = pytest.mark.slow


class Restless(keras.Model):
    """Changes whatever a step can change."""

    def __init__(self):
        super().__init__()
        self.normalize = keras.layers.BatchNormalization()
        self.drop = keras.layers.Dropout(0.5)
        self.out = keras.layers.Dense(1)
        self.count = self.add_weight(initializer="zeros", trainable=False)
        self.plain = tf.Variable(0, trainable=False)
        self.generator = tf.random.Generator.from_seed(1)
        self.shown = keras.metrics.Mean(name="shown")

    def call(self, x, training=None):
        x = self.drop(self.normalize(x, training=training), training=training)
        return self.out(x)

    def train_step(self, data):
        x, y = data
        x += 0.1 * self.generator.normal(tf.shape(x))
        with tf.GradientTape() as tape:
            loss = mean_squared(y, self(x, training=True))
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        self.count.assign(self.count + 1.0)
        self.plain.assign_add(1)
        self.shown.update_state(loss * random.random() * np.random.rand())
        return {"loss": loss}


def state_of(model):
    variables = [
        *model.variables,
        *model.metrics_variables,
        *model.optimizer.variables,
    ]
    return [
        *(variable.numpy() for variable in variables),
        model.plain.numpy(),
        model.generator.state.numpy(),
        random.getstate(),
        np.random.get_state()[1],
    ]


def restless(**arguments):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = Restless()
        model.compile(keras.optimizers.Adam(), "mse", **arguments)
        model(X)
        model.optimizer.build(model.trainable_variables)
    return model, strategy


def test_all_that_a_step_changes_is_put_back():
    model, strategy = restless()
    before = state_of(model)
    data = (tf.constant(X), tf.constant(Y))
    found = measurement.measure(model, model.train_step, data, strategy)
    assert not found.failure
    gradient = found.of("gradient", 0)
    assert (gradient.kind, gradient.is_exact) == ("mean", True)
    for one, other in zip(before, state_of(model), strict=True):
        np.testing.assert_equal(other, one)


def test_metrics_and_generators_of_an_eager_step_are_put_back():
    model, strategy = restless(run_eagerly=True)
    drawn = model.generator.state.numpy().tolist()
    data = (tf.constant(X), tf.constant(Y))
    found = measurement.measure(model, model.train_step, data, strategy)
    assert not found.failure
    for variable in model.shown.variables:
        assert float(variable) == 0
    assert model.generator.state.numpy().tolist() == drawn


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "traced"])
def test_a_step_is_measured_once_until_it_is_compiled_again(eager, monkeypatch):
    measured = []

    def measure(*arguments):
        measured.append(arguments)
        return Reductions()

    monkeypatch.setattr(measurement, "measure", measure)
    with keras_allreduce.AllReduceStrategy(DEVICES[:2]).scope():
        model = Custom()
        fit(model, epochs=2, run_eagerly=eager)
        # Traced again, for another shape.
        model.fit(X[:6], Y[:6], batch_size=3, verbose=0)
        assert len(measured) == 1
        fit(model, run_eagerly=eager)
    assert len(measured) == 2


def test_keras_own_step_is_not_measured(monkeypatch):
    def measure(*arguments):
        raise AssertionError

    monkeypatch.setattr(measurement, "measure", measure)
    with keras_allreduce.AllReduceStrategy(DEVICES[:2]).scope():
        fit(dense(keras.layers.Dense(3, kernel_regularizer="l2")))


def test_what_cannot_be_measured_is_taken_for_a_mean_with_a_warning():
    class OfThisSize(Custom):
        def train_step(self, data):
            # Fails on the eight samples of half a measurement.
            x = tf.ensure_shape(data[0], [None, 6])
            tf.debugging.assert_greater(tf.shape(x)[0], 8)
            return super().train_step(data)

    with keras_allreduce.AllReduceStrategy(DEVICES[:2]).scope():
        model = OfThisSize()
        model.compile(sgd(), "mse")
    with pytest.warns(UserWarning, match="which failed"):
        model.fit(X[:52], Y[:52], batch_size=26, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X[:52], Y[:52], batch_size=26, verbose=0)


def test_an_example_is_made_up_where_none_was_seen():
    data = (tf.ones([3, 5]), tf.zeros([3], tf.int32), tf.constant(["x"] * 3))
    made = samples.like(Custom(), data)
    assert [part.shape[1:] for part in made] == [[5], [], []]
    assert [part.dtype for part in made] == [part.dtype for part in data]
    (whole, _), (first, _), (second, _) = samples.parts(made)
    for parts in zip(whole, first, second, strict=True):
        sizes = [part.shape[0] for part in parts]
        assert sizes == [sizes[1] * 2, sizes[1], sizes[1]]


def of_generator():
    for start in range(0, 26, 13):
        yield X[start : start + 13].copy(), Y[start : start + 13].copy()


@pytest.mark.parametrize(
    "data",
    [
        lambda: (X, Y),
        lambda: (tf.data.Dataset.from_tensor_slices((X, Y)).batch(20),),
        lambda: (of_generator(),),
    ],
    ids=["arrays", "dataset", "generator"],
)
def test_a_built_model_is_measured_on_samples_of_its_data(data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        measurement,
        "measure",
        lambda model, _step, given, _: (
            seen.append(samples.like(model, given)) or Reductions()
        ),
    )
    with keras_allreduce.AllReduceStrategy(DEVICES[:2]).scope():
        model = Custom()
        model.build([None, 6])
        model.compile(sgd())
    model.fit(*data(), verbose=0, shuffle=False)
    (x, y), *_ = seen
    np.testing.assert_array_equal(x, X[: len(x)])
    np.testing.assert_array_equal(y, Y[: len(y)])


def test_one_sample_is_measured_twice():
    parts = samples.parts((X[:1], None))
    assert [rows for _, rows in parts] == [
        slice(0, 2),
        slice(0, 1),
        slice(1, 2),
    ]
    whole, first, second = (part for part, _ in parts)
    np.testing.assert_array_equal(whole[0], np.concatenate([X[:1], X[:1]]))
    assert first[0].shape[0] == second[0].shape[0] == 1
    assert first[1] is None


def test_reductions_cross_between_workers():
    model, strategy = restless()
    data = (tf.constant(X), tf.constant(Y))
    found = measurement.measure(model, model.train_step, data, strategy)
    assert Reductions.from_json(found.to_json()) == found
    failed = Reductions(failure="ValueError: no")
    assert Reductions.from_json(failed.to_json()) == failed


class Coins:
    """A trial whose step doubles the loss of each sample, or does not.

    Args:
        of_samples: Mean or sum.
    """

    keys = (("gradient", 0),)
    communicates = False
    ends = terms = types.MappingProxyType({})

    def __init__(self, of_samples, seed, is_random):
        self.is_random = is_random
        self._of_samples = of_samples
        self._rng = np.random.default_rng(seed)

    def __call__(self, batch, rows):
        tossed = 1.0 + self._rng.integers(0, 2, [len(batch), 1])
        return [self._of_samples(batch.numpy() * tossed, axis=0)]

    def move(self, *, counters):
        return False

    def put_back(self):
        pass


# That it draws is not known of a step that runs eagerly.
@pytest.mark.parametrize("is_random", [True, None])
@pytest.mark.parametrize(
    ("of_samples", "kind"), [(np.mean, "mean"), (np.sum, "sum")]
)
def test_coins_that_fall_alike_are_no_difference(
    of_samples, kind, is_random, monkeypatch
):
    data = tf.constant([[1.0, 0.2], [0.3, -1.0]])
    monkeypatch.setattr(samples, "like", lambda model, data: data)
    # Seeds whose first two rounds are alike, and halves unlike the whole.
    for seed in (31, 34, 49, 53):
        trial = Coins(of_samples, seed, is_random)
        monkeypatch.setattr(measurement, "Trial", lambda *_, t=trial: t)
        found = measurement.measure(dense(), None, data, None)
        assert found.of("gradient", 0).kind == kind, seed
        assert found.of("gradient", 0).is_exact, seed


def test_the_failure_of_a_graph_says_what_is_wrong():
    add = tf.function(lambda x: x + tf.ones([3])).get_concrete_function(
        tf.TensorSpec([None])
    )
    failure = probe(lambda batch, _rows: add(batch), tf.ones([16]))
    assert "Incompatible shapes: [3] vs. [16]" in failure.reason
