"""Workers exchange texts; how often they read does not grow with their number.

The store of TensorFlow's coordination service is a dictionary here, and each
worker is a thread.
"""

import threading
from collections import Counter
from concurrent import futures
from dataclasses import replace

import pytest
import tensorflow as tf

from keras_allreduce.workers import store as store_module
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerLostError,
    WorkersDifferError,
    WorkerTimeoutError,
)
from keras_allreduce.workers.store import KeyValueStore
from keras_allreduce.workers.timing import TIMING


class FakeRuntime:
    """Counts what each thread publishes and reads."""

    def __init__(self):
        self.texts = {}
        self.changed = threading.Condition()
        self.operations = Counter()

    def publish(self, key, value):
        written = futures.Future()
        with self.changed:
            assert key not in self.texts, key
            self.texts[key] = value
            self.operations[threading.current_thread().name, "publish"] += 1
            self.changed.notify_all()
        written.set_result(None)
        return written

    def read_published(self, key, timeout_seconds):
        with self.changed:
            if not self.changed.wait_for(
                lambda: key in self.texts, timeout_seconds
            ):
                raise tf.errors.DeadlineExceededError(None, None, key)
            self.operations[threading.current_thread().name, "read"] += 1
            return self.texts[key]


@pytest.fixture
def runtime(monkeypatch):
    fake = FakeRuntime()
    monkeypatch.setattr(store_module, "runtime", fake)
    monkeypatch.setattr(store_module, "TIMING", replace(TIMING, poll=0.05))
    return fake


def stores(
    size, timeout_seconds=60.0, failure=lambda: None, cause=lambda: None
):
    """A store for each of `size` workers, all of one strategy."""
    tasks = tuple(f"/job:worker/replica:0/task:{rank}" for rank in range(size))
    addresses = tuple(f"host{rank}:1" for rank in range(size))
    made = [
        KeyValueStore(
            Cluster(tasks, addresses, rank), timeout_seconds, failure, cause
        )
        for rank in range(size)
    ]
    for each in made:
        each._number = 0
    return made


def in_threads(function, arguments):
    """What the function returns or raises for each argument, all at once."""
    ends = {}

    def run(number, argument):
        try:
            ends[number] = function(argument)
        except Exception as error:  # noqa: BLE001 - The test looks at it.
            ends[number] = error

    threads = [
        threading.Thread(target=run, args=pair, name=str(pair[0]))
        for pair in enumerate(arguments)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ends[number] for number in range(len(threads))]


def gather_text(store):
    return store.all_gather(0, "test", "text")


@pytest.mark.parametrize("size", [2, 3, 8])
def test_all_workers_have_the_texts_of_all(size, runtime):
    all_stores = stores(size)
    texts = [f"text {rank % 3}" for rank in range(size)]

    def exchange(store):
        rank = all_stores.index(store)
        return store.all_gather(0, "test", texts[rank])

    assert in_threads(exchange, all_stores) == size * [texts]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_worker_but_the_chief_reads_once(size, runtime):
    in_threads(gather_text, stores(size))
    assert runtime.operations == {
        ("0", "read"): size - 1,
        **{(str(rank), "read"): 1 for rank in range(1, size)},
        **{(str(rank), "publish"): 1 for rank in range(size)},
    }


def test_texts_that_are_the_same_cross_once(runtime):
    in_threads(lambda store: store.all_gather(0, "test", "x" * 1000), stores(8))
    assert len(runtime.texts["keras_allreduce/0/point 0/all"]) < 2000


def test_a_worker_that_does_not_publish_is_named_by_all_others(runtime):
    first, second, _, last = stores(4, timeout_seconds=0.2)
    ends = in_threads(
        gather_text,
        [first, second, last],
    )
    for end in ends:
        assert isinstance(end, WorkerTimeoutError)
        assert "nothing from worker 2 (host2:1)" in str(end)


def test_a_chief_that_does_not_publish_is_named_by_all_others(runtime):
    others = stores(3, timeout_seconds=0.2)[1:]
    for end in in_threads(gather_text, others):
        assert isinstance(end, WorkerTimeoutError)
        assert "nothing from worker 0 (host0:1)" in str(end)


def test_why_the_chief_gives_up_is_raised_by_all(runtime):
    why = WorkersDifferError("All workers must make the same calls.")
    chief = stores(3, failure=lambda: why)[0]
    others = stores(3)[1:]
    ends = in_threads(gather_text, [chief, others[0]])
    assert [type(end) for end in ends] == 2 * [WorkersDifferError]
    assert [str(end) for end in ends] == 2 * [str(why)]


def test_publishing_that_does_not_end_ends_with_the_failure(
    runtime, monkeypatch
):
    monkeypatch.setattr(runtime, "publish", lambda *_: futures.Future())
    why = WorkerLostError("worker 0 has not answered for 20 s")
    other = stores(2, failure=lambda: why)[1]
    with pytest.raises(WorkerLostError, match="has not answered for 20 s"):
        other.all_gather(0, "test", "text")


def test_a_connection_that_breaks_asks_who_is_gone(runtime, monkeypatch):
    def breaks(*_):
        raise tf.errors.UnavailableError(None, None, "Connection reset")

    monkeypatch.setattr(runtime, "read_published", breaks)
    why = WorkerLostError("worker 0 (host0:1) has ended its script")
    other = stores(2, cause=lambda: why)[1]
    with pytest.raises(WorkerLostError, match="has ended its script"):
        other.all_gather(0, "test", "text")


def test_an_error_of_the_store_names_the_chief(runtime, monkeypatch):
    failed = futures.Future()
    failed.set_exception(tf.errors.UnavailableError(None, None, "closed"))
    monkeypatch.setattr(runtime, "publish", lambda *_: failed)
    with pytest.raises(WorkerLostError, match=r"worker 0 \(host0:1\) is not"):
        stores(2)[1].all_gather(0, "test", "text")


def test_workers_at_points_of_other_kinds_are_told_so(runtime):
    kinds = ["a comparison", "a comparison", "a barrier"]
    all_stores = stores(3)

    def gather(store):
        return store.all_gather(5, kinds[all_stores.index(store)], "text")

    for end in in_threads(gather, all_stores):
        assert isinstance(end, WorkersDifferError)
        assert (
            "worker 0 (host0:1) is at a comparison, worker 2 (host2:1) is at "
            "a barrier" in str(end)
        )


def test_time_that_does_not_pass_for_this_worker_does_not_count(runtime):
    times = iter([0.0, 0.0, 0.0, 1.0, 99.0])
    other = stores(2, timeout_seconds=60.0)[1]
    other._clock = lambda: next(times)
    with pytest.raises(WorkerTimeoutError):
        other.all_gather(0, "test", "text")
    assert next(times, None) is None


def test_the_chief_stays_until_all_have_read(runtime):
    all_stores = stores(3)
    ends = in_threads(lambda store: store.linger(0), all_stores)
    assert ends == [None, None, None]
    assert runtime.operations["0", "read"] == 2
