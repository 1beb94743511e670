"""How the loss of a model is weighted, and what is left alone."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import DEVICES
from linear_model import X, Y, compiled, linear

import keras_allreduce
from keras_allreduce.one_device import rules


class OwnStep(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.out(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


class OwnLoss(keras.Sequential):
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y - y_pred))


def mean_of_all(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


class StrangeLoss(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return mean_of_all(y_true, y_pred)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("mse", "samples"),
        (keras.losses.mean_absolute_error, "samples"),
        (keras.losses.MeanSquaredError(), "samples"),
        (keras.losses.MeanSquaredError(reduction="mean"), "samples"),
        (
            keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
            "sample_weights",
        ),
        (keras.losses.MeanSquaredError(reduction="sum"), "sum"),
        (["mse", "mae"], "samples"),
    ],
    ids=[
        "name",
        "function",
        "default",
        "mean",
        "mean with sample weight",
        "sum",
        "two outputs",
    ],
)
def test_the_rule_follows_the_reduction_of_the_loss(loss, kind):
    rule = rules.find_rule(compiled(linear(), loss), "train_step", None)
    assert (rule.kind, rule.reason) == (kind, "")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: compiled(OwnStep()), "custom `train_step`"),
        (lambda: compiled(linear(OwnLoss)), "custom `compute_loss`"),
        (lambda: compiled(linear(), StrangeLoss()), "`StrangeLoss`"),
        (
            lambda: compiled(
                linear(),
                ["mse", keras.losses.MeanSquaredError(reduction="sum")],
            ),
            "do not go together",
        ),
    ],
    ids=["train_step", "compute_loss", "__call__", "reductions"],
)
def test_what_cannot_be_known_is_left_alone_and_said(make, reason):
    rule = rules.find_rule(make(), "train_step", None)
    assert rule.kind == "as_is"
    assert reason in rule.reason


def test_the_option_decides_over_what_is_known():
    model = compiled(linear())
    assert rules.find_rule(model, "train_step", False).kind == "as_is"
    own = compiled(OwnStep())
    assert rules.find_rule(own, "train_step", True).kind == "samples"


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: compiled(OwnStep()), "Pass weigh_samples=True"),
        (lambda: compiled(linear(), mean_of_all), "one value per sample"),
    ],
    ids=["own train_step", "loss that returns one value"],
)
def test_a_warning_comes_once_with_what_to_do(make, remedy):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = make()
    with pytest.warns(UserWarning, match=remedy):
        model.fit(X[:4], Y[:4], batch_size=4, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(X[:4], Y[:4], batch_size=4, verbose=0)


def test_the_option_silences_the_warning():
    strategy = keras_allreduce.AllReduceStrategy(
        DEVICES[:2], weigh_samples=False
    )
    with strategy.scope():
        model = compiled(linear(), mean_of_all)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(X[:4], Y[:4], batch_size=4, verbose=0)


def test_a_sum_over_samples_as_one_value_counts_no_borrowed_sample():
    def sum_of_all(y_true, y_pred):
        return keras.ops.sum(keras.ops.square(y_true - y_pred))

    def train(strategy):
        with strategy.scope():
            model = compiled(linear(), sum_of_all)
        model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
        return model.get_weights()[0]

    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with pytest.warns(UserWarning, match="one value per sample"):
        ours = train(strategy)
    np.testing.assert_allclose(
        ours, train(tf.distribute.get_strategy()), rtol=1e-6
    )


def test_a_custom_loss_runs_once_per_replica_and_step():
    runs = []

    def counted(y_true, y_pred):
        def count(value):
            runs.append(1)
            return value

        error = keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)
        return tf.ensure_shape(
            tf.py_function(count, [error], tf.float32), error.shape
        )

    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = compiled(linear(), counted)
    model.fit(X[:4], Y[:4], batch_size=2, verbose=0)
    assert len(runs) == 2 * 2
