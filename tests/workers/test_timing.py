"""The time limits between workers fit together."""

from dataclasses import FrozenInstanceError, fields

import pytest

from keras_allreduce.workers.timing import TIMING


def test_all_are_positive_and_nobody_changes_them():
    assert all(getattr(TIMING, each.name) > 0 for each in fields(TIMING))
    with pytest.raises(FrozenInstanceError):
        TIMING.tick = 1.0


def test_who_lingers_does_so_for_several_looks_of_the_others():
    assert TIMING.tick < TIMING.waiting < TIMING.linger_failed < TIMING.linger
    assert 4 * TIMING.tick <= TIMING.linger_failed
    # A worker that fails of another's error ends later than that begins to.
    assert TIMING.tick < TIMING.after_cause <= TIMING.linger_failed


def test_a_silent_worker_was_asked_often_and_is_named_before_tensorflow():
    assert 5 * TIMING.check < TIMING.silent
    assert TIMING.check_waiting <= TIMING.check
    assert TIMING.check + TIMING.tick < TIMING.unanswered < TIMING.silent
    assert TIMING.silent < TIMING.coordination


def test_one_look_ends_long_before_it_counts_as_a_suspension():
    reads = TIMING.answers + 2 * TIMING.read + TIMING.write
    assert TIMING.tick + reads < TIMING.suspended
    assert TIMING.pause < TIMING.answers < TIMING.moment
    assert TIMING.read_by_chief <= TIMING.read


def test_the_start_has_its_own_order():
    assert TIMING.retry < TIMING.connect < TIMING.report
    assert TIMING.quiet_start < TIMING.timeout
    assert TIMING.late_chief <= TIMING.late_tensorflow
