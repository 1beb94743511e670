"""Data, models and losses that `feature_cases.py` trains with."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

RNG = np.random.default_rng(0)
X = RNG.normal(size=(72, 6)).astype("float32")
TARGET = (X @ RNG.normal(size=(6, 1))).astype("float32")
CLASS = (X[:, :1] - X[:, 1:2] > 0).astype("float32")
IMAGES = RNG.normal(size=(25, 8, 8, 3)).astype("float32")
TOKENS = RNG.integers(1, 20, (72, 5))
TOKENS[RNG.integers(0, 72, 20), 3:] = 0
WEIGHTS = RNG.uniform(0.1, 3, 72).astype("float32")
BATCH = 24


@dataclass(frozen=True)
class Outcome:
    """What a training came to; `error` if it did not come to an end."""

    weights: tuple[np.ndarray, ...] = ()
    history: dict[str, list[float]] | None = None
    note: str = ""
    warned: bool = False
    error: str = ""


def dense(*layers: keras.Layer) -> keras.Model:
    first, last = keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)
    return keras.Sequential([keras.Input([6]), first, *layers, last])


def of_tokens(*layers: keras.Layer) -> keras.Model:
    return keras.Sequential(
        [keras.Input([5], dtype="int32"), *layers, keras.layers.Dense(1)]
    )


def outcome(model: keras.Model, history=None, note: str = "") -> Outcome:
    return Outcome(tuple(model.get_weights()), history or {}, note)


def sgd(rate: float = 0.05, **arguments: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(rate, **arguments)


def fit(model, x=X, y=TARGET, optimizer=None, loss="mse", **arguments):
    """Compiles and fits; `arguments` go to whichever of the two takes them."""
    compiling = {
        name: arguments.pop(name)
        for name in (
            "metrics",
            "weighted_metrics",
            "steps_per_execution",
            "run_eagerly",
            "jit_compile",
        )
        if name in arguments
    }
    model.compile(optimizer or sgd(), loss, **compiling)
    if isinstance(x, np.ndarray | dict):
        arguments = {"y": y, "batch_size": BATCH} | arguments
    arguments = {"epochs": 2, "shuffle": False, "verbose": 0} | arguments
    return outcome(model, model.fit(x, **arguments).history)


def dataset(x: Any, y: Any = TARGET, batch: int = BATCH) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)


def batches(*bounds: int):
    # Copies: TensorFlow uses the memory of what a generator or a PyDataset
    # gives it, and may write its results there.
    for start, end in itertools.pairwise(bounds):
        yield X[start:end].copy(), TARGET[start:end].copy()


class Batches(keras.utils.PyDataset):
    """Batches of the samples between two neighbouring `bounds`."""

    def __init__(self, *bounds: int):
        super().__init__()
        self.bounds = bounds

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, index):
        return next(batches(*self.bounds[index : index + 2]))


class SumOfRow(keras.layers.Layer):
    """Sum of the embeddings in each ragged row."""

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(10, 3)

    def call(self, x):
        if isinstance(x, tf.RaggedTensor):
            x = x.to_tensor(shape=[None, 3])
        return keras.ops.sum(self.embedding(x), axis=1)

    def compute_output_spec(self, x):
        return keras.KerasTensor([x.shape[0], 3])


def mean_squared(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


def mse(reduction: str) -> keras.losses.Loss:
    return keras.losses.MeanSquaredError(reduction=reduction)


def sum_squared(y_true, y_pred):
    return keras.ops.sum(keras.ops.square(y_true - y_pred))


class Penalty(keras.layers.Layer):
    """Adds a loss of its own."""

    def __init__(self, reduce: Callable[..., Any] = keras.ops.mean):
        super().__init__()
        self.reduce = reduce

    def call(self, x):
        self.add_loss(0.01 * self.reduce(keras.ops.square(x)))
        return x


class Noise(keras.layers.Layer):
    """Adds random numbers from the generator that Keras makes by itself."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


class Largest(keras.metrics.Metric):
    """The largest target: a metric whose state is not a sum."""

    def __init__(self, name="largest"):
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_true)))

    def result(self):
        return self.value * 1.0


class OwnStep(keras.Model):
    """A `train_step` of its own, with the loss of `loss_of_step`."""

    def __init__(self, loss_of_step: Callable[..., Any]):
        super().__init__()
        self.out = keras.layers.Dense(1)
        self.loss_of_step = loss_of_step

    def call(self, x):
        return self.out(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of_step(self, x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
        return self.get_metrics_result()


class Clips(OwnStep):
    """Clips its gradients itself."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of_step(self, x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        gradients, norm = tf.clip_by_global_norm(gradients, 0.1)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"own": loss, "norm": norm}


class StepIsAFunction(OwnStep):
    """Its step is a `tf.function`."""

    train_step = tf.function(OwnStep.train_step)


class Keeps(OwnStep):
    """Its step follows the weights with an average, and counts."""

    def __init__(self, loss_of_step: Callable[..., Any]):
        super().__init__(loss_of_step)
        self.slow = keras.layers.Dense(1, trainable=False)
        self.slow.build([None, 6])
        self.count = self.add_weight(initializer="zeros", trainable=False)

    def train_step(self, data):
        logs = super().train_step(data)
        for slow, fast in zip(self.slow.weights, self.out.weights, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
        self.count.assign(self.count + 1.0)
        return logs


class ByHand(OwnStep):
    """Its step is its own optimizer, from gradients of its own samples."""

    def train_step(self, data):
        x, y = data
        error = self(x) - y
        kernel, bias = self.out.trainable_variables
        size = keras.ops.cast(keras.ops.shape(x)[0], "float32")
        kernel.assign_sub(0.1 * tf.matmul(x, error, transpose_a=True) / size)
        bias.assign_sub(0.1 * keras.ops.mean(error, axis=0))
        return {"loss": mean_squared(y, error + y)}


class Counts(keras.layers.Layer):
    """Counts samples, and keeps an average of them."""

    def __init__(self):
        super().__init__()
        self.samples = self.add_weight(
            dtype="int32", initializer="zeros", trainable=False
        )
        self.average = self.add_weight(initializer="zeros", trainable=False)

    def call(self, x, training=None):
        if training:
            self.samples.assign_add(keras.ops.shape(x)[0])
            self.average.assign(0.9 * self.average + 0.1 * keras.ops.mean(x))
        return x


class Adversaries(keras.Model):
    """A model without `call` and targets, with two optimizers in a dict."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential(
            [keras.Input([3]), keras.layers.Dense(6)]
        )
        self.critic = dense()

    def compile(self):
        super().compile()
        self.own = {"generator": sgd(), "critic": sgd(clipnorm=0.1)}

    def update(self, name: str, loss_of: Callable[[], Any]):
        weights = getattr(self, name).trainable_weights
        with tf.GradientTape() as tape:
            loss = loss_of()
        gradients = tape.gradient(loss, weights)
        self.own[name].apply_gradients(zip(gradients, weights, strict=True))
        return loss

    def train_step(self, x):
        entropy = keras.losses.BinaryCrossentropy(from_logits=True)
        code, ones = x[:, :3], tf.ones([tf.shape(x)[0], 1])
        both = tf.concat([self.generator(code), x], axis=0)
        labels = tf.concat([ones, 0 * ones], axis=0)
        critic = self.update(
            "critic", lambda: entropy(labels, self.critic(both))
        )
        generator = self.update(
            "generator",
            lambda: entropy(0 * ones, self.critic(self.generator(code))),
        )
        return {"critic": critic, "generator": generator}
