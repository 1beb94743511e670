"""Each test is a bug that was there once, and why."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import DEVICES

import keras_allreduce


def aligned(shape):
    """An array whose memory TensorFlow takes over without a copy."""
    array = np.zeros([int(np.prod(shape)) + 16], "float32")
    start = (-array.ctypes.data % 64) // 4
    view = array[start : start + int(np.prod(shape))].reshape(shape)
    view[...] = np.random.default_rng(0).normal(size=shape)
    return view


class Views(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 2

    def __getitem__(self, index):
        part = slice(32 * index, 32 * (index + 1))
        return self.x[part], self.y[part]


def generated(x, y):
    views = Views(x, y)
    return tf.data.Dataset.from_generator(
        lambda: (views[index] for index in range(2)),
        output_signature=(
            tf.TensorSpec([None, x.shape[1]]),
            tf.TensorSpec([None, y.shape[1]]),
        ),
    )


@pytest.mark.parametrize("source", [Views, generated])
def test_arrays_of_a_generator_are_not_written_to(source):
    # TensorFlow took the memory of a generator's arrays as its own. Where the
    # batch was split, it wrote y_pred - y over y, and the second epoch
    # trained on that.
    x, y = aligned([64, 16]), aligned([64, 16])
    expected = y.copy()
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([16]),
                keras.layers.Dense(8, "tanh"),
                keras.layers.Dense(16),
            ]
        )
        model.compile("sgd", "mse")
    model.fit(source(x, y), epochs=3, verbose=0, shuffle=False)
    np.testing.assert_array_equal(y, expected)


def test_nothing_flows_back_to_an_empty_replica_through_a_layer():
    # An empty replica runs on a borrowed sample. The gradient of a sum over
    # the replicas reached that sample too, and from it the weights.
    def train(strategy):
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = keras.Sequential(
                [
                    keras.Input([2]),
                    keras.layers.Dense(3),
                    keras.layers.BatchNormalization(synchronized=True),
                    keras.layers.Dense(1),
                ]
            )
            model.compile(keras.optimizers.SGD(0.1), "mse")
        x = np.array([[1, 2], [3, 4]], "float32")
        data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(2)
        model.fit(data, epochs=2, verbose=0)
        return model.get_weights()

    ours = train(keras_allreduce.AllReduceStrategy(DEVICES[:3]))
    alone = train(tf.distribute.get_strategy())
    for got, expected in zip(ours, alone, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
