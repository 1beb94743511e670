"""A worker that waits finds out that another waits elsewhere."""

import threading
from collections import Counter
from concurrent import futures

import pytest
import tensorflow as tf
from deadlines import DEADLINE_SECONDS, wait_until

from keras_allreduce.workers import board as board_module
from keras_allreduce.workers import lookout as lookout_module
from keras_allreduce.workers.board import Board
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerLostError,
    WorkerTimeoutError,
)
from keras_allreduce.workers.lookout import Lookout
from keras_allreduce.workers.place import OUTSIDE, STEP, Place


class FakeStore:
    """The store of the coordination service, in a dict."""

    def __init__(self):
        self.texts = {}
        self.reads = Counter()
        self.is_reachable = True

    def publish_again(self, key, value):
        written = futures.Future()
        if self.is_reachable:
            self.texts[key] = value
            written.set_result(None)
        return written

    def read_published(self, key, timeout_seconds):
        self.reads[key] += 1
        if key not in self.texts:
            raise tf.errors.DeadlineExceededError(None, None, key)
        return self.texts[key]


class FakeWhereabouts:
    """Says what the test has set."""

    def __init__(self):
        self.here, self.seconds = Place(), 0.0

    def place(self):
        return self.here

    def waits_seconds(self):
        return self.seconds

    def wait(self, where):
        self.here, self.seconds = Place(waits_in=where), 1e9

    def work(self):
        self.here, self.seconds = Place(), 0.0


@pytest.fixture
def store(monkeypatch):
    fake = FakeStore()
    monkeypatch.setattr(board_module, "runtime", fake)
    monkeypatch.setattr(lookout_module, "_APART_SECONDS", 0.0)
    return fake


def workers(size, answers=lambda rank: True):
    """Whereabouts and lookout of each worker."""
    tasks = tuple(f"/job:worker/replica:0/task:{rank}" for rank in range(size))
    addresses = tuple(f"{'abcdefgh'[rank]}:1" for rank in range(size))
    made = []
    for rank in range(size):
        whereabouts = FakeWhereabouts()
        cluster = Cluster(tasks, addresses, rank)
        board = Board(cluster, 0, answers)
        made.append((whereabouts, Lookout(cluster, whereabouts, board)))
    return made


@pytest.fixture
def pair(store):
    """Whereabouts and lookout of two workers of one store."""
    return workers(2)


def find_nothing(*lookouts):
    for _ in range(5):
        for lookout in lookouts:
            assert lookout.look() is None


def test_two_that_wait_at_different_places_both_find_out(pair):
    (chief, of_chief), (other, of_other) = pair
    chief.wait(STEP)
    other.wait(OUTSIDE)
    messages = [
        [lookout.look() for lookout in (of_chief, of_other)] for _ in range(3)
    ]
    assert messages[0] == [None, None]
    first, second = map(str, messages[2])
    assert first == second
    assert "worker 0 (a:1) waits in a step; worker 1 (b:1) waits" in first


def test_two_beats_at_once_do_not_show_that_the_other_waits(pair, monkeypatch):
    monkeypatch.setattr(lookout_module, "_APART_SECONDS", 1e9)
    (chief, of_chief), (other, of_other) = pair
    chief.wait(STEP)
    other.wait(OUTSIDE)
    find_nothing(of_chief, of_other)


def test_one_that_has_worked_in_between_has_not_waited(pair):
    (chief, of_chief), (other, of_other) = pair
    chief.wait(STEP)
    for _ in range(3):
        other.wait(OUTSIDE)
        of_other.look()
        assert of_chief.look() is None
        other.work()
        of_other.look()
        assert of_chief.look() is None


def test_one_that_waits_for_one_that_works_goes_on_waiting(pair):
    (chief, of_chief), (_, of_other) = pair
    chief.wait(STEP)
    find_nothing(of_chief, of_other)


def test_what_another_said_before_it_went_on_does_not_count(pair):
    (chief, of_chief), (other, of_other) = pair
    other.wait(OUTSIDE)
    assert of_other.look() is None
    assert of_other.look() is None
    # It goes on, and its thread does not come to say so.
    chief.wait(STEP)
    find_nothing(of_chief)


def test_a_wait_that_is_new_forgets_what_was_read_in_the_last(pair):
    (chief, of_chief), (other, of_other) = pair
    chief.wait(STEP)
    other.wait(OUTSIDE)
    of_other.look()
    assert of_chief.look() is None
    of_other.look()
    chief.work()
    assert of_chief.look() is None
    chief.wait(STEP)
    chief.seconds = 0.0  # It began after the last look.
    assert of_chief.look() is None


def test_one_that_has_ended_is_missed_only_by_one_that_waits(pair):
    (chief, of_chief), (_, of_other) = pair
    of_other.say_goodbye(0.0)
    assert of_chief.look() is None
    assert of_chief._board.has_ended(1)
    chief.wait(STEP)
    assert "worker 1 (b:1) has ended its script" in str(of_chief.look())


def test_a_goodbye_is_the_last_that_a_worker_says(pair):
    (_, of_chief), (_, of_other) = pair
    of_other.say_goodbye(0.0)
    of_other.look()
    assert of_chief._board.has_ended(1)


