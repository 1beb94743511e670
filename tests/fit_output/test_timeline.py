"""Steps that really run, written as a timeline and read again."""

import json
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ancestors, ops_of_type
from small_model import X, Y, custom_step, make_model, stock

from keras_allreduce import AllReduceStrategy, AllReduceTimeline

pytestmark = pytest.mark.slow


def read(path):
    return json.loads(path.read_text())["traceEvents"]


def named(events, tid, pid=0):
    return [
        event
        for event in events
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (pid, tid)
    ]


def fit(model, timeline, **arguments):
    """Three epochs of six steps."""
    arguments = {"batch_size": 4, "epochs": 3, "verbose": 0} | arguments
    model.fit(X, Y, callbacks=[timeline], **arguments)


@pytest.fixture(scope="module")
def strategy():
    return AllReduceStrategy(DEVICES[:2], bytes_per_pack=1)


@pytest.fixture(scope="module")
def events(strategy, tmp_path_factory):
    """Of two epochs' last and first steps."""
    path = tmp_path_factory.mktemp("timeline") / "timeline.json"
    fit(make_model(strategy), AllReduceTimeline(path, steps=(4, 8)))
    return read(path)


class TestInFit:
    def test_the_steps_that_were_asked_for_are_there(self, events):
        steps = named(events, 0)
        assert [step["name"] for step in steps] == [
            "step 4",
            "step 5",
            "step 6",
            "step 7",
        ]
        assert [step["args"]["epoch"] for step in steps] == [1, 1, 2, 2]
        (epoch,) = [event for event in events if event["ph"] == "i"]
        assert epoch["name"] == "epoch 2"
        assert epoch["ts"] == steps[2]["ts"]

    @pytest.mark.parametrize("replica", [0, 1])
    def test_every_replica_computes_and_updates_in_each_step(
        self, events, replica
    ):
        row = named(events, 1 + replica)
        for number in range(4, 8):
            mine = [e["name"] for e in row if e["args"]["step"] == number]
            assert mine.count("forward and backprop") == 1
            assert mine.count("update") == 1
            assert mine[-1] == "update"

    def test_every_pack_is_there_with_its_layer(self, events):
        packs = [e for e in events if e["ph"] == "X" and e["tid"] >= 1000]
        assert len(packs) == 4 * 4
        for number in range(4, 8):
            mine = [e["args"] for e in packs if e["args"]["step"] == number]
            names = [name.split("/")[-1] for e in mine for name in e["layers"]]
            assert sorted(names) == ["bias", "bias", "kernel", "kernel"]
            assert sorted(e["bytes"] for e in mine) == [4, 16, 16, 48]

    def test_a_step_of_keras_holds_what_its_replicas_do(self, events):
        for step in named(events, 0):
            begin, end = step["ts"], step["ts"] + step["dur"]
            number = int(step["name"].split()[1])
            inside = [
                e
                for e in events
                if e["ph"] == "X" and e["args"].get("step") == number
            ]
            assert len(inside) >= 2 * 2 + 4
            for event in inside:
                assert begin <= event["ts"]
                # A microsecond: Python's clock and the graph's are rounded.
                assert event["ts"] + event["dur"] <= end + 1

    def test_several_steps_at_once_have_a_number_each(self, strategy, tmp_path):
        model = make_model(strategy, steps_per_execution=3)
        fit(model, AllReduceTimeline(tmp_path / "t.json", steps=(3, 9)))
        events = read(tmp_path / "t.json")
        assert [e["name"] for e in named(events, 0)] == ["step 3", "step 6"]
        updates = [e for e in named(events, 1) if e["name"] == "update"]
        assert [e["args"]["step"] for e in updates] == [3, 4, 5, 6, 7, 8]

    def test_steps_that_run_eagerly_are_there_too(self, strategy, tmp_path):
        model = make_model(strategy, run_eagerly=True)
        fit(model, AllReduceTimeline(tmp_path / "t.json", steps=(2, 4)))
        names = [e["name"] for e in named(read(tmp_path / "t.json"), 1)]
        assert (
            names
            == [
                "forward and backprop",
                "all-reduce, exposed",
                "update",
            ]
            * 2
        )

    def test_a_fit_that_is_shorter_writes_what_there_was(
        self, strategy, tmp_path
    ):
        model = make_model(strategy)
        fit(model, AllReduceTimeline(tmp_path / "t.json"), epochs=2)
        steps = named(read(tmp_path / "t.json"), 0)
        assert [step["name"] for step in steps] == ["step 10", "step 11"]

    def test_training_is_the_same(self, strategy, tmp_path):
        model, other = make_model(strategy), make_model(strategy)
        fit(model, AllReduceTimeline(tmp_path / "t.json"))
        fit(other, keras.callbacks.Callback())
        for mine, theirs in zip(
            model.get_weights(), other.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)

    @pytest.mark.parametrize("steps", [(3, 3), (-1, 2), (0, 1026)])
    def test_bad_steps_are_an_error(self, steps):
        with pytest.raises(ValueError, match=r"must be \(first, end\).*Rec"):
            AllReduceTimeline("t.json", steps)

    def test_under_another_strategy_it_is_an_error(self):
        with pytest.raises(
            ValueError,
            match=r"reports on an AllReduceStrategy\. Received: a model",
        ):
            fit(make_model(stock()), AllReduceTimeline("t.json"))


