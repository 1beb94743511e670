"""Losses of `compile` that are computed on the batch of all replicas.

The programs of `programs/batch_losses.py` train with them.
"""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from programs import batch_losses, on_one_device, run

from keras_allreduce import AllReduceStrategy
from keras_allreduce.compat import keras_losses
from keras_allreduce.one_device import whole_batch
from keras_allreduce.one_device.loss import LossOfTheReplica


class OwnValues(keras.losses.MeanSquaredError):
    def call(self, y_true, y_pred):
        return keras.ops.mean(y_true - y_pred, axis=-1)


class OwnReduction(keras.losses.MeanSquaredError):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return keras.ops.max(self.call(y_true, y_pred))


def wrapped(function, **arguments):
    """A function as `compile` wraps it."""
    return keras.losses.MeanSquaredError.__base__(function, **arguments)


@pytest.mark.parametrize(
    ("loss", "shape", "known"),
    [
        (keras.losses.MeanSquaredError(), [None, 3], True),
        (keras.losses.MeanSquaredError(reduction="sum"), [None, 3], True),
        (wrapped(keras.losses.mean_squared_error), [None, None, 3], True),
        (keras.losses.CategoricalCrossentropy(axis=1), [None, 3, 4], True),
        (
            keras.losses.SparseCategoricalCrossentropy(ignore_class=0),
            [None, 3],
            True,
        ),
        (keras.losses.Dice(axis=(1, -1)), [None, 3, 4], True),
        (keras.losses.CTC(), [None, 5, 3], True),
        # The last dimension is that of the samples.
        (keras.losses.MeanSquaredError(), [None], False),
        (keras.losses.MeanSquaredError(), None, False),
        (keras.losses.CosineSimilarity(axis=0), [None, 3], False),
        (keras.losses.CosineSimilarity(axis=-2), [None, 3], False),
        (keras.losses.Dice(axis=(0, 1)), [None, 3], False),
        (keras.losses.Dice(), [None, 3], False),
        (keras.losses.Tversky(), [None, 3], False),
        (keras.losses.Circle(), [None, 3], False),
        (OwnValues(), [None, 3], False),
        (OwnReduction(), [None, 3], False),
        (wrapped(lambda y_true, y_pred: y_pred[:, 0]), [None, 3], False),
        (lambda y_true, y_pred, sample_weight: y_pred, [None, 3], False),
    ],
)
def test_which_losses_are_one_value_per_sample(loss, shape, known):
    y_pred = keras.KerasTensor(shape) if shape is not None else [1, 2]
    assert keras_losses.is_one_value_per_sample(loss, y_pred) is known


class TwoWorkers:
    group = types.SimpleNamespace(size=2)


@pytest.mark.parametrize(
    ("samples", "is_gathered"),
    [
        (tf.zeros([3, 2**17]), True),
        (tf.zeros([3, 2**17 + 1]), False),
        (tf.constant([["a"]]), False),
    ],
)
def test_large_samples_and_strings_are_not_sent(samples, is_gathered):
    losses = LossOfTheReplica(
        keras.Sequential(), TwoWorkers(), None, is_known=False
    )
    loss = wrapped(batch_losses.root_mean_square, name="rms")
    given = samples, tf.zeros([3, 2**17]), None

    def may_gather():
        return losses._may_gather(0, loss, given)

    if is_gathered:
        assert may_gather()
        line = str(losses.gathered[0])
        assert line.startswith("loss 'rms' is that of the whole batch (1.0 MiB")
        return
    with pytest.warns(UserWarning, match="cannot be sent"):
        assert not may_gather()
    assert not losses.gathered


@pytest.mark.filterwarnings("error:.*cannot be sent")
def test_a_metric_in_predict_sends_nothing_and_says_nothing():
    class Watches(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.seen = keras.metrics.MeanMetricWrapper(
                batch_losses.root_mean_square
            )

        def call(self, x):
            return self.dense(x)

        def predict_step(self, data):
            outputs = self(data)
            self.seen.update_state(tf.zeros_like(outputs), outputs)
            return outputs

    with AllReduceStrategy(DEVICES[:2]).scope():
        model = Watches()
    assert model.predict(np.ones([4, 3]), verbose=0).shape == (4, 1)


def test_a_step_is_measured_with_a_mean_in_the_place_of_the_loss():
    rows = tf.constant([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    for value in (tf.constant(9.0), tf.zeros([4]), tf.zeros([4, 5])):
        whole = whole_batch.stand_in(value, rows)
        assert whole.shape == value.shape
        parts = [
            whole_batch.stand_in(value[:2] if value.shape.rank else value, part)
            for part in (rows[:2], rows[2:])
        ]
        means = [tf.reduce_mean(each) for each in parts]
        assert tf.reduce_mean(whole) == sum(means) / 2


@pytest.mark.slow
def test_the_user_can_say_that_a_loss_compares_nothing():
    name = "negatives_as_a_vector"
    wanted, _ = on_one_device(name)
    strategy = AllReduceStrategy(DEVICES[:2], weigh_samples=True)
    found, warned = run(name, strategy)
    assert not warned
    (kernel, _), (expected, _) = found["weights"], wanted["weights"]
    assert np.abs(np.subtract(kernel, expected)).max() > 1e-3


def test_the_plan_and_its_explanation_name_the_losses(capsys):
    strategy = AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = batch_losses.dense()
        model.compile("sgd", batch_losses.root_mean_square)
    model.fit(batch_losses.X, batch_losses.Y, batch_size=9, verbose=2)
    line = "loss 'root_mean_square' is that of the whole batch (0.0 KiB of each"
    assert line in capsys.readouterr().out
    strategy.explain(model, print_fn=print)
    shown = " ".join(capsys.readouterr().out.split())
    assert "loss 'root_mean_square' is not known to be one value" in shown
