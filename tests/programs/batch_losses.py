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


def dense(activation=None):
    layer = keras.layers.Dense(3, activation)
    return keras.Sequential([keras.Input([6]), layer])


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


@case(on="workers")
def a_root_mean_square():
    return fit(dense(), root_mean_square)


@case()
def a_sum():
    return fit(dense(), lambda y, p: ops.sum(ops.square(y - p)), rate=0.01)


@case(on="workers")
def negatives_as_a_vector():
    return fit(dense(), in_batch_negatives)


@case()
def a_loss_that_is_not_reduced():
    class Negatives(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return in_batch_negatives(y_true, y_pred)

    return fit(dense(), Negatives(reduction=None), rate=0.005)


@case()
def dice():
    return fit(dense("sigmoid"), "dice", y=POSITIVE)


@case()
def tversky_over_the_samples():
    loss = keras.losses.Tversky(axis=(0,))
    return fit(dense("sigmoid"), loss, y=POSITIVE)


@case()
def circle():
    class Normalized(keras.layers.Layer):
        def call(self, x):
            return ops.normalize(x, axis=-1)

    model = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(3), Normalized()]
    )
    y = np.arange(27) % 3
    return fit(model, keras.losses.Circle(gamma=1), y=y, rate=0.01)


@case()
def cosine_similarity_along_the_samples():
    return fit(dense(), keras.losses.CosineSimilarity(axis=0))


@case()
def outputs_without_a_second_dimension():
    model = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(1), keras.layers.Reshape([])]
    )
    return fit(model, "mse", y=Y[:, 0], sample_weight=WEIGHTS)


# Counts in the denominator ---------------------------------------------------


def language_model(mask_zero=False):
    return keras.Sequential(
        [
            keras.Input([5]),
            keras.layers.Embedding(12, 4, mask_zero=mask_zero),
            keras.layers.Dense(12),
        ]
    )


def mean_of_tokens(y_true, y_pred):
    mask = tf.cast(y_true != 0, tf.float32)
    loss = keras.losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True
    )
    return tf.reduce_sum(loss * mask) / tf.reduce_sum(mask)


def fit_tokens(loss, model=None, **arguments):
    x, y = TOKENS[:, :-1], TOKENS[:, 1:]
    return fit(model or language_model(), loss, x, y, 1.0, **arguments)


@case()
def a_mean_of_tokens():
    return fit_tokens(mean_of_tokens)


@case()
def a_class_that_takes_the_mean_of_tokens():
    class MeanOfTokens(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return mean_of_tokens(y_true, y_pred)

    return fit_tokens(MeanOfTokens(reduction=None))


@case()
def a_class_with_its_own_call():
    class MeanOfTokens(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            loss = mean_of_tokens(y_true, y_pred)
            return loss * ops.mean(sample_weight)

    return fit_tokens(MeanOfTokens(), sample_weight=WEIGHTS)


@case()
def a_loss_that_attaches_a_mask_to_its_values():
    class Attaches(keras.losses.Loss):
        def call(self, y_true, y_pred):
            values = keras.losses.sparse_categorical_crossentropy(
                y_true, y_pred, from_logits=True
            )
            values._keras_mask = y_true != 3
            return values

    return fit_tokens(Attaches(), language_model(mask_zero=True))


@case(on="workers")
def a_custom_loss_of_masked_outputs():
    def values(y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )

    return fit_tokens(values, language_model(mask_zero=True))


@case()
def weights_in_the_denominator():
    class Values(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return ops.mean(ops.square(y_true - y_pred), axis=-1)

    loss = Values(reduction="mean_with_sample_weight")
    return fit(dense(), loss, sample_weight=WEIGHTS)


# Models, steps and data ------------------------------------------------------


@case(on="workers")
def a_loss_for_each_output():
    inputs = keras.Input([6])
    outputs = {name: keras.layers.Dense(3, name=name)(inputs) for name in "abc"}
    model = keras.Model(inputs, outputs)
    losses = {"a": root_mean_square, "b": "mse", "c": in_batch_negatives}
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    y = {"a": Y, "b": -Y, "c": Y}
    return fit(model, losses, y=y, loss_weights=weights)


@case()
def a_regularizer_and_an_added_loss_beside_it():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(ops.mean(ops.square(x)))
            return x

    layer = keras.layers.Dense(3, kernel_regularizer="l2")
    model = keras.Sequential([keras.Input([6]), layer, Adds()])
    return fit(model, root_mean_square)


@case()
def an_added_loss_beside_a_loss_of_masked_values():
    class Adds(keras.layers.Layer):
        supports_masking = True

        def call(self, x):
            self.add_loss(ops.mean(ops.square(x)))
            return x

    model = keras.Sequential([language_model(mask_zero=True), Adds()])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return fit_tokens(loss, model)


@case(on="workers")
def a_class_that_is_ignored():
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=0
    )
    return fit_tokens(loss)


@case()
def a_class_that_is_ignored_in_masked_outputs():
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=3
    )
    return fit_tokens(loss, language_model(mask_zero=True))


@case()
def a_loss_that_uses_a_weight_of_the_model():
    model = dense()

    def loss(y_true, y_pred):
        penalty = ops.sum(ops.square(model.layers[-1].kernel))
        return root_mean_square(y_true, y_pred) + 0.1 * penalty

    return fit(model, loss)


class CustomStep(keras.Sequential):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@case()
def a_custom_step_that_asks_for_the_loss():
    layer = keras.layers.Dense(3, "softmax")
    return fit(CustomStep([keras.Input([6]), layer]), root_mean_square)


@case()
def a_custom_step_that_asks_for_a_sum():
    model = CustomStep([keras.Input([6]), keras.layers.Dense(3)])
    return fit(model, lambda y, p: ops.sum(ops.square(y - p)), rate=0.01)


@case()
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
def a_loss_in_float64():
    class Negatives(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return in_batch_negatives(y_true, y_pred)

    return fit(dense(), Negatives(dtype="float64"))


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


@case(on="workers")
def several_steps_per_execution():
    return fit(dense(), root_mean_square, steps_per_execution=2)


@case(on="workers")
def an_eager_step():
    return fit(dense(), root_mean_square, run_eagerly=True)


@case()
def validation_data():
    return fit(dense(), root_mean_square, validation_data=(X[:14], Y[:14]))


@case()
def class_weights():
    y = np.arange(27) % 3

    def loss(y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )

    return fit(dense(), loss, y=y, class_weight={0: 1.0, 1: 2.0, 2: 0.5})


@case()
def one_sample_at_a_time():
    data = tf.data.Dataset.from_tensor_slices((X[:4], Y[:4])).batch(1)
    return fit(dense(), root_mean_square, data)


@case(on="workers")
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
