"""Reductions that a strategy asks for, from inside a step and from outside."""

import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy, BatchAllReduce

pytestmark = pytest.mark.slow

SUM = tf.distribute.ReduceOp.SUM


def with_a_ring(devices):
    return AllReduceStrategy(devices, algorithm="ring")


def stock(devices):
    ops = BatchAllReduce("ring", bytes_per_pack=16)
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=ops)


# Each strategy, number of replicas and mode with each of the others.
@pytest.mark.parametrize(
    ("make", "num_replicas", "in_graph"),
    [
        pytest.param(AllReduceStrategy, 1, True, id="one device"),
        pytest.param(AllReduceStrategy, 2, False, id="eager"),
        pytest.param(AllReduceStrategy, 3, True, id="graph"),
        pytest.param(with_a_ring, 3, False, id="ring, eager"),
        pytest.param(with_a_ring, 2, True, id="ring, graph"),
        pytest.param(stock, 2, False, id="stock, eager"),
        pytest.param(stock, 3, True, id="stock, graph"),
    ],
)
class TestInsideAStrategy:
    @pytest.fixture
    def strategy(self, make, num_replicas):
        return make(DEVICES[:num_replicas])

    @pytest.fixture
    def run(self, strategy, in_graph):
        """Runs a step on every replica; the results of each."""

        def run(step):
            results = strategy.run(step)
            return tf.nest.map_structure(
                strategy.experimental_local_results, results
            )

        return tf.function(run) if in_graph else run

    def test_a_replica_can_all_reduce_a_structure(self, run, num_replicas):
        def step():
            context = tf.distribute.get_replica_context()
            replica = context.replica_id_in_sync_group + 1
            mine = {
                "a": tf.fill([7], tf.cast(replica, tf.float32)),
                "b": [tf.cast(replica, tf.float32), tf.ones([2, 3])],
            }
            return context.all_reduce(SUM, mine)

        total = {1: 1.0, 2: 3.0, 3: 6.0}[num_replicas]
        results = run(step)
        for replica in range(num_replicas):
            assert results["a"][replica].numpy().tolist() == [total] * 7
            assert results["b"][0][replica].numpy() == total
            assert np.all(results["b"][1][replica].numpy() == num_replicas)

    def test_a_replica_can_take_the_mean(self, run, num_replicas):
        def step():
            context = tf.distribute.get_replica_context()
            mine = tf.cast(context.replica_id_in_sync_group, tf.float32)
            return context.all_reduce("MEAN", mine)

        mean = {1: 0.0, 2: 0.5, 3: 1.0}[num_replicas]
        assert [r.numpy() for r in run(step)] == [mean] * num_replicas

    def test_shapes_may_be_unknown_while_tracing(self, run, num_replicas):
        def step():
            values = tf.range(5.0)
            some = tf.boolean_mask(values, values > 1)
            context = tf.distribute.get_replica_context()
            return context.all_reduce(SUM, [some, values, tf.ones([])])

        some, values, ones = run(step)
        for replica in range(num_replicas):
            n = float(num_replicas)
            assert some[replica].numpy().tolist() == [2 * n, 3 * n, 4 * n]
            assert values[replica].numpy().tolist() == [i * n for i in range(5)]
            assert ones[replica].numpy() == n

    def test_the_caller_of_all_replicas_can_reduce(
        self, strategy, in_graph, num_replicas
    ):
        def reduce():
            value = strategy.run(
                lambda: tf.fill(
                    [2],
                    1.0
                    + tf.cast(
                        tf.distribute.get_replica_context().replica_id_in_sync_group,
                        tf.float32,
                    ),
                )
            )
            return (
                strategy.reduce("SUM", value, axis=None),
                strategy.reduce("SUM", value, axis=0),
                strategy.reduce("MEAN", value, axis=0),
                strategy.extended.reduce_to(SUM, value, DEVICES[0]),
            )

        total, over_all, mean, there = (
            tf.function(reduce) if in_graph else reduce
        )()
        expected = {1: 1.0, 2: 3.0, 3: 6.0}[num_replicas]
        assert total.numpy().tolist() == [expected] * 2
        assert over_all.numpy() == 2 * expected
        assert mean.numpy() == expected / num_replicas
        assert tf.convert_to_tensor(there).numpy().tolist() == [expected] * 2

    def test_the_gradient_of_an_all_reduce_is_an_all_reduce(
        self, run, num_replicas
    ):
        def step():
            x = tf.constant([1.0, 2.0])
            with tf.GradientTape() as tape:
                tape.watch(x)
                context = tf.distribute.get_replica_context()
                y = context.all_reduce(SUM, x) * 3.0
            return tape.gradient(y, x)

        for replica in run(step):
            assert replica.numpy().tolist() == [3.0 * num_replicas] * 2


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_two_int32_values_can_be_reduced_in_one_batch(in_graph):
    strategy = AllReduceStrategy(DEVICES[:2])

    def step():
        context = tf.distribute.get_replica_context()
        return context.all_reduce(SUM, [tf.constant(1), tf.constant([2, 3])])

    def run():
        results = strategy.run(step)
        return [strategy.experimental_local_results(r) for r in results]

    first, second = (tf.function(run) if in_graph else run)()
    assert [replica.numpy() for replica in first] == [2, 2]
    assert [r.numpy().tolist() for r in second] == [[4, 6], [4, 6]]


class TestGather:
    @pytest.mark.parametrize("num_replicas", range(1, 6))
    def test_values_of_unequal_length_are_joined(self, num_replicas):
        strategy = AllReduceStrategy(DEVICES[:num_replicas])
        value = strategy.experimental_distribute_values_from_function(
            lambda context: tf.fill(
                [context.replica_id_in_sync_group + 1],
                context.replica_id_in_sync_group,
            )
        )
        expected = [r for r in range(num_replicas) for _ in range(r + 1)]
        assert strategy.gather(value, axis=0).numpy().tolist() == expected

    def test_along_another_axis(self):
        strategy = AllReduceStrategy(DEVICES[:2])
        value = strategy.experimental_distribute_values_from_function(
            lambda context: tf.fill([2, 1], context.replica_id_in_sync_group)
        )
        assert strategy.gather(value, axis=1).numpy().tolist() == [[0, 1]] * 2

    @pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
    def test_every_replica_can_gather(self, in_graph):
        strategy = AllReduceStrategy(DEVICES[:2])

        def step():
            context = tf.distribute.get_replica_context()
            mine = tf.fill([2], context.replica_id_in_sync_group)
            return context.all_gather(mine, axis=0)

        def run():
            return strategy.experimental_local_results(strategy.run(step))

        for replica in (tf.function(run) if in_graph else run)():
            assert replica.numpy().tolist() == [0, 0, 1, 1]
