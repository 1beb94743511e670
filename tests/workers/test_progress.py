"""Two positions prove that workers differ, or nothing."""

import gc
import itertools
import random

import pytest
import tensorflow as tf

from keras_allreduce.workers import progress as module
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.progress import (
    COMPARISON,
    OUTSIDE,
    STEP,
    Progress,
    Snapshot,
    never_meet,
)

TWO_STEPS = (8, 0, 3)


def at(*position, **fields):
    return Snapshot(position, **fields)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        # One more pack here, one more comparison there.
        (at(9, 0, 3, waits_in=STEP), at(8, 0, 4, waits_in=COMPARISON)),
        (at(9, 0, 3, waits_in=STEP), at(8, 1, 3, waits_in=OUTSIDE)),
        (at(8, 1, 3, waits_in=OUTSIDE), at(8, 0, 4, waits_in=COMPARISON)),
        # The same, read when the other still worked.
        (at(9, 0, 3, waits_in=STEP), at(8, 1, 3)),
        # It will not come any more.
        (at(9, 0, 3, waits_in=STEP), at(*TWO_STEPS, ended=True)),
        (at(9, 0, 3, is_ordered=False), at(*TWO_STEPS, ended=True)),
        (at(9, 0, 3), at(9, 0, 3, failure=("WorkerError", "why"))),
    ],
)
def test_a_worker_waits_in_vain_for_one_that_cannot_come(own, other):
    assert never_meet(own, other)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        # A slow link: this one has all of the last sum of the epoch, and asks
        # for the metrics, while the other still receives.
        (at(8, 1, 3, waits_in=OUTSIDE), at(8, 0, 3, waits_in=STEP)),
        (at(8, 0, 3, waits_in=STEP), at(8, 1, 3, waits_in=OUTSIDE)),
        # The other still computes what the last packs wait for.
        (at(8, 0, 3, waits_in=STEP), at(5, 0, 3, waits_in=STEP)),
        (at(8, 0, 4, waits_in=COMPARISON), at(7, 0, 3)),
        # It has ended its script, and what it sent is on its way.
        (at(8, 1, 3, waits_in=OUTSIDE), at(8, 1, 3, ended=True)),
        (at(8, 1, 3, waits_in=OUTSIDE), at(9, 1, 3, ended=True)),
        # Their order is chance.
        (at(9, 0, 3, is_ordered=False), at(8, 0, 4)),
        (at(9, 0, 3), at(8, 0, 4, is_ordered=False)),
    ],
)
def test_a_worker_waits_for_one_that_can_still_come(own, other):
    assert not never_meet(own, other)


def positions(script, seed):
    """All positions of a worker that runs a script, in this order.

    Args:
        script: Letters: `e`, `p`, or a digit: a step of so many packs.
        seed: The worker may be read in the middle of a step, too.
    """
    chance = random.Random(seed)
    graph = eager = points = 0
    yield 0, 0, 0
    for letter in script:
        if letter.isdigit():
            for _ in range(int(letter)):
                graph += 1
                if chance.random() < 0.5:
                    yield graph, eager, points
        eager += letter == "e"
        points += letter == "p"
        yield graph, eager, points


def test_no_two_positions_of_right_runs_differ_however_late_they_are_read():
    script = "p3e3ep22pe4"
    for seed in range(20):
        one, other = positions(script, seed), positions(script, -seed)
        for own, theirs in itertools.product(list(one), list(other)):
            assert not never_meet(at(*own, waits_in=STEP), at(*theirs))


@pytest.mark.parametrize(
    ("of_one", "of_other"),
    [("p33e", "p3e"), ("p3p", "p3e"), ("pe3", "p3"), ("p3", "pp3")],
)
def test_where_two_runs_part_they_are_told_apart_from_both_sides(
    of_one, of_other
):
    parted = next(
        index
        for index, pair in enumerate(zip(of_one, of_other, strict=False))
        if len(set(pair)) > 1
    )
    # Each waits for the first collective of its own after the last in common.
    *_, one = positions(of_one[:parted] + of_one[parted].replace("3", "1"), 0)
    *_, other = positions(
        of_other[:parted] + of_other[parted].replace("3", "1"), 0
    )
    assert never_meet(at(*one, waits_in=STEP), at(*other, waits_in=STEP))
    assert never_meet(at(*other, waits_in=STEP), at(*one, waits_in=STEP))


