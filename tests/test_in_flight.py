"""How long the collectives of a step take, by clocks that say what they do."""

import math

import pytest
import tensorflow as tf

from keras_allreduce.workers import in_flight
from keras_allreduce.workers.in_flight import Progress


@pytest.fixture
def step(monkeypatch):
    """A step with two collectives under way at once, and their `Progress`.

    They begin at 1 and 2 and end at 4 and 9 seconds.
    """
    times = iter([1.0, 4.0, 2.0, 9.0])
    monkeypatch.setattr(
        in_flight,
        "free_running_clock",
        lambda variable: lambda: tf.constant(next(times), tf.float64),
    )
    found = Progress(timed=True)

    @tf.function
    def run():
        for _ in range(2):
            found.watched(tf.identity, tf.ones([]))

    return run, found


def test_the_wait_of_a_step_is_that_of_the_longest_collective(step):
    run, found = step
    for _ in range(4):
        run()
    assert found.read_waits() == pytest.approx(9.0 - 2.0)


def test_waits_are_those_since_the_last_call(step):
    run, found = step
    assert math.isnan(found.read_waits())
    run()  # The first step is not counted.
    assert math.isnan(found.read_waits())
    run()
    assert found.read_waits() == pytest.approx(7.0)
    assert math.isnan(found.read_waits())


def test_waits_that_are_not_timed_are_not_told():
    assert math.isnan(Progress().read_waits())


def test_a_list_of_tensors_is_under_way_until_all_are_there():
    found = Progress()

    @tf.function
    def run(tensors):
        return found.watched(lambda ready: [2 * t for t in ready], tensors)

    one, other = run([tf.ones([2]), tf.ones([3])])
    assert one.numpy().tolist() == [2, 2]
    assert other.numpy().tolist() == [2, 2, 2]
