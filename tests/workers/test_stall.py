"""A worker that waits finds out that another waits elsewhere."""

import threading
from collections import Counter
from concurrent import futures
from dataclasses import replace

import pytest
import tensorflow as tf
from deadlines import DEADLINE_SECONDS, wait_until

from keras_allreduce.workers import stall as stall_module
from keras_allreduce.workers import store as store_module
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerLostError,
    WorkerTimeoutError,
)
from keras_allreduce.workers.progress import OUTSIDE, STEP, Snapshot
from keras_allreduce.workers.stall import StallInspector
from keras_allreduce.workers.store import KeyValueStore
from keras_allreduce.workers.timing import TIMING


class FakeRuntime:
    """The store of the coordination service, in a dict."""

    def __init__(self):
        self.texts = {}
        self.reads = Counter()
        self.is_reachable = True

    def publish(self, key, value, *, overwrite=False):
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


class FakeProgress:
    """Says what the test has set: steps and eager sums that have begun."""

    def __init__(self):
        self.here = Snapshot()

    def snapshot(self):
        return self.here

    def step(self):
        graph, eager, points = self.here.position
        self.here = Snapshot((graph + 1, eager, points), waits_in=STEP)

    def sum(self):
        graph, eager, points = self.here.position
        self.here = Snapshot((graph, eager + 1, points), waits_in=OUTSIDE)

    def work(self):
        self.here = Snapshot(self.here.position)


@pytest.fixture
def runtime(monkeypatch):
    fake = FakeRuntime()
    monkeypatch.setattr(store_module, "runtime", fake)
    return fake


def workers(size, answers=lambda rank: True, heard=lambda rank: None):
    """Progress and inspector of each worker."""
    tasks = tuple(f"/job:worker/replica:0/task:{rank}" for rank in range(size))
    addresses = tuple(f"{'abcdefgh'[rank]}:1" for rank in range(size))
    made = []
    for rank in range(size):
        progress = FakeProgress()
        cluster = Cluster(tasks, addresses, rank)
        store = KeyValueStore(cluster, 60.0, answers=answers)
        store._number = 0
        made.append((progress, StallInspector(cluster, progress, store, heard)))
    return made


@pytest.fixture
def pair(runtime):
    """Progress and inspector of two workers of one store."""
    return workers(2)


def find_nothing(*inspectors):
    for _ in range(5):
        for inspector in inspectors:
            assert inspector.check() is None


def test_two_that_wait_at_different_places_both_find_out_at_once(pair):
    (chief, of_chief), (other, of_other) = pair
    chief.step()
    other.sum()
    assert of_chief.check() is None
    first, second = str(of_other.check()), str(of_chief.check())
    assert first == second
    assert "worker 0 (a:1) waits in a step; worker 1 (b:1) waits" in first


def test_who_is_behind_is_known_as_far_as_it_is_published(runtime):
    (chief, of_chief), (other, of_other), (last, of_last), _ = workers(4)
    other.here = Snapshot(call="fit, epoch 1 of 5")
    for progress in (chief, last):
        progress.step()
    for inspector in (of_chief, of_other, of_last):
        inspector.check()
    assert of_chief.behind() == [
        "worker 1 (b:1) is at work (fit, epoch 1 of 5)",
        "worker 3 (d:1) has not published where it is",
    ]
    assert of_last.behind() == of_chief.behind()
    # What was read last counts where nothing can be read.
    runtime.texts.clear()
    assert of_chief.behind() == of_last.behind()
    assert of_chief.behind()[0].startswith("worker 1 (b:1) is at work")


def test_what_another_said_long_ago_proves_as_much(pair):
    (chief, of_chief), (other, of_other) = pair
    other.sum()
    assert of_other.check() is None
    other.work()  # Its thread does not come to say so.
    chief.step()
    assert "worker 1 (b:1) waits for a sum" in str(of_chief.check())


def test_one_that_has_ended_is_missed_only_by_one_that_waits(pair):
    (chief, of_chief), (_, of_other) = pair
    of_other.say_goodbye(0.0)
    assert of_chief.check() is None
    assert of_chief.has_ended(1)
    chief.step()
    assert "worker 1 (b:1) has ended its script" in str(of_chief.check())


def test_one_that_ends_stays_while_the_other_receives_what_it_has(pair):
    (chief, of_chief), (other, of_other) = pair
    for progress in (chief, other):
        progress.step()
    of_chief.check()
    other.work()
    leaving = threading.Thread(
        target=of_other.say_goodbye, args=[DEADLINE_SECONDS]
    )
    leaving.start()
    wait_until(lambda: of_chief.has_ended(1))
    find_nothing(of_chief)
    assert leaving.is_alive()
    chief.work()
    of_chief.check()
    leaving.join(DEADLINE_SECONDS)
    assert not leaving.is_alive()


def test_one_that_ends_does_not_stay_for_one_that_waits_in_vain(pair):
    (chief, of_chief), (_, of_other) = pair
    chief.step()
    of_chief.check()
    of_other.say_goodbye(DEADLINE_SECONDS)  # Else it would take so long.


def test_a_goodbye_is_the_last_that_a_worker_says(pair):
    (_, of_chief), (other, of_other) = pair
    of_other.say_goodbye(0.0)
    other.step()
    of_other.check()
    assert of_chief.has_ended(1)


