"""Programs about metrics, as many as one model can have."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from programs.data import CLASSES, dense, fit
from programs.table import program


def of_probabilities():
    return [
        "accuracy",
        "mae",
        keras.metrics.AUC(name="auc"),
        keras.metrics.BinaryIoU(name="iou"),
        keras.metrics.F1Score(threshold=0.5, name="f1"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.R2Score(name="r2"),
        keras.metrics.Recall(name="recall"),
        keras.metrics.RootMeanSquaredError(name="rmse"),
    ]


@program(
    tolerance=1e-5,
    on="workers",
    feature="`AUC`, `F1Score`, `MeanIoU`, `R2Score`",
)
def metrics_of_every_kind():
    inputs = keras.Input([6])
    sigmoid = keras.layers.Dense(1, "sigmoid", name="sigmoid")(inputs)
    classes = keras.layers.Dense(2, "softmax", name="classes")(inputs)
    each = keras.layers.Dense(2, "sigmoid", name="each")(inputs)
    return fit(
        keras.Model(inputs, [sigmoid, classes, each]),
        y=[CLASSES[:, None], CLASSES, np.stack([CLASSES, 1 - CLASSES], axis=1)],
        loss=[
            "binary_crossentropy",
            "sparse_categorical_crossentropy",
            "binary_crossentropy",
        ],
        metrics=[
            of_probabilities(),
            [keras.metrics.MeanIoU(2, sparse_y_pred=False, name="mean_iou")],
            [keras.metrics.F1Score(average=None, threshold=0.5, name="f1s")],
        ],
    )


class Largest(keras.metrics.Metric):
    """The largest target; its state is not a sum."""

    def __init__(self, name="largest"):
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.maximum(self.value, ops.max(y_true)))

    def result(self):
        return self.value * 1.0


class Smallest(Largest):
    """The smallest target; it starts from infinity."""

    def __init__(self, name="smallest"):
        super().__init__(name)
        self.reset_state()

    def reset_state(self):
        self.value.assign(np.inf)

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.minimum(self.value, ops.min(y_true)))


@program(
    on="workers",
    feature="Metrics that are a maximum, a minimum, one value",
    fast=True,
    nightly="workers",
)
def metrics_whose_state_is_no_sum():
    def one_value(y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred))

    return fit(dense(), metrics=[Largest(), Smallest(), one_value])


class Last(Largest):
    """A mean of the last batch."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.mean(ops.abs(y_true - y_pred)))


class Guide(keras.Model):
    """The step of Keras's guide, which returns some of the metrics."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        for metric in self.metrics:
            if metric.name != "loss":
                metric.update_state(y, y_pred)
        logs = {m.name: m.result() for m in self.metrics if m.name != "loss"}
        wrong = tf.cast(tf.abs(y - y_pred) > 0.5, tf.int32)
        return {
            "loss": loss,
            "samples": tf.shape(x)[0],
            "wrong": tf.reduce_sum(wrong),
            **logs,
        }


@program(
    on="workers",
    feature="A step that returns some of the metrics",
    fast=True,
    nightly="workers",
)
def step_of_the_guide():
    inputs = keras.Input([6])
    outputs = keras.layers.Dense(1)(inputs)
    metrics = [keras.metrics.RootMeanSquaredError(), Last("last")]
    return fit(Guide(inputs, outputs), metrics=metrics)
