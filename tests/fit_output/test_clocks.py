"""Clocks in a step: they look, and change nothing."""

import gc
import math

import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ancestors, ops_of_type
from small_model import custom_step

from keras_allreduce import AllReduceStrategy
from keras_allreduce.fit_output.clocks import ROWS, EagerClocks, GraphClocks
from keras_allreduce.reduce.observe import PackTensors

SUM = tf.distribute.ReduceOp.SUM


def is_clock(op):
    return op.type == "StatefulPartitionedCall" and "now" in str(
        op.get_attr("f").name
    )


class StampedStep:
    """A step with two packs on two replicas, made of the times they exist.

    A gradient is the time it was made, and so is a result: no clock that
    waits for it can show an earlier one. The second pack is made from the
    first one's results.
    """

    def __init__(self):
        self.clocks = None
        self.run = tf.function(self._step)

    def _step(self):
        packs, stamps, before = [], [], []
        for _ in range(2):
            made = [self._stamp(before, device) for device in DEVICES[:2]]
            results = [self._stamp(made, device) for device in DEVICES[:2]]
            packs.append(
                PackTensors([[gradient] for gradient in made], results)
            )
            stamps.append((made, results))
            before = results
        self.clocks = GraphClocks(packs, DEVICES[:2])
        return stamps

    @staticmethod
    def _stamp(after, device):
        with tf.device(device), tf.control_dependencies(after):
            return tf.timestamp()


class TestGraphClocks:
    @pytest.fixture
    def step(self):
        return StampedStep()

    def test_the_first_step_is_left_out(self, step):
        step.run()
        assert step.clocks.read().ready.shape == (0, 2)
        assert step.clocks.steps == 1
        step.run()
        step.run()
        times = step.clocks.read()
        assert times.steps == 3
        assert times.ready.shape == times.done.shape == (2, 2)

    def test_no_time_is_before_the_tensor_was_there(self, step):
        step.run()
        stamps = [step.run() for _ in range(20)]
        times = step.clocks.read()
        for row, packs in enumerate(stamps):
            for pack, (made, results) in enumerate(packs):
                assert times.ready[row, pack] >= np.max(made)
                assert times.done[row, pack] >= np.max(results)

    def test_a_pack_is_ready_before_it_is_done(self):
        clocks = []

        @tf.function
        def step(x):
            result = x
            for _ in range(8):
                result = tf.matmul(result, x)
            clocks.append(
                GraphClocks([PackTensors([[x]], [result])], ["/cpu:0"])
            )
            return result

        for _ in range(9):
            step(tf.eye(500))
        times = clocks[0].read()
        # In most steps: a clock may have to wait for a free core.
        assert np.median(times.done - times.ready) > 0

    def test_all_times_lie_within_the_run(self, step):
        step.run()
        before = tf.timestamp().numpy()
        for _ in range(5):
            step.run()
        after = tf.timestamp().numpy()
        times = step.clocks.read()
        for some in (times.ready, times.done):
            assert np.all(some >= before)
            assert np.all(some <= after)

    def test_steps_come_oldest_first_and_only_those_asked_for(self, step):
        for _ in range(6):
            step.run()
        everything = step.clocks.read()
        assert np.all(np.diff(everything.done, axis=0) > 0)
        latest = step.clocks.read(since=4)
        np.testing.assert_array_equal(latest.done, everything.done[-2:])
        assert step.clocks.read(since=6).ready.shape == (0, 2)

    def test_the_oldest_steps_are_forgotten(self, step):
        for _ in range(ROWS):
            step.run()
        assert step.clocks.read().ready.shape == (ROWS - 1, 2)
        third = step.clocks.read().done[1]
        for _ in range(2):
            step.run()
        times = step.clocks.read()
        assert times.steps == ROWS + 2
        assert times.ready.shape == (ROWS, 2)
        np.testing.assert_array_equal(times.done[0], third)
        assert np.all(np.diff(times.done, axis=0) > 0)
        assert step.clocks.read(since=ROWS).ready.shape == (2, 2)

    def test_clocks_live_as_long_as_their_step(self):
        step = StampedStep()
        run = step.run
        run()
        step.clocks = None
        gc.collect()
        run()

    def test_a_gpu_is_timed_on_its_host(self):
        devices = ["/device:GPU:0", "/device:GPU:1"]

        @tf.function
        def step(tensor):
            GraphClocks(
                [PackTensors([[tensor], [tensor]], [tensor] * 2)], devices
            )

        graph = step.get_concrete_function(tf.TensorSpec([2])).graph
        clocks = [op for op in graph.get_operations() if is_clock(op)]
        assert [op.device[-5:] for op in clocks] == ["CPU:0"] * 4


