"""Programs about layers, and the inputs that they take."""

import keras
import numpy as np
import tensorflow as tf

from programs.data import (
    IMAGES,
    SIZE,
    TOKENS,
    X,
    Y,
    dataset,
    dense,
    fit,
    of_tokens,
    sgd,
)
from programs.table import program


@program(
    feature="Last batch smaller than the replicas, convolution and max pooling",
)
def last_batch_of_one_image():
    layers = [
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input([8, 8, 3]), *layers])
    return fit(model, IMAGES, Y, optimizer=sgd(0.01), samples=25, batch_size=12)


@program(on="threads workers devices", feature="`Embedding`", fast=True)
def embedding():
    model = of_tokens(keras.layers.GlobalAveragePooling1D())
    return fit(model, TOKENS)


@program(feature="`LSTM`, masked")
def lstm():
    return fit(of_tokens(keras.layers.LSTM(4), mask_zero=True), TOKENS)


def synchronized(samples):
    layer = keras.layers.BatchNormalization(synchronized=True)
    return fit(dense(layer), samples=samples, batch_size=24)


@program(
    on="threads devices mpi",
    nightly="mpi",
    fast=True,
    feature="Last batch uneven, `BatchNormalization(synchronized=True)`",
)
def synchronized_batch_normalization():
    return synchronized(37)


@program(
    on="workers",
    feature="Last batch smaller than the replicas, "
    "`BatchNormalization(synchronized=True)`",
)
def synchronized_batch_normalization_of_one_sample():
    return synchronized(25)


@program(replicas=(), on="workers devices mpi", is_like_one=False)
def batch_normalization():
    """The first layer, so that its statistics are those of the samples."""
    first = keras.layers.BatchNormalization(momentum=0.5)
    frozen = keras.layers.BatchNormalization(trainable=False)
    model = keras.Sequential(
        [keras.Input([6]), first, frozen, keras.layers.Dense(1)]
    )
    found = fit(
        model, samples=33, batch_size=32, validation_data=(X[:66], Y[:66])
    )
    return {
        **found,
        "moving_mean": first.moving_mean,
        "moving_variance": first.moving_variance,
    }


@program(replicas=(), on="workers", is_like_one=False)
def dropout():
    """A number of each step's mask, as this worker draws it."""
    masks = []

    class Note(keras.layers.Layer):
        def call(self, x):
            number = tf.reduce_sum(x * np.arange(20, dtype="float32") ** 2)
            tf.py_function(lambda n: masks.append(float(n)), [number], [])
            return x

    model = keras.Sequential([keras.layers.Dropout(0.5), Note()])
    model.compile("sgd", "mse")
    ones = np.ones((32, 20), "float32")
    model.fit(ones, ones, batch_size=8, verbose=0)
    return {"masks": masks}


@program(nightly="replicas")
def frozen_layer():
    return fit(dense(keras.layers.Dense(4, trainable=False)))


@program
def gradient_that_does_not_exist():
    inputs = keras.Input([6])
    used = keras.layers.Dense(1)(inputs)
    unused = keras.layers.Dense(1)(inputs)
    model = keras.Model(inputs, used + 0 * keras.ops.stop_gradient(unused))
    return fit(model)


@program(feature="LoRA", nightly="replicas")
def lora():
    model = dense()
    model.layers[0].enable_lora(2)
    return fit(model)


class Compiled(keras.layers.Layer):
    """XLA compiles what each replica does in it."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(8, "tanh")

    def build(self, shape):
        self.dense.build(shape)

    @tf.function(jit_compile=True)
    def call(self, x):
        return self.dense(x)


@program(nightly="replicas")
def layer_that_xla_compiles():
    model = keras.Sequential(
        [keras.Input([6]), Compiled(), keras.layers.Dense(1)]
    )
    return fit(model)


# Inputs -----------------------------------------------------------------------


@program
def nested_inputs():
    a, b, c = inputs = [keras.Input([2], name=name) for name in "abc"]
    joined = keras.layers.Concatenate()([a, b, c])
    model = keras.Model(
        {"a": inputs[0], "rest": inputs[1:]}, keras.layers.Dense(1)(joined)
    )
    return fit(model, {"a": X[:, :2], "rest": [X[:, 2:4], X[:, 4:]]})


@program(on="workers", feature="String inputs", nightly="replicas workers")
def text_inputs():
    words = np.array(["a b", "b c", "c a a", "d", "a d b", "c"] * 12)
    vectorize = keras.layers.TextVectorization(output_sequence_length=4)
    vectorize.set_vocabulary(["a", "b", "c", "d"])
    layers = [
        vectorize,
        keras.layers.Embedding(10, 3),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input([], dtype="string"), *layers])
    return fit(model, dataset(words[: SIZE.samples]))


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


@program(feature="Ragged inputs")
def ragged_inputs():
    inputs = keras.Input([None], ragged=True, dtype="int32")
    model = keras.Sequential([inputs, SumOfRow(), keras.layers.Dense(1)])
    rows = tf.ragged.constant([[1, 2], [3], [4, 5, 6], [7]] * 18)
    # At a higher rate the weights diverge, and with them what is rounded.
    return fit(model, dataset(rows[: SIZE.samples]), optimizer=sgd(0.001))


@program(feature="Sparse inputs")
def sparse_inputs():
    inputs = keras.Input([6], sparse=True)
    model = keras.Sequential([inputs, keras.layers.Dense(1)])
    rows = (X[: SIZE.samples] > 0.7).astype("float32")
    return fit(model, dataset(tf.sparse.from_dense(rows)))
