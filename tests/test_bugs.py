"""Regressions: each test says what once went wrong.

A bug's test stands here if nobody would think of the case without the story;
cases that belong to a module's own rules stand with the module.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ops_of_type

import keras_allreduce
from keras_allreduce import BatchAllReduce
from keras_allreduce.compat import distribute

pytestmark = pytest.mark.slow

GPUS = ["/device:GPU:0", "/device:GPU:1"]


def test_a_rare_dtype_is_launched_when_it_is_ready():
    """Buckets that never filled up were closed in the order they were opened.

    With one float16 gradient in the middle of a float32 model, the float32
    bucket (opened by the last layer, complete with the first) was planned
    before it. NCCL launches packs in the order of the plan, so the float16
    pack, ready long before, waited for the end of backprop.
    """
    dtypes = [tf.float32, tf.float16, tf.float32]
    with tf.Graph().as_default() as graph:
        gradients = []
        for dtype in dtypes:
            replicas = []
            for device in GPUS:
                with tf.device(device):
                    replicas.append(tf.compat.v1.placeholder(dtype, [2]))
            gradients.append(distribute.PerReplica(tuple(replicas)))
        BatchAllReduce("nccl").batch_reduce(
            tf.distribute.ReduceOp.SUM, [(g, g) for g in gradients]
        )
    launched = [
        op.inputs[0].dtype for op in ops_of_type(graph, "NcclAllReduce")
    ]
    assert launched == [tf.float16, tf.float16, tf.float32, tf.float32]


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