def test_the_end_of_the_chief_is_known_after_its_store_is_gone(
    pair, monkeypatch
):
    (_, of_chief), (_, of_other) = pair
    of_chief.say_goodbye(0.0)
    of_other.check()
    monkeypatch.setattr(store_module, "runtime", FakeRuntime())
    assert of_other.has_ended(0)


def test_the_chief_finds_one_of_many_that_waits_elsewhere(runtime):
    many = workers(6)
    for rank, (progress, _) in enumerate(many):
        if rank == 4:
            progress.sum()
        else:
            progress.step()
    for _ in range(2):
        said = [str(inspector.check()) for _, inspector in many]
    assert "worker 0 (a:1) waits in a step; worker 4 (e:1) waits" in said[0]
    assert "worker 0 (a:1) waits in a step; worker 4 (e:1) waits" in said[4]


def test_a_worker_but_the_chief_reads_two_others_in_a_check(runtime):
    many = workers(6)
    for progress, _ in many:
        progress.step()
    for _, inspector in many[1:]:
        runtime.reads.clear()
        for _ in range(4):
            inspector.check()
        assert runtime.reads["keras_allreduce/0/progress/0"] == 4
        # Each of the other four once.
        assert runtime.reads.total() == 8
        assert set(runtime.reads.values()) == {4, 1}


def test_what_a_worker_publishes_anew_is_heard_once(runtime):
    heard = []
    (chief, of_chief), (other, of_other) = workers(2, heard=heard.append)
    chief.step()
    other.step()
    of_other.check()
    heard.clear()
    of_chief.check()
    of_chief.check()
    assert heard == [1]
    of_other.check()
    of_chief.check()
    assert heard.count(1) == 2


def test_one_that_has_ended_is_found_while_the_chief_works(runtime):
    (_, of_chief), (_, of_second), (third, of_third) = workers(3)
    of_chief.check()
    of_second.say_goodbye(0.0)
    third.step()
    assert "worker 1 (b:1) has ended its script" in str(of_third.check())


@pytest.mark.parametrize("failed", [0, 1], ids=["chief", "other"])
def test_those_that_wait_for_one_that_failed_fail_of_the_same(runtime, failed):
    many = workers(4)
    why = WorkerTimeoutError("All workers must be there: worker 3 is not.")
    many[failed][1].say_failure(why, 0.0)
    for rank, (progress, inspector) in enumerate(many):
        if rank != failed:
            assert inspector.check() is None
            progress.step()
    # Each reads the chief, and one after the other of the rest.
    for rank, (_, inspector) in enumerate(many):
        if rank != failed:
            found = [inspector.check() for _ in range(3)]
            error = next(each for each in found if each is not None)
            assert type(error) is WorkerTimeoutError
            assert str(error) == str(why)


def test_why_the_chief_failed_is_known_after_its_store_is_gone(
    pair, monkeypatch
):
    (_, of_chief), (_, of_other) = pair
    of_chief.say_failure(WorkerLostError("worker 0 (a:1) has failed"), 0.0)
    of_other.check()
    monkeypatch.setattr(store_module, "runtime", FakeRuntime())
    assert "worker 0 (a:1) has failed" in str(of_other.failure_of(0))
    assert of_other.failure_of(1) is None


@pytest.mark.parametrize("has_published", [True, False])
def test_a_chief_that_fails_lingers_until_all_know_why(pair, has_published):
    (_, of_chief), (_, of_other) = pair
    if has_published:
        of_other.check()
    telling = threading.Thread(
        target=of_chief.say_failure,
        args=[WorkerLostError("worker 0 (a:1) has failed"), DEADLINE_SECONDS],
    )
    telling.start()
    wait_until(lambda: of_chief._store.get("progress", 0) is not None)
    assert telling.is_alive()
    of_other.check()
    telling.join(DEADLINE_SECONDS)
    assert not telling.is_alive()


def test_the_chief_does_not_linger_for_one_that_does_not_answer(runtime):
    asked = []

    def answers(rank):
        asked.append(rank)
        return rank != 1

    (_, of_chief), (_, of_second), (_, of_third) = workers(3, answers)
    of_second.check()
    of_third.say_goodbye(1.0)
    of_chief.say_goodbye(DEADLINE_SECONDS)  # Else it would take so long.
    assert asked == [0, 1]


def test_what_could_not_be_said_is_said_the_next_time(pair, runtime):
    (_, of_chief), (other, of_other) = pair
    runtime.is_reachable = False
    other.here = Snapshot(call="fit")
    of_other.check()
    of_other.say_failure(WorkerLostError("worker 1 (b:1) has failed"), 0.0)
    runtime.is_reachable = True
    of_other._store._replaced["progress"].set_result(None)
    assert of_chief.failure_of(1) is None
    of_other.say_failure(WorkerLostError("worker 1 (b:1) has failed"), 1.0)
    assert "worker 1 (b:1) has failed" in str(of_chief.failure_of(1))


def test_a_chief_that_cannot_be_reached_holds_up_no_check(runtime, monkeypatch):
    monkeypatch.setattr(
        stall_module, "TIMING", replace(TIMING, write=0.01, last_write=0.01)
    )
    _, (other, of_other) = workers(2, answers=lambda rank: False)
    runtime.is_reachable = False
    other.step()
    for _ in range(3):
        assert of_other.check() is None
    of_other.say_goodbye(0.01)
