"""Which collectives are in flight, as the health monitor sees it."""

import math

import pytest
import tensorflow as tf

from keras_allreduce.workers.in_flight import (
    Counters,
    InFlight,
    TimedCounters,
    nothing_is_read,
)


@pytest.fixture
def found():
    return InFlight()


def test_waits_that_are_not_timed_are_not_told(found):
    assert math.isnan(found.read_waits())


def test_several_tensors_are_in_flight_until_all_are_there(found):
    @tf.function
    def run(tensors):
        with found.watched("sum", tensors) as (results, _):
            results += [2 * tensor for tensor in tensors]
        return results

    one, other = run([tf.ones([2]), tf.ones([3])])
    assert one.numpy().tolist() == [2, 2]
    assert other.numpy().tolist() == [2, 2, 2]
    assert found.read().waiting_seconds == 0


def test_a_collective_that_has_not_come_back_is_in_flight(found):
    seen = []

    def look(tensor):
        found.read()
        seen.append(found.read().waiting_seconds)
        return tensor

    @tf.function
    def run(tensor):
        with found.watched("sum", [tensor]) as (results, _):
            results.append(tf.py_function(look, [tensor], tf.float32))
        return results

    run(tf.ones([]))
    assert seen[0] > 0
    assert found.read().waiting_seconds == 0


def test_what_runs_eagerly_is_in_flight_until_its_block_ends(found):
    with found.watched("sum", []):
        assert found.read().waiting_seconds > 0
    assert found.read().waiting_seconds == 0


def test_what_a_session_runs_is_not_counted(found):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        with found.watched("sum", [tf.ones([])]) as (results, _):
            results.append(2 * tf.ones([]))
        assert session.run(results) == [2.0]
    assert found.read().begun == 0


@pytest.mark.parametrize("counters", [Counters, TimedCounters])
def test_nothing_is_read_while_tensorflow_connects(counters):
    found = InFlight(counters)

    @tf.function
    def run(tensor):
        with found.watched("sum", [tensor]) as (results, _):
            results.append(2 * tensor)
        return results

    run(tf.ones([]))
    assert found.read().ended == 1
    run(tf.ones([]))
    with nothing_is_read():
        assert found.read().ended == 1
    assert found.read().ended == 2
