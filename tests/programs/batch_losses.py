"""Losses of `compile` that are computed on the batch of all replicas.

Each trains on batches of 13 samples and a last one of 1.
"""

import functools

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from programs.table import program

RNG = np.random.default_rng(0)
X = RNG.normal(size=(27, 6)).astype("float32")
Y = (X @ RNG.normal(size=(6, 3))).astype("float32")
POSITIVE = (Y > 0).astype("float32")
TOKENS = RNG.integers(1, 12, (27, 6))
for row, length in enumerate(RNG.integers(1, 7, 27)):
    TOKENS[row, length:] = 0
WEIGHTS = RNG.uniform(0.2, 2, 27).astype("float32")

case = functools.partial(program, tolerance=1e-5, may_be_nan=True)


def dense():
    return keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])


def fit(model, loss, x=X, y=Y, rate=0.05, **arguments):
    names = ("sample_weight", "validation_data", "class_weight")
    given = {n: arguments.pop(n) for n in names if n in arguments}
    optimizer = arguments.pop("optimizer", keras.optimizers.SGD(rate))
    model.compile(optimizer, loss, **arguments)
    if not isinstance(x, tf.data.Dataset):
        given |= {"y": y, "batch_size": 13}
    history = model.fit(x, epochs=2, shuffle=False, verbose=0, **given)
    return {"weights": model.get_weights(), "history": history.history}


# One value for all samples --------------------------------------------------


def root_mean_square(y_true, y_pred):
    return ops.sqrt(ops.mean(ops.square(y_true - y_pred)))


def in_batch_negatives(y_true, y_pred):
    scores = ops.matmul(y_pred, ops.transpose(y_true))
    return keras.losses.sparse_categorical_crossentropy(
        ops.arange(ops.shape(y_pred)[0]), scores, from_logits=True
    )


def total(y_true, y_pred):
    return ops.sum(ops.square(y_true - y_pred))


class Negatives(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return in_batch_negatives(y_true, y_pred)


class Values(keras.losses.Loss):
    """One value for each sample, which Keras has not written."""

    def call(self, y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred), axis=-1)


class Normalized(keras.layers.Layer):
    def call(self, x):
        return ops.normalize(x, axis=-1)


# Name: the loss, and how much it counts.
LOSSES = {
    "root_mean_square": (root_mean_square, 1.0),
    "mse": ("mse", 0.5),
    "sum": (total, 0.02),
    "negatives": (in_batch_negatives, 2.0),
    "not_reduced": (Negatives(reduction=None), 0.1),
    "in_float64": (Negatives(dtype="float64"), 1.0),
    "along_the_samples": (keras.losses.CosineSimilarity(axis=0), 1.0),
    "dice": ("dice", 1.0),
    "tversky": (keras.losses.Tversky(axis=(0,)), 1.0),
    "circle": (keras.losses.Circle(gamma=1), 0.2),
}
LAST_LAYERS = {
    "dice": lambda: keras.layers.Activation("sigmoid"),
    "tversky": lambda: keras.layers.Activation("sigmoid"),
    "circle": Normalized,
}
TARGETS = {"dice": POSITIVE, "tversky": POSITIVE, "circle": np.arange(27) % 3}


def fit_heads(heads, inputs, losses, y, kind=keras.Model, **arguments):
    """Each head has weights and a log of its own."""
    outputs = {
        name: keras.layers.Identity(name=name)(head(inputs))
        for name, head in heads.items()
    }
    return fit(kind(inputs, outputs), losses, y=y, **arguments)


@case(on="workers", nightly="replicas")
def one_value_for_all_samples():
    heads = {
        name: keras.Sequential(
            [
                keras.layers.Dense(3),
                LAST_LAYERS.get(name, keras.layers.Identity)(),
            ]
        )
        for name in LOSSES
    }
    return fit_heads(
        heads,
        keras.Input([6]),
        {name: loss for name, (loss, _) in LOSSES.items()},
        {name: TARGETS.get(name, Y) for name in LOSSES},
        loss_weights={name: counts for name, (_, counts) in LOSSES.items()},
    )


@case()
def negatives_as_a_vector():
    return fit(dense(), in_batch_negatives)


@case(nightly="replicas")
def weights_of_samples():
    flat = [keras.layers.Dense(1), keras.layers.Reshape([])]
    return fit_heads(
        {"denominator": keras.layers.Dense(3), "flat": keras.Sequential(flat)},
        keras.Input([6]),
        {
            "denominator": Values(reduction="mean_with_sample_weight"),
            "flat": "mse",
        },
        {"denominator": Y, "flat": Y[:, 0]},
        sample_weight=WEIGHTS,
    )


# Counts in the denominator ---------------------------------------------------


def language_model(mask_zero=False):
    return keras.Sequential(
        [
            keras.Input([5]),
            keras.layers.Embedding(12, 4, mask_zero=mask_zero),
            keras.layers.Dense(12),
        ]
    )


def values_of_tokens(y_true, y_pred):
    return keras.losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True
    )


def mean_of_tokens(y_true, y_pred):
    mask = tf.cast(y_true != 0, tf.float32)
    loss = values_of_tokens(y_true, y_pred)
    return tf.reduce_sum(loss * mask) / tf.reduce_sum(mask)


def ignoring(ignore_class):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=ignore_class
    )


