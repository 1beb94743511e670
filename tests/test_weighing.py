"""When the loss of a replica is weighed, and what is left alone."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import DEVICES

import keras_allreduce
from keras_allreduce.one_device import rules
from keras_allreduce.reduce import scaling


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


def linear(kind=keras.Sequential):
    return kind(
        [
            keras.Input([2]),
            keras.layers.Dense(1, kernel_initializer="ones", use_bias=False),
        ]
    )


def mean_of_all(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


class StrangeLoss(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return mean_of_all(y_true, y_pred)


X = np.arange(10, dtype="float32").reshape(5, 2)
Y = np.ones([5, 1], "float32")


def compiled(model, loss="mse", **compile_args):
    model.compile(keras.optimizers.SGD(0.001), loss, **compile_args)
    return model


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
    ("make", "doubt"),
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
def test_what_cannot_be_known_is_left_alone_and_said(make, doubt):
    rule = rules.find_rule(make(), "train_step", None)
    assert rule.kind == "as_is"
    assert doubt in rule.reason


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
def test_doubt_is_said_once_with_what_to_do(make, remedy):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = make()
    with pytest.warns(UserWarning, match=remedy):
        model.fit(X[:4], Y[:4], batch_size=4, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(X[:4], Y[:4], batch_size=4, verbose=0)


def test_the_option_silences_the_doubt():
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


def test_a_loss_of_the_users_own_runs_once_per_replica_and_step():
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 4])
def test_a_real_nan_or_inf_on_any_replica_stays_visible(value, row):
    x = X.copy()
    x[row] = value
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = compiled(linear())
    model.fit(x, Y, batch_size=5, verbose=0)
    assert not np.isfinite(model.get_weights()[0]).any()


def test_an_empty_replica_leaves_no_trace_in_moving_statistics():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([2]),
                keras.layers.BatchNormalization(momentum=0.0),
                keras.layers.Dense(1),
            ]
        )
        compiled(model)
    model.fit(X[:1], Y[:1], batch_size=2, verbose=0)
    first, second = model.layers[0].moving_mean.value.values
    np.testing.assert_allclose(first.numpy(), X[0], atol=1e-6)
    np.testing.assert_array_equal(second.numpy(), [0, 0])


def test_step_logs_are_means_over_samples():
    class Logs(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.losses = []

        def on_train_batch_end(self, batch, logs=None):
            self.losses.append(logs["loss"])

    def losses(strategy):
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = compiled(linear())
        logs = Logs()
        model.fit(
            X, Y, batch_size=3, shuffle=False, verbose=0, callbacks=[logs]
        )
        return logs.losses

    np.testing.assert_allclose(
        losses(keras_allreduce.AllReduceStrategy(DEVICES[:2])),
        losses(tf.distribute.get_strategy()),
        rtol=1e-6,
    )


def test_objects_of_the_model_are_as_before_after_a_step():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = compiled(linear())
    model.fit(X, Y, batch_size=5, verbose=0)
    for owner in (model, model.optimizer):
        assert not {"apply", "scale_loss", "compute_loss"} & set(vars(owner))


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32])
@pytest.mark.parametrize("weight", [1.0, 0.0, 0.75, 1.3])
def test_weighing_a_pack_is_a_product_rounded_once(dtype, weight):
    rng = np.random.default_rng(0)
    value = tf.cast(rng.normal(size=[3, 50]), dtype)

    @tf.function
    def weigh(value, weight):
        return scaling.scale_unless_one(value, weight)

    got = weigh(value, tf.constant(weight))
    assert got.dtype == dtype
    exact = tf.cast(value, tf.float64) * np.float32(weight)
    np.testing.assert_array_equal(got, tf.cast(exact, dtype))


def test_a_pack_that_weighs_nothing_is_0_whatever_is_in_it():
    @tf.function
    def weigh(weight):
        value = tf.constant([[np.nan, np.inf], [1.0, 2.0]])
        return scaling.scale_unless_one(value, weight)

    assert not np.any(weigh(tf.constant(0.0)))
    assert np.isnan(weigh(tf.constant(1.0))[0, 0])
    assert np.isnan(weigh(tf.constant(0.5))[0, 0])


def test_a_pack_may_have_a_shape_that_is_not_known_while_tracing():
    @tf.function(input_signature=[tf.TensorSpec([None, 2])])
    def weigh(value):
        weighed = scaling.scale_unless_one(value, tf.constant(0.5))
        assert weighed.shape.as_list() == [None, 2]
        return weighed

    np.testing.assert_array_equal(weigh(tf.ones([3, 2])), np.full([3, 2], 0.5))
