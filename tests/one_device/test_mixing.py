"""Forward passes that mix the samples of a batch are found in the graph."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from keras import layers, ops

from keras_allreduce import AllReduceStrategy
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import mixing

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6)).astype("float32")
Y = RNG.normal(size=(16, 1)).astype("float32")


def layer_of(function, name):
    class Custom(layers.Layer):
        def call(self, x):
            return function(x)

    return Custom(name=name)


def normalized(x):
    return (x - ops.mean(x, 0)) / ops.sqrt(ops.var(x, 0) + 1e-3)


def standard_deviation(x):
    feature = ops.mean(ops.std(x, 0))
    return ops.concatenate([x, ops.ones_like(x[:, :1]) * feature], 1)


def compared(x):
    return ops.softmax(ops.matmul(x, ops.transpose(x)))


def products(x):
    return ops.sigmoid(ops.tensordot(x, x, 2) + ops.sum(x, 1, keepdims=True))


MIXING = [normalized, standard_deviation, products]


def found_in(model, *shape, dtype="float32"):
    """What is found in a model: a layer and an op, or `None`."""
    given = {}

    @tf.function(autograph=False)
    def call(x):
        given["x"] = x
        return model(x, training=True)

    traced = call.get_concrete_function(tf.TensorSpec([None, *shape], dtype))
    outputs = [each.op.inputs[0] for each in traced.outputs]
    op = mixing.find(
        [given["x"]],
        outputs,
        lambda name: keras_compat.is_keras_layer(
            keras_compat.innermost_layer(model, name)
        ),
    )
    return op and (keras_compat.innermost_layer(model, op).name, op)


def sequential(*parts):
    return keras.Sequential([keras.Input([6]), layers.Dense(4), *parts])


@pytest.mark.parametrize("function", [*MIXING, compared])
def test_the_layer_that_mixes_samples_is_named(function):
    model = sequential(layer_of(function, "mixes"))
    layer, op = found_in(model, 6)
    assert layer == "mixes"
    # TensorFlow numbers a scope that there is already.
    assert op.split("/")[1].startswith("mixes")


def test_a_model_that_mixes_samples_in_its_call_is_named():
    class Dot(keras.Model):
        def __init__(self):
            super().__init__(name="dot")
            self.dense = layers.Dense(3)

        def call(self, x):
            return products(self.dense(x))

    assert found_in(Dot(), 6)[0] == "dot"


def test_ops_of_a_functional_model_are_read():
    inputs = keras.Input([6])
    hidden = layers.Dense(3)(inputs)
    outputs = hidden - ops.mean(hidden, axis=0)
    model = keras.Model(inputs, outputs, name="functional_of_ops")
    assert keras_compat.has_custom_forward_pass(model)
    assert found_in(model, 6)[0] == "functional_of_ops"


def of_layers(x):
    mean = ops.mean(x, axis=-1, keepdims=True)
    return (x - mean) / ops.sqrt(ops.var(x, axis=-1, keepdims=True) + 1e-3)


def branches(x):
    stacked = ops.stack([x, 2 * x, ops.relu(x)])
    return ops.mean(stacked, axis=0)


def longest(x):
    lengths = tf.cast(tf.reduce_sum(tf.cast(x > 0, tf.int32), 1), tf.int32)
    width = tf.reduce_max(lengths)
    return x / (1.0 + tf.cast(width, tf.float32) * 0.0) + tf.cast(
        lengths[:, tf.newaxis], tf.float32
    )


class Attends(layers.Layer):
    """Attention over the features of each sample."""

    def call(self, x):
        parts = ops.reshape(x, [-1, 2, 2])
        scores = ops.matmul(parts, ops.transpose(parts, [0, 2, 1]))
        return ops.reshape(ops.matmul(ops.softmax(scores), parts), [-1, 4])


class AddsALoss(layers.Layer):
    """A mean over samples that no output depends on."""

    def call(self, x):
        self.add_loss(ops.mean(ops.square(x - ops.mean(x, 0))))
        return x


class OwnNormalization(layers.BatchNormalization):
    """Normalizes as Keras does, which is documented."""


class Block(layers.Layer):
    """Keras's layers inside a custom one."""

    def __init__(self):
        super().__init__()
        self.parts = [
            layers.Dense(4, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.GroupNormalization(2),
            layers.UnitNormalization(),
        ]

    def call(self, x):
        for part in self.parts:
            x = x + part(x)
        return x


class Recurrent(layers.Layer):
    def __init__(self):
        super().__init__()
        self.cells = layers.LSTM(3, return_sequences=True)
        self.attention = layers.MultiHeadAttention(2, 2)

    def call(self, x):
        steps = self.cells(ops.reshape(x, [-1, 2, 2]))
        return ops.mean(self.attention(steps, steps), axis=1)


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(of_layers, "of_layers"),
        layer_of(branches, "branches"),
        layer_of(longest, "longest"),
        Attends(),
        AddsALoss(),
        OwnNormalization(),
        Block(),
        Recurrent(),
    ],
    ids=lambda layer: layer.name,
)
def test_what_keeps_samples_apart_is_not_warned_about(layer):
    assert found_in(sequential(layer, layers.Dense(2)), 6) is None


def test_words_and_images_are_not_warned_about():
    class Words(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(20, 4, mask_zero=True)
            self.dense = layers.Dense(3)

        def call(self, x):
            mask = tf.cast(x != 0, tf.float32)[:, :, tf.newaxis]
            total = tf.reduce_sum(self.table(x) * mask, axis=1)
            return self.dense(total / tf.reduce_sum(mask, axis=1))

    class Images(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Conv2D(4, 3), layers.BatchNormalization()]
            self.dense = layers.Dense(3)

        def call(self, x):
            for part in self.parts:
                x = tf.nn.relu(part(x))
            return self.dense(tf.reduce_mean(x, axis=[1, 2]))

    assert found_in(Words(), 5, dtype="int32") is None
    assert found_in(Images(), 8, 8, 3) is None


def test_models_of_keras_layers_are_not_read():
    assert not keras_compat.has_custom_forward_pass(
        sequential(layers.BatchNormalization(), layers.LayerNormalization())
    )
    for custom in (layers.Lambda(lambda x: x), Block()):
        assert keras_compat.has_custom_forward_pass(sequential(custom))


def warned_of(make_layer, **options):
    with AllReduceStrategy(DEVICES[:2], **options).scope():
        model = sequential(make_layer(), layers.Dense(1))
        model.compile(keras.optimizers.SGD(0.01), "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    return [
        str(each.message)
        for each in caught
        if issubclass(each.category, UserWarning)
    ]


class Synchronizes(layers.Layer):
    """The mean of all replicas, as on one device."""

    def call(self, x):
        context = tf.distribute.get_replica_context()
        if context is None:  # Keras asks for the shape.
            return x
        return x - ops.mean(context.all_gather(x, axis=0), axis=0)


@pytest.mark.slow
def test_a_step_warns_once_and_says_what_to_write():
    def mixes():
        return layer_of(normalized, "mixes")

    (warning,) = warned_of(mixes)
    assert "layer 'mixes' (Custom) mixes the samples" in warning
    assert "all_gather(x, axis=0)" in warning
    assert not warned_of(mixes, weigh_samples=True)
    assert not warned_of(Synchronizes)
    assert not warned_of(Block)
