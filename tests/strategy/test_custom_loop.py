"""Custom training loops, as in TensorFlow's guide to MirroredStrategy."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=[16, 3]).astype("float32")
Y = X.sum(axis=1, keepdims=True)
BATCH_SIZE = 8


def stock():
    return tf.distribute.MirroredStrategy(
        DEVICES[:2], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def ours():
    return AllReduceStrategy(DEVICES[:2])


def from_dataset(strategy):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH_SIZE)
    return strategy.experimental_distribute_dataset(data)


def from_function(strategy):
    def shard(context):
        size = context.get_per_replica_batch_size(BATCH_SIZE)
        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(size)

    return strategy.distribute_datasets_from_function(shard)


def train(strategy, distribute, in_graph):
    """Two epochs; the loss of each step and the weights after all."""
    keras.utils.set_random_seed(4)
    data = distribute(strategy)
    with strategy.scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        loss_of = keras.losses.MeanSquaredError(reduction=None)
        seen = keras.metrics.Mean()

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.nn.compute_average_loss(
                loss_of(y, model(x, training=True)),
                global_batch_size=BATCH_SIZE,
            )
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        seen.update_state(loss)
        return loss

    def run(batch):
        losses = strategy.run(step, args=(batch,))
        return strategy.reduce("SUM", losses, axis=None)

    run = tf.function(run) if in_graph else run
    losses = [float(run(batch)) for _ in range(2) for batch in data]
    return losses, model.get_weights(), float(seen.result())


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "distribute", [from_dataset, from_function], ids=lambda f: f.__name__
)
def test_a_custom_loop_gives_the_bits_of_stock(distribute, in_graph):
    losses, weights, seen = train(ours(), distribute, in_graph)
    expected = train(stock(), distribute, in_graph)
    assert losses == expected[0]
    assert losses[-1] < losses[0]
    for got, theirs in zip(weights, expected[1], strict=True):
        np.testing.assert_array_equal(got, theirs)
    assert seen == expected[2]


AGGREGATIONS = {
    "SUM": (tf.VariableAggregation.SUM, 3.0),
    "MEAN": (tf.VariableAggregation.MEAN, 1.5),
    "first": (tf.VariableAggregation.ONLY_FIRST_REPLICA, 1.0),
}


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("aggregation", "expected"), AGGREGATIONS.values(), ids=AGGREGATIONS.keys()
)
def test_a_variable_is_aggregated_when_replicas_assign(
    aggregation, expected, in_graph
):
    strategy = ours()
    with strategy.scope():
        variable = tf.Variable(0.0, aggregation=aggregation)

    def run():
        def step():
            context = tf.distribute.get_replica_context()
            replica = tf.cast(context.replica_id_in_sync_group, tf.float32)
            variable.assign(replica + 1)

        strategy.run(step)

    (tf.function(run) if in_graph else run)()
    assert [copy.numpy() for copy in variable.values] == [expected] * 2


def outside_of_run(strategy, optimizer, in_scope):
    """A step of a loop that knows of no replicas, and the weights after it."""
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        optimizer = optimizer()
    scope = strategy.scope() if in_scope else contextlib.nullcontext()
    with scope:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones([4, 2])))
        weights = model.trainable_variables
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return weights


@pytest.mark.parametrize("in_scope", [True, False])
def test_a_tape_outside_of_a_replica_is_an_error_that_says_so(in_scope):
    with pytest.raises(
        (ValueError, RuntimeError), match=r"outside of `strategy\.run`"
    ):
        outside_of_run(ours(), keras.optimizers.Adam, in_scope)


def test_an_update_outside_of_the_scope_is_that_of_every_replica():
    found = outside_of_run(ours(), keras.optimizers.SGD, in_scope=False)
    one = tf.distribute.get_strategy()
    wanted = outside_of_run(one, keras.optimizers.SGD, in_scope=False)
    for weight, other in zip(found, wanted, strict=True):
        for part in weight.value.values:
            np.testing.assert_allclose(part, other, rtol=1e-6)
