"""Programs drawn at random train on replicas as on one device.

Each draw is a kind of loss x a mask x noise x clipping x what the step keeps x
a metric x a log x a batch size x 2 to 4 replicas, or 2 workers that are threads
x eager or traced, with a seed that the id of the test names. Noise is scaled by
a weight that is 0 while the program trains, so that its results can be
compared, and not 0 in the second state that is measured.
"""

import contextlib
import warnings
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf
import thread_workers
from five_devices import DEVICES

import keras_allreduce
from programs import data

NUM_SAMPLES = 17
IN_FAST_TIER = 12
AT_NIGHT = 200


@dataclass(frozen=True)
class Program:
    """What a step does, and on what it trains."""

    loss: str
    is_masked: bool
    is_noisy: bool
    is_clipped: bool
    kept: str
    metric: str
    is_metric_returned: bool
    log: str
    batch_size: int
    replicas: int
    workers: int
    is_eager: bool


def draw(seed):
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    workers = one_of(1, 1, 1, 1, 1, 1, 2)
    is_noisy = one_of(False, True)
    loss = one_of("mean", "sum", "constant", "ratio", "ratio and penalty")
    return Program(
        loss=loss,
        is_masked=one_of(False, True),
        is_noisy=is_noisy,
        is_clipped=one_of(False, True),
        kept=one_of("nothing", "mean", "average of means", "count", "sums"),
        metric=one_of("none", "Mean", "Sum"),
        is_metric_returned=one_of(False, True),
        log=one_of("none", "largest", "count", "sums", "share"),
        batch_size=int(rng.integers(5, 14)),
        replicas=1 if workers > 1 else one_of(2, 2, 2, 3, 4),
        workers=workers,
        # A ratio is seen in a graph. Noise takes long in eager rounds.
        is_eager=one_of(False, True)
        and not is_noisy
        and "ratio" not in loss
        and workers == 1,
    )


class Drawn(keras.Model):
    """A model that trains as a program says."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.net = keras.Sequential(
            [
                keras.Input([4]),
                keras.layers.Dense(5, "tanh"),
                keras.layers.Dense(2),
            ]
        )
        self.drop = keras.layers.Dropout(0.5, seed=1)
        self.noise = self.add_weight(initializer="zeros", trainable=False)
        self.kept = self.add_weight(
            shape=[4], initializer="zeros", trainable=False
        )
        self.shown = {
            "none": None,
            "Mean": keras.metrics.Mean(name="shown"),
            "Sum": keras.metrics.Sum(name="shown"),
        }[program.metric]

    def call(self, x, training=None):
        return self.net(x, training=training)

    def loss_of(self, x, y):
        losses = tf.reduce_sum((self.net(x) - y) ** 2, axis=-1)
        if self.program.is_noisy:
            losses += self.noise * self.drop(losses, training=True)
        mask = tf.ones_like(losses)
        if self.program.is_masked or "ratio" in self.program.loss:
            mask = tf.cast(x[:, 0] > -0.4, losses.dtype)
        total = tf.reduce_sum(losses * mask)
        if self.program.loss == "mean":
            return tf.reduce_mean(losses * mask)
        if self.program.loss == "sum":
            return 0.05 * total
        if self.program.loss == "constant":
            return total / self.program.batch_size
        ratio = total / tf.reduce_sum(mask)
        if self.program.loss == "ratio":
            return ratio
        return 2.0 * ratio + 0.1 * tf.nn.l2_loss(self.net.layers[0].kernel)

    def keep(self, x):
        kept = self.program.kept
        count = tf.cast(tf.shape(x)[0], x.dtype)
        if kept == "mean":
            self.kept.assign(tf.reduce_mean(x, axis=0))
        elif kept == "average of means":
            mean = tf.reduce_mean(x, axis=0)
            self.kept.assign(0.9 * self.kept.value + 0.1 * mean)
        elif kept == "count":
            self.kept.assign(self.kept.value + count)
        elif kept == "sums":
            total = tf.reduce_sum(tf.cast(x > 0, x.dtype), axis=0)
            self.kept.assign(0.7 * self.kept.value + 0.3 * total)

    def train_step(self, data):
        x, y = data
        variables = self.net.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = tape.gradient(loss, variables)
        if self.program.is_clipped:
            gradients, _ = tf.clip_by_global_norm(gradients, 0.5)
        self.optimizer.apply(gradients, variables)
        self.keep(x)
        logs = {"own": loss}
        if self.shown is not None:
            self.shown.update_state(loss)
            if self.program.is_metric_returned:
                logs["shown so far"] = self.shown.result()
        log = {
            "none": lambda: None,
            "largest": lambda: tf.reduce_max(x),
            "count": lambda: tf.shape(x)[0],
            "sums": lambda: tf.reduce_sum(x, axis=0),
            "share": lambda: tf.reduce_mean(tf.cast(y > 0.9, tf.float32)),
        }[self.program.log]()
        return logs if log is None else {**logs, "log": log}


def train(program, strategy=None):
    """Weights and what was kept, logs and metrics, warnings."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_SAMPLES, 4)).astype("float32")
    x[-1, 0] = 1.0  # Every batch has a sample that is not masked.
    y = np.tanh(x[:, :2]).astype("float32")
    scope = contextlib.nullcontext() if strategy is None else strategy.scope()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with scope:
            model = Drawn(program)
            # To trace a step takes longer than to run it so few times.
            model.compile(
                keras.optimizers.SGD(0.05, momentum=0.5),
                run_eagerly=strategy is None or program.is_eager,
            )
            data.begin_fit()
            history = model.fit(
                x,
                y,
                batch_size=program.batch_size,
                epochs=2,
                shuffle=False,
                verbose=0,
            ).history
    if model.shown is not None and program.workers == 1:
        history["shown"] = float(model.shown.result())
    weights = [each.numpy() for each in (*model.net.weights, model.kept)]
    messages = [str(each.message) for each in caught]
    ours = [each for each in messages if "replica" in each or "taken" in each]
    return weights, history, ours


def check(seed):
    program = draw(seed)
    if program.workers > 1:
        devices = [[each] for each in DEVICES[: program.workers]]
        results = thread_workers.results_of(
            lambda strategy: train(program, strategy), devices
        )
    else:
        replicas = DEVICES[: program.replicas]
        strategy = keras_allreduce.AllReduceStrategy(replicas)
        results = [train(program, strategy)]
    wanted, wanted_logs, _ = train(program)
    for found, logs, warned in results:
        assert not warned, f"{warned} of {program}"
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(
                one, other, rtol=1e-4, atol=1e-5, err_msg=str(program)
            )
        for name, values in wanted_logs.items():
            np.testing.assert_allclose(
                *(logs[name], values),
                rtol=1e-4,
                atol=1e-6,
                err_msg=f"{name} of {program}",
            )


@pytest.mark.parametrize("seed", range(IN_FAST_TIER))
def test_a_drawn_program_trains_as_on_one_device(seed):
    check(seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(IN_FAST_TIER, AT_NIGHT))
def test_many_drawn_programs_train_as_on_one_device(seed):
    check(seed)