def test_the_end_of_the_chief_is_known_after_its_store_is_gone(
    pair, monkeypatch
):
    (_, of_chief), (_, of_other) = pair
    of_chief.say_goodbye(0.0)
    of_other.look()
    monkeypatch.setattr(board_module, "runtime", FakeStore())
    assert of_other._board.has_ended(0)


def test_the_chief_finds_one_of_many_that_waits_elsewhere(store):
    many = workers(6)
    for rank, (whereabouts, _) in enumerate(many):
        whereabouts.wait(OUTSIDE if rank == 4 else STEP)
    for _ in range(3):
        said = [str(lookout.look()) for _, lookout in many]
    assert "worker 0 (a:1) waits in a step; worker 4 (e:1) waits" in said[0]
    assert "worker 0 (a:1) waits in a step; worker 4 (e:1) waits" in said[4]


def test_a_worker_but_the_chief_reads_two_others_in_a_tick(store):
    many = workers(6)
    for whereabouts, _ in many:
        whereabouts.wait(STEP)
    for _, lookout in many[1:]:
        store.reads.clear()
        for _ in range(4):
            lookout.look()
        assert store.reads["keras_allreduce/0/place/0"] == 4
        # Each of the other four once.
        assert store.reads.total() == 8
        assert set(store.reads.values()) == {4, 1}


def test_one_that_has_ended_is_found_while_the_chief_works(store):
    (_, of_chief), (_, of_second), (third, of_third) = workers(3)
    of_chief.look()
    of_second.say_goodbye(0.0)
    third.wait(STEP)
    assert "worker 1 (b:1) has ended its script" in str(of_third.look())


@pytest.mark.parametrize("failed", [0, 1], ids=["chief", "other"])
def test_those_that_wait_for_one_that_failed_fail_of_the_same(store, failed):
    many = workers(4)
    why = WorkerTimeoutError("All workers must be there: worker 3 is not.")
    many[failed][1].say_failure(why, 0.0)
    for rank, (whereabouts, lookout) in enumerate(many):
        if rank != failed:
            assert lookout.look() is None
            whereabouts.wait(STEP)
    # Each reads the chief, and one after the other of the rest.
    for rank, (_, lookout) in enumerate(many):
        if rank != failed:
            found = [lookout.look() for _ in range(3)]
            error = next(each for each in found if each is not None)
            assert type(error) is WorkerTimeoutError
            assert str(error) == str(why)


def test_why_the_chief_failed_is_known_after_its_store_is_gone(
    pair, monkeypatch
):
    (_, of_chief), (_, of_other) = pair
    of_chief.say_failure(WorkerLostError("worker 0 (a:1) has failed"), 0.0)
    of_other.look()
    monkeypatch.setattr(board_module, "runtime", FakeStore())
    assert "worker 0 (a:1) has failed" in str(of_other._board.failure_of(0))
    assert of_other._board.failure_of(1) is None


@pytest.mark.parametrize("has_place", [True, False])
def test_a_chief_that_fails_stays_until_all_know_why(pair, has_place):
    (_, of_chief), (_, of_other) = pair
    if has_place:
        of_other.look()
    telling = threading.Thread(
        target=of_chief.say_failure,
        args=[WorkerLostError("worker 0 (a:1) has failed"), DEADLINE_SECONDS],
    )
    telling.start()
    wait_until(lambda: of_other._board.failure_of(0))
    assert telling.is_alive()
    of_other.look()
    telling.join(DEADLINE_SECONDS)
    assert not telling.is_alive()


def test_the_chief_does_not_stay_for_one_that_does_not_answer(store):
    asked = []

    def answers(rank):
        asked.append(rank)
        return rank != 1

    (_, of_chief), (_, of_second), (_, of_third) = workers(3, answers)
    of_second.look()
    of_third.say_goodbye(1.0)
    of_chief.say_goodbye(DEADLINE_SECONDS)  # Else it would take so long.
    assert asked == [0, 1]


def test_what_could_not_be_said_is_said_the_next_time(pair, store):
    (_, of_chief), (other, of_other) = pair
    store.is_reachable = False
    other.here = Place(call="fit")
    of_other.look()
    of_other.say_failure(WorkerLostError("worker 1 (b:1) has failed"), 0.0)
    store.is_reachable = True
    of_other._board._written.set_result(None)
    assert of_chief._board.failure_of(1) is None
    of_other.say_failure(WorkerLostError("worker 1 (b:1) has failed"), 1.0)
    assert "worker 1 (b:1) has failed" in str(of_chief._board.failure_of(1))


def test_a_chief_that_cannot_be_reached_holds_up_no_look(store, monkeypatch):
    monkeypatch.setattr(board_module, "_WRITE_SECONDS", 0.01)
    monkeypatch.setattr(board_module, "_LAST_WRITE_SECONDS", 0.01)
    _, (other, of_other) = workers(2)
    store.is_reachable = False
    other.wait(STEP)
    for _ in range(3):
        assert of_other.look() is None
    of_other.say_goodbye(0.01)