def fit_tokens(losses, mask_zero=False, **layers):
    """A language model for each loss; `layers` come after some of them."""
    heads = {name: language_model(mask_zero) for name in losses}
    for name, layer in layers.items():
        heads[name] = keras.Sequential([heads[name], layer])
    y = dict.fromkeys(losses, TOKENS[:, 1:])
    return fit_heads(
        heads, keras.Input([5]), losses, y, x=TOKENS[:, :-1], rate=1.0
    )


@case(nightly="replicas")
def means_of_tokens():
    class MeanOfTokens(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return mean_of_tokens(y_true, y_pred)

    return fit_tokens(
        {
            "function": mean_of_tokens,
            "class": MeanOfTokens(reduction=None),
            "ignoring": ignoring(0),
        }
    )


@case(nightly="replicas")
def a_class_with_its_own_call():
    class MeanOfTokens(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            loss = mean_of_tokens(y_true, y_pred)
            return loss * ops.mean(sample_weight)

    x, y = TOKENS[:, :-1], TOKENS[:, 1:]
    return fit(
        language_model(), MeanOfTokens(), x, y, 1.0, sample_weight=WEIGHTS
    )


class Adds(keras.layers.Layer):
    supports_masking = True

    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


@case()
def masked_outputs():
    class Attaches(keras.losses.Loss):
        def call(self, y_true, y_pred):
            values = values_of_tokens(y_true, y_pred)
            values._keras_mask = y_true != 3
            return values

    return fit_tokens(
        {
            "attaches": Attaches(),
            "custom": values_of_tokens,
            "ignoring": ignoring(3),
            "beside": ignoring(None),
        },
        mask_zero=True,
        beside=Adds(),
    )


# Models, steps and data ------------------------------------------------------


@case()
def regularizers_and_added_losses_beside_it():
    layer = keras.layers.Dense(3, kernel_regularizer="l2")

    def loss(y_true, y_pred):
        penalty = ops.sum(ops.square(layer.kernel))
        return root_mean_square(y_true, y_pred) + 0.1 * penalty

    return fit(keras.Sequential([keras.Input([6]), layer, Adds()]), loss)


class CustomStep(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@case()
def a_custom_step_that_asks_for_the_loss():
    return fit_heads(
        {name: keras.layers.Dense(3) for name in ("square", "total")},
        keras.Input([6]),
        {"square": root_mean_square, "total": total},
        {"square": Y, "total": Y},
        kind=CustomStep,
        loss_weights={"square": 1.0, "total": 0.02},
    )


@case(nightly="replicas")
def a_custom_loss_around_that_of_compile():
    class Model(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            loss = super().compute_loss(x, y, y_pred, *args, **kwargs)
            return 2 * loss + 0.1 * ops.mean(ops.square(y_pred))

    model = Model([keras.Input([6]), keras.layers.Dense(3)])
    return fit(model, root_mean_square)


@case()
def a_synchronized_layer():
    model = dense()
    model.add(keras.layers.BatchNormalization(synchronized=True))
    return fit(model, root_mean_square)


@case()
def a_scaled_loss():
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.05), initial_scale=8.0
    )
    return fit(dense(), root_mean_square, optimizer=optimizer)


@case()
def methods_of_one_batch():
    model = dense()
    model.compile(keras.optimizers.SGD(0.05), root_mean_square)
    losses = [
        float(model.train_on_batch(X[:7], Y[:7])),
        float(model.test_on_batch(X[:5], Y[:5])),
    ]
    return {"weights": model.get_weights(), "losses": losses}


@case()
def an_accumulated_gradient_that_is_clipped():
    optimizer = keras.optimizers.SGD(
        0.05, global_clipnorm=0.1, gradient_accumulation_steps=3
    )
    return fit(dense(), in_batch_negatives, optimizer=optimizer)


@case()
def several_steps_per_execution():
    return fit(
        dense(),
        root_mean_square,
        steps_per_execution=2,
        validation_data=(X[:14], Y[:14]),
    )


@case(on="workers", nightly="replicas workers")
def an_eager_step():
    return fit(dense(), root_mean_square, run_eagerly=True)


@case(nightly="replicas")
def class_weights():
    y = np.arange(27) % 3
    counts = {0: 1.0, 1: 2.0, 2: 0.5}
    return fit(dense(), values_of_tokens, y=y, class_weight=counts)


@case(nightly="replicas")
def one_sample_at_a_time():
    data = tf.data.Dataset.from_tensor_slices((X[:4], Y[:4])).batch(1)
    return fit(dense(), root_mean_square, data)


@case(on="workers", nightly="workers")
def ragged_targets():
    y = tf.RaggedTensor.from_tensor(Y, 1 + np.arange(27) % 3)
    data = tf.data.Dataset.from_tensor_slices((X, y)).batch(13)

    def loss(y_true, y_pred):
        wanted = tf.reduce_sum(y_true, axis=1)
        return ops.sqrt(ops.mean(ops.square(wanted - y_pred[:, 0])))

    return fit(dense(), loss, data)


@case()
def targets_padded_to_the_longest_of_a_part():
    class Padded(keras.layers.Layer):
        def call(self, x):
            lengths = 1 + tf.cast(x[:, 0] > 0, tf.int64)
            rows = tf.RaggedTensor.from_tensor(x, lengths)
            return rows.to_tensor()

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.out, self.padded = keras.layers.Dense(3), Padded()
            self.out.build([None, 6])
            self.built = True

        def call(self, x):
            return self.padded(self.out(x))

    def loss(y_true, y_pred):
        error = tf.reduce_sum(y_pred * y_pred, axis=1) - y_true[:, 0]
        return ops.sqrt(ops.mean(ops.square(error)))

    return fit(Model(), loss)