def custom_loop(strategy):
    return tf.function(custom_step(strategy, num_kernels=2))


class TestInACustomLoop:
    def test_a_step_that_is_traced_in_the_block_has_everything(
        self, strategy, tmp_path
    ):
        step = custom_loop(strategy)
        with strategy.timeline(tmp_path / "t.json"):
            for _ in range(3):
                step()
        step()
        events = read(tmp_path / "t.json")
        assert [e["name"] for e in named(events, 0)] == [
            "step 0",
            "step 1",
            "step 2",
        ]
        updates = [e for e in named(events, 2) if e["name"] == "update"]
        assert len(updates) == 3
        packs = [e for e in events if e["ph"] == "X" and e["tid"] >= 1000]
        # By name: both may be ready in the same moment.
        assert sorted((e["name"], e["args"]["layers"]) for e in packs) == [
            *3 * [("pack 0: gradient 1", ["gradient 1"])],
            *3 * [("pack 1: gradient 0", ["gradient 0"])],
        ]

    def test_a_step_that_was_traced_before_has_its_packs(
        self, strategy, tmp_path
    ):
        step = custom_loop(strategy)
        step()
        with strategy.timeline(tmp_path / "t.json"):
            step()
        events = read(tmp_path / "t.json")
        assert len(named(events, 0)) == 1
        assert not [e for e in named(events, 1) if e["name"] == "update"]
        packs = [e for e in events if e["ph"] == "X" and e["tid"] >= 1000]
        assert len(packs) == 2


@pytest.fixture(scope="module")
def graphs(strategy, tmp_path_factory):
    off = custom_loop(strategy).get_concrete_function().graph
    path = tmp_path_factory.mktemp("timeline") / "t.json"
    with strategy.timeline(path):
        on = custom_loop(strategy).get_concrete_function().graph
    after = custom_loop(strategy).get_concrete_function().graph
    return off, on, after


class TestItsCost:
    """What is traced without a timeline knows nothing of timelines."""

    @staticmethod
    def types(graph):
        return Counter(op.type for op in graph.get_operations())

    def test_without_it_a_step_has_two_clocks_for_each_pack_and_replica(
        self, graphs
    ):
        off, _, after = graphs
        assert len(ops_of_type(off, "StatefulPartitionedCall")) == 2 * 2 * 2
        assert self.types(after) == self.types(off)

    def test_with_it_each_replica_has_three_more_clocks(self, graphs):
        off, on, _ = graphs
        more = self.types(on) - self.types(off)
        assert more == {"StatefulPartitionedCall": 3 * 2}
        assert not self.types(off) - self.types(on)

    def test_no_clock_is_waited_for_by_an_update(self, graphs):
        clocks = set(ops_of_type(graphs[1], "StatefulPartitionedCall"))
        updates = ops_of_type(graphs[1], "AssignSubVariableOp")
        assert len(updates) == 2 * 2
        for update in updates:
            assert not ancestors(update) & clocks

    def test_the_last_clock_waits_for_every_update_of_its_replica(self, graphs):
        clocks = ops_of_type(graphs[1], "StatefulPartitionedCall")
        updates = set(ops_of_type(graphs[1], "AssignSubVariableOp"))
        waits = Counter(len(ancestors(op) & updates) for op in clocks)
        assert waits == {0: 2 * (2 * 2 + 2), 2: 2}

    def test_a_fit_without_it_is_traced_without_it(self, strategy, tmp_path):
        model = make_model(strategy)
        fit(model, AllReduceTimeline(tmp_path / "t.json"), epochs=2)
        assert not strategy.step_log.recorders
        fit(model, keras.callbacks.Callback(), epochs=1)
        *_, step = strategy.step_log.steps(model)
        times = step.clocks().read_replicas()
        assert times.ready.shape == (2, 6, 4)
        assert np.isnan(times.marks).all()
