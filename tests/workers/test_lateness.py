"""How long the collectives of a step take, by clocks that say what they do."""

import math

import pytest
import tensorflow as tf

from keras_allreduce.workers import in_flight
from keras_allreduce.workers.in_flight import InFlight, TimedCounters


@pytest.fixture
def step(monkeypatch):
    """A step with two collectives in flight at once, and their `InFlight`.

    They begin at 1 and 2 and end at 4 and 9 seconds.
    """
    times = iter([1.0, 4.0, 2.0, 9.0])
    monkeypatch.setattr(
        in_flight,
        "free_running_clock",
        lambda variable: lambda: tf.constant(next(times), tf.float64),
    )
    found = InFlight(TimedCounters)

    @tf.function
    def run():
        for name in ("one", "other"):
            one = tf.ones([])
            with found.watched(name, [one]) as (results, _):
                results.append(tf.identity(one))

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


def test_the_straggler_is_the_one_that_waits_least():
    waits = [0.5, 0.125, 0.25]
    assert in_flight.lateness_ms(waits) == [0, 375, 250]


def test_it_is_told_only_if_every_worker_has_counted_a_step():
    assert all(map(math.isnan, in_flight.lateness_ms([0.5, math.nan])))