def test_a_snapshot_says_what_the_worker_does():
    call = {"call": "fit, epoch 1 of 5"}
    assert str(Snapshot(waits_in=STEP, **call)) == (
        "waits in a step (fit, epoch 1 of 5)"
    )
    assert str(Snapshot(ended=True, **call)) == "has ended its script"
    assert str(Snapshot(**call)) == "is at work (fit, epoch 1 of 5)"
    assert str(Snapshot()) == "is at work elsewhere"
    assert str(Snapshot(failure=("WorkerError", "why"))) == "has failed"


@pytest.mark.parametrize(
    "snapshot",
    [
        Snapshot((1, 2, 3), "fit", STEP, is_ordered=False, number=3),
        Snapshot(failure=("WorkerLostError", "worker 1 has failed")),
    ],
)
def test_a_snapshot_that_was_published_is_read_as_it_was(snapshot):
    assert Snapshot.from_json(snapshot.to_json()) == snapshot


class Iterator:
    """Stands for Keras's, which is gone when the call has ended."""


def test_a_call_is_there_until_its_iterator_is_gone():
    progress = Progress(InFlight())
    fit = Iterator()
    progress.begin_call("fit", fit)
    assert progress.snapshot().call == "fit"
    del fit
    gc.collect()
    assert progress.snapshot().call == ""


def test_the_call_that_has_gone_on_last_is_the_innermost():
    progress = Progress(InFlight())
    fit, validation = Iterator(), Iterator()
    number = progress.begin_call("fit", fit)
    progress.begin_call("evaluate in fit", validation)
    assert progress.snapshot().call == "evaluate in fit"
    progress.rename(number, "fit, epoch 2 of 2")
    assert progress.snapshot().call == "fit, epoch 2 of 2"


def test_each_kind_of_collective_has_its_count():
    in_flight = InFlight()
    progress = Progress(in_flight)

    @tf.function
    def step(tensor):
        for name in ("one", "other"):
            with in_flight.watched(name, [tensor]) as (results, _):
                results.append(2 * tensor)

    for _ in range(2):
        step(tf.ones([]))
    with in_flight.watched("eager", []):
        pass
    with progress.point() as number:
        assert number == 0
    with progress.point() as number:
        assert number == 1
    assert progress.snapshot() == Snapshot((4, 1, 2))


def test_a_graph_that_is_traced_again_counts_on():
    in_flight = InFlight()

    @tf.function
    def step(tensor):
        with in_flight.watched("pack", [tensor]) as (results, _):
            results.append(2 * tensor)

    step(tf.ones([2]))
    step(tf.ones([3]))
    del step
    gc.collect()
    assert in_flight.read().begun == in_flight.read().ended == 2


def test_what_takes_long_is_a_wait(monkeypatch):
    in_flight = InFlight()
    progress = Progress(in_flight)
    in_flight.clock = lambda: 0.0
    with progress.point():
        assert progress.snapshot().waits_in == ""
        in_flight.clock = lambda: 2.0
        assert progress.snapshot().waits_in == COMPARISON
    with in_flight.during():
        in_flight.clock = lambda: 4.0
        assert progress.snapshot().waits_in == OUTSIDE


def test_what_overlaps_in_python_has_no_order():
    in_flight = InFlight()
    progress = Progress(in_flight)
    with progress.point():
        pass
    assert progress.snapshot().is_ordered
    with progress.point():
        in_flight.count_eager()
    assert not progress.snapshot().is_ordered


def test_functions_that_return_before_they_end_have_no_order(monkeypatch):
    progress = Progress(InFlight())
    monkeypatch.setattr(
        module.tf.config.experimental,
        "get_synchronous_execution",
        lambda: False,
    )
    with progress.point():
        pass
    assert not progress.snapshot().is_ordered


def test_a_worker_that_does_not_stand_still_says_nothing():
    in_flight = InFlight()
    progress = Progress(in_flight)
    read = in_flight.read

    def read_while_python_goes_on():
        in_flight.eager += 1
        return read()

    in_flight.read = read_while_python_goes_on
    assert progress.snapshot() is None
