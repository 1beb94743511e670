"""Programs about losses, each as a head of one model where they can be.

A head has weights and a log of its own, so that a loss that counts too much
shows there and nowhere else.
"""

import keras
from keras import ops

from programs.data import (
    CLASSES,
    TOKEN_WEIGHTS,
    TOKENS,
    WEIGHTS,
    X,
    Y,
    dense,
    fit,
    mean_squared,
    of_tokens,
    sgd,
    sum_squared,
)
from programs.table import program


def mse(reduction):
    return keras.losses.MeanSquaredError(reduction=reduction)


def squared(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


def box(y_true, y_pred):
    """Knows the four values of its own output only."""
    left, right = ops.split(y_true - y_pred, 2, axis=-1)
    return ops.sum(ops.abs(left) + ops.abs(right), axis=-1)


# Name: the loss, and how much it counts, so that sums do not run away.
LOSSES = {
    "by_name": ("mse", 0.3),
    "mean": (mse("mean"), 1.0),
    "sum": (mse("sum"), 0.03),
    "not_reduced": (mse(None), 0.03),
    "weighted_mean": (mse("mean_with_sample_weight"), 1.0),
    "function": (squared, 1.0),
    "one_value_that_is_a_mean": (mean_squared, 1.0),
    "one_value_that_is_a_sum": (sum_squared, 0.03),
    "box": (box, 1.0),
    "classes": (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        2.0,
    ),
}
TARGETS = {"box": X[:, :4], "classes": CLASSES}
UNITS = {"box": 4, "classes": 2}


def heads(*names, **arguments):
    inputs = keras.Input([6])
    outputs = {
        name: keras.layers.Dense(UNITS.get(name, 1), name=name)(inputs)
        for name in names
    }
    return fit(
        keras.Model(inputs, outputs),
        y={name: TARGETS.get(name, Y) for name in names},
        loss={name: LOSSES[name][0] for name in names},
        loss_weights={name: LOSSES[name][1] for name in names},
        **arguments,
    )


@program(on="workers mpi", nightly="workers")
def losses_of_every_kind():
    metrics = {"mean": ["mae"], "classes": ["accuracy"]}
    return heads(*LOSSES, metrics=metrics)


@program(on="workers", fast=True)
def losses_with_sample_weight():
    return heads(
        *("by_name", "sum", "not_reduced", "weighted_mean"),
        sample_weight=WEIGHTS,
        weighted_metrics={"sum": ["mae"]},
    )


@program(fast=True)
def weighted_mean():
    return fit(
        dense(), loss=mse("mean_with_sample_weight"), sample_weight=WEIGHTS
    )


@program(nightly="replicas")
def weighted_mean_on_even_batches():
    return heads(
        "weighted_mean", sample_weight=WEIGHTS, samples=24, batch_size=12
    )


def _row(feature, loss, rate=0.05, **settings):
    """A row of the table of features: the loss of a model of one output."""

    def train():
        return fit(dense(), loss=loss, optimizer=sgd(rate), **settings)

    train.__name__ = f"row: {feature}"
    program(train, replicas=(), feature=feature)


_row('`reduction="sum"`', mse("sum"), 0.001)
_row(
    '`reduction="mean_with_sample_weight"`',
    mse("mean_with_sample_weight"),
    sample_weight=WEIGHTS,
)
_row("Loss function, one value for all samples", mean_squared)
_row("Loss function, one value that is a sum", sum_squared, 0.001)


@program(replicas=(), feature="Losses of two outputs, a mean and a sum")
def losses_of_two_outputs():
    return heads("mean", "sum")


@program(feature="`sample_weight`, `weighted_metrics`")
def sample_weight():
    return fit(dense(), sample_weight=WEIGHTS, weighted_metrics=["mae"])


@program(feature="`class_weight`", nightly="replicas")
def class_weight():
    return fit(dense(), y=CLASSES, class_weight={0: 1.0, 1: 3.0})


@program(nightly="replicas")
def loss_with_a_dimension_more():
    return fit(of_tokens(), TOKENS, TOKENS[..., None] / 20)


@program(
    on="workers",
    fast=True,
    feature="Loss with a mask (`mask_zero`, one output per token)",
    nightly="workers",
)
def masked_loss():
    return fit(of_tokens(mask_zero=True), TOKENS, TOKENS[..., None] / 20)


@program
def masked_loss_with_weights():
    return fit(
        of_tokens(mask_zero=True),
        TOKENS,
        TOKENS[..., None] / 20,
        loss=mse("mean_with_sample_weight"),
        sample_weight=TOKEN_WEIGHTS,
    )


class Adds(keras.layers.Layer):
    """Adds a loss."""

    def __init__(self, loss_of):
        super().__init__()
        self.loss_of = loss_of

    def call(self, x):
        self.add_loss(self.loss_of(x))
        return x


distance = keras.losses.MeanSquaredError()

ADDED = {
    "mean": lambda x: ops.mean(ops.square(x)),
    "sum": lambda x: 1e-2 * ops.sum(ops.square(x)),
    "vector": lambda x: 1e-2 * ops.sum(ops.square(x), axis=-1),
    "object": lambda x: distance(x, x / 2),
}


@program(feature="Regularizers", nightly="replicas")
def regularizers():
    return fit(dense(keras.layers.Dense(4, kernel_regularizer="l2")))


@program(feature="`add_loss` of a mean", nightly="replicas")
def added_mean():
    return fit(dense(Adds(ADDED["mean"])))


@program(feature="`add_loss` of a sum", nightly="replicas")
def added_sum():
    return fit(dense(Adds(ADDED["sum"])))


@program(on="workers")
def added_losses_of_every_kind():
    layers = [
        layer
        for loss_of in ADDED.values()
        for layer in (
            keras.layers.Dense(3, kernel_regularizer="l2"),
            Adds(loss_of),
        )
    ]
    return fit(dense(*layers, keras.layers.ActivityRegularization(l2=0.01)))


# Programs of custom steps use it; `batch_losses.py` is about others like it.


def in_batch_negatives(y_true, y_pred):
    scores = ops.matmul(ops.normalize(y_pred), ops.transpose(y_true))
    return keras.losses.sparse_categorical_crossentropy(
        ops.arange(ops.shape(y_pred)[0]), scores, from_logits=True
    )