class TestEagerClocks:
    def test_the_oldest_steps_are_forgotten(self):
        clocks = EagerClocks(num_packs=1)
        for step in range(ROWS + 3):
            clocks.add(float(step), step + 0.5)
        times = clocks.read()
        assert times.steps == ROWS + 3
        assert times.ready.shape == (ROWS, 1)
        assert times.ready[0, 0] == 3.0
        assert clocks.read(since=ROWS + 2).ready.tolist() == [[ROWS + 2.0]]


@pytest.fixture(scope="module")
def graph():
    """Of a training step in which every gradient is a pack of its own."""
    strategy = AllReduceStrategy(DEVICES[:2], bytes_per_pack=1)
    run = tf.function(custom_step(strategy))
    return run.get_concrete_function().graph


@pytest.fixture(scope="module")
def clocks(graph):
    return [op for op in graph.get_operations() if is_clock(op)]


class TestInTheTrainingStep:
    def test_a_pack_is_ready_before_its_sum_and_done_after(self, graph, clocks):
        sums = set(ops_of_type(graph, "AddN"))
        waits_for = [len(ancestors(clock) & sums) for clock in clocks]
        assert sorted(waits_for) == [0] * 6 + [1] * 6

    def test_no_clock_waits_for_another(self, clocks):
        for clock in clocks:
            assert not ancestors(clock) & set(clocks)

    def test_no_sum_waits_for_a_clock(self, graph, clocks):
        sums = ops_of_type(graph, "AddN")
        assert len(sums) == 3
        for total in sums:
            assert not ancestors(total) & set(clocks)

    def test_no_update_waits_for_a_clock(self, graph, clocks):
        updates = ops_of_type(graph, "AssignSubVariableOp")
        assert len(updates) == 3 * 2
        for update in updates:
            assert not ancestors(update) & set(clocks)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
class TestAllReduceStats:
    def run(self, strategy, in_graph):
        run = custom_step(strategy)
        return tf.function(run) if in_graph else run

    def test_every_step_is_reported_once(self, in_graph):
        strategy = AllReduceStrategy(DEVICES[:2], bytes_per_pack=64)
        assert strategy.all_reduce_stats() is None
        run = self.run(strategy, in_graph)
        run()
        assert strategy.all_reduce_stats() is None  # It was the first.
        for steps in (3, 1):
            for _ in range(steps):
                run()
            stats = strategy.all_reduce_stats()
            assert stats.steps == steps
            assert stats.num_packs == 3
            assert stats.nbytes == 3 * 64
            assert stats.num_replicas == 2
            assert 0 <= stats.exposed_ms <= stats.all_reduce_ms
        assert strategy.all_reduce_stats() is None

    def test_one_device_has_nothing_to_report(self, in_graph):
        strategy = AllReduceStrategy(DEVICES[:1])
        run = self.run(strategy, in_graph)
        for _ in range(3):
            run()
        assert strategy.all_reduce_stats() is None

    def test_a_step_that_is_gone_is_not_reported(self, in_graph):
        strategy = AllReduceStrategy(DEVICES[:2])
        run = self.run(strategy, in_graph)
        for _ in range(3):
            run()
        assert strategy.all_reduce_stats().steps == 2
        del run
        gc.collect()
        assert strategy.all_reduce_stats() is None

    def test_two_strategies_report_for_themselves(self, in_graph):
        strategies = [AllReduceStrategy(DEVICES[:n]) for n in (2, 3)]
        runs = [self.run(strategy, in_graph) for strategy in strategies]
        for _ in range(3):
            for run in runs:
                run()
        for strategy, num_replicas in zip(strategies, (2, 3), strict=True):
            stats = strategy.all_reduce_stats()
            assert (stats.steps, stats.num_replicas) == (2, num_replicas)


def test_the_bytes_of_sparse_gradients_are_not_guessed():
    strategy = AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        table = tf.Variable(tf.ones([5, 2]))

    @tf.function
    def run():
        def step():
            with tf.GradientTape() as tape:
                y = tf.reduce_sum(tf.gather(table, [0, 0, 3]))
            gradient = tape.gradient(y, table)
            context = tf.distribute.get_replica_context()
            return context.all_reduce(SUM, gradient)

        return strategy.experimental_local_results(strategy.run(step).values)

    for _ in range(3):
        run()
    stats = strategy.all_reduce_stats()
    assert (stats.steps, stats.num_packs, stats.nbytes) == (2, 1, None)
    assert math.isnan(stats.all_reduce_gbps)
