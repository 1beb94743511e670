"""The logs of a step are those of one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from linear_model import X, Y, linear

import keras_allreduce


class Guide(keras.Sequential):
    """The step of Keras's guide: all metrics, which the step updates."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.updated(loss, y, y_pred)

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        return self.updated(self.compute_loss(y=y, y_pred=y_pred), y, y_pred)

    def updated(self, loss, y, y_pred):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


class Subset(Guide):
    """Some of the metrics, one of them in a structure."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.root = keras.metrics.RootMeanSquaredError(name="root")
        self.other = keras.metrics.Mean(name="other")

    def updated(self, loss, y, y_pred):
        self.root.update_state(y, y_pred)
        return {"loss": loss, "nested": {"root": self.root.result()}}


class Numbers(Guide):
    """Counts, some 0 in the first batch, extremes, rows and vectors."""

    def updated(self, loss, y, y_pred):
        wrong = tf.cast((y - 0.5) * (y_pred - 0.5) <= 0, tf.int32)
        return {
            "loss": loss,
            "wrong": tf.reduce_sum(wrong),
            "samples": tf.shape(y)[0],
            "late": tf.reduce_sum(tf.cast(y == 0, tf.int32)),
            "constant": tf.constant(7),
            "late number": tf.reduce_sum(tf.cast(y == 0, tf.float32)),
            "late share": tf.reduce_mean(tf.cast(y == 0, tf.float32)),
            "largest": tf.reduce_max(y_pred),
            "largest integer": tf.reduce_max(tf.cast(9 * y_pred, tf.int32)),
            "smallest": tf.reduce_min(y_pred),
            "sums": tf.reduce_sum(tf.concat([y, y_pred], 1), 0),
            "rows": tf.reshape(y_pred, [-1]),
            "vector": tf.reduce_mean(tf.concat([y, y_pred], 1), 0),
        }


class Unknown(Guide):
    """Logs that are neither means nor sums, and one that is a mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.error = keras.metrics.MeanSquaredError(name="error")

    def updated(self, loss, y, y_pred):
        self.error.update_state(y, y_pred)
        return {
            "loss": loss,
            "root": tf.sqrt(self.error.result()),
            "twice": 2 * self.error.result(),
            "deviation": tf.math.reduce_std(y_pred),
        }


class OfSums(Guide):
    """A loss that is a sum, also in a metric, and a mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = keras.metrics.Mean(name="own")

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = 0.01 * tf.reduce_sum((y_pred - y) ** 2)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.own.update_state(loss)
        mean = tf.reduce_mean(y_pred)
        return {"own": self.own.result(), "again": loss, "mean": mean}


class Last(keras.metrics.Metric):
    """A mean of the last batch."""

    def __init__(self, name="last", decay=0.0):
        super().__init__(name=name)
        self.decay = decay
        self.value = self.add_weight(name="value", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        new = keras.ops.mean(keras.ops.abs(y_true - y_pred))
        self.value.assign(self.decay * self.value + (1 - self.decay) * new)

    def result(self):
        return self.value


class MeanOfBatches(Last):
    """A mean of batches of any sizes, each of which counts once."""

    def __init__(self):
        super().__init__("mean_of_batches")
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign_add(keras.ops.mean(keras.ops.abs(y_true - y_pred)))
        self.count.assign_add(1.0)

    def result(self):
        return self.value / self.count


class Largest(Last):
    def update_state(self, y_true, y_pred, sample_weight=None):
        new = keras.ops.max(keras.ops.abs(y_true - y_pred))
        self.value.assign(keras.ops.maximum(self.value, new))


class SmallestFromZero(Last):
    def update_state(self, y_true, y_pred, sample_weight=None):
        new = keras.ops.min(y_pred)
        self.value.assign(keras.ops.minimum(self.value, new))


def share_of_right(y_true, y_pred):
    """Of those that count, as in the transformer of tensorflow.org."""
    counts = tf.cast(y_true > 0, tf.float32)
    right = tf.cast(y_pred > 0, tf.float32) * counts
    return tf.reduce_sum(right) / (1e-3 + tf.reduce_sum(counts))


class All(keras.callbacks.Callback):
    """All logs of all batches, as NumPy arrays."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(keras.tree.map_structure(np.asarray, logs))

    on_test_batch_end = on_train_batch_end


def train(strategy, kind, metrics, **arguments):
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[23, 3]).astype("float32")
    y = (rng.uniform(size=[23, 1]) > 0.5).astype("float32")
    y[:5] = 1
    logs = All()
    with strategy.scope():
        model = kind([keras.Input([3]), keras.layers.Dense(1)])
        model.compile(
            keras.optimizers.SGD(0.1),
            "mse",
            metrics=metrics() or None,
            **arguments,
        )
    history = model.fit(
        x,
        y,
        batch_size=5,
        epochs=2,
        shuffle=False,
        verbose=0,
        validation_data=(x[:12], y[:12]),
        callbacks=[logs],
    )
    return logs.logs, history.history


def assert_as_on_one_device(
    kind, metrics=list, replicas=2, options=(), **arguments
):
    strategy = keras_allreduce.AllReduceStrategy(
        DEVICES[:replicas], **dict(options)
    )
    found = train(strategy, kind, metrics, **arguments)
    expected = train(tf.distribute.get_strategy(), kind, metrics, **arguments)
    keras.tree.assert_same_structure(found, expected)
    for got, wanted in zip(
        keras.tree.flatten(found), keras.tree.flatten(expected), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_step_may_return_some_of_the_metrics():
    assert_as_on_one_device(Subset, replicas=3)


def test_numbers_rows_and_vectors_are_those_of_the_batch():
    assert_as_on_one_device(Numbers, replicas=3)


def test_other_logs_are_warned_about_by_name():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with pytest.warns(UserWarning, match="What a step shows") as caught:
        train(strategy, Unknown, list)
    said = " ".join(str(each.message) for each in caught)
    assert said.count("log 'deviation', log 'root', log 'twice'.") == 1


@pytest.mark.slow
@pytest.mark.parametrize("eagerly", [True, False], ids=["eager", "traced"])
def test_losses_that_are_said_to_be_sums_are_shown_as_sums(eagerly):
    assert_as_on_one_device(
        OfSums, options={"weigh_samples": False}, run_eagerly=eagerly
    )


@pytest.mark.slow
def test_metrics_that_are_no_sums_are_as_on_one_device():
    def metrics():
        return [
            Last(),
            Last("average", 0.9),
            MeanOfBatches(),
            Largest(),
            SmallestFromZero(),
            share_of_right,
            keras.losses.Tversky(),
        ]

    assert_as_on_one_device(Guide, metrics)


def test_metrics_are_those_of_all_samples_in_a_step_on_one_batch():
    def trained(strategy):
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = linear()
            model.compile("sgd", "mse", metrics=["root_mean_squared_error"])
        return model.train_on_batch(X, Y)

    np.testing.assert_allclose(
        trained(keras_allreduce.AllReduceStrategy(DEVICES[:2])),
        trained(tf.distribute.get_strategy()),
        rtol=1e-6,
    )
