"""Who runs collectives over MPI, and when it fails; a stand-in is the MPI."""

import threading
from types import SimpleNamespace

import numpy as np
from deadlines import wait_until

from keras_allreduce.workers.mpi import engine as engine_module
from keras_allreduce.workers.mpi.communicators import Submission
from keras_allreduce.workers.mpi.engine import Engine


class AloneInTheWorld:
    """A communicator of one rank."""

    rank, size = 0, 1

    def Dup(self):  # noqa: N802 (mpi4py's name)
        return self

    def Iprobe(self, tag, status):  # noqa: N802
        return False


MPI = SimpleNamespace(Status=object, ANY_TAG=-1, Request=None)


class Results:
    """What a call delivers."""

    def __init__(self, count=1):
        self.received = []
        self._count = count
        self._done = threading.Event()

    def __call__(self, array):
        self.received.append(array)
        if len(self.received) == self._count:
            self._done.set()

    def wait(self):
        assert self._done.wait(60)
        return self.received


def start(reasons):
    return Engine(MPI, AloneInTheWorld(), reasons.append)


def fails(comm, own, buffers):
    raise OSError("no route to host")
    yield


def waits_for_ever(comm, own, buffers):
    yield [object()]


def returns(comm, own, buffers):
    yield from ()
    return own


class Countdown:
    """Requests that are done after a number of tests."""

    def __init__(self, count):
        self.left = count

    def done(self, requests):
        self.left -= 1
        return self.left < 0


def mpi_that_takes(tests):
    """An MPI whose messages are done after a number of tests."""

    class Request:
        Testall = staticmethod(tests.done)

        @staticmethod
        def Testsome(requests):  # noqa: N802 (mpi4py's name)
            done = tests.done(requests)
            return list(range(len(requests))) if done else None

    return SimpleNamespace(Status=object, ANY_TAG=-1, Request=Request)


def engine_that_knows_the_name(mpi, reasons):
    engine, results = Engine(mpi, AloneInTheWorld(), reasons.append), Results()
    engine.submit(call(returns, results))  # agrees on the name
    results.wait()
    return engine


def takes_one_message(comm, own, buffers):
    yield [object()]
    return own + 1


def call(collective, results, name="pack"):
    return Submission(name, collective, np.ones(2), results)


def test_what_mpi_fails_at_ends_in_one_reason_and_nothing_waits():
    reasons, results = [], Results(2)
    engine = start(reasons)
    engine.submit(call(fails, results))
    # Also what comes later.
    wait_until(lambda: reasons)
    engine.submit(call(returns, results))
    assert results.wait() == [None, None]
    (reason,) = reasons
    assert reason.startswith("All workers must stay until training ends.")
    assert "MPI failed on rank 0 (no route to host)" in reason


def test_a_short_message_is_received_by_the_caller():
    reasons, results = [], Results()
    engine = engine_that_knows_the_name(mpi_that_takes(Countdown(3)), reasons)
    received = engine.run(call(takes_one_message, results))
    np.testing.assert_array_equal(received, [2, 2])
    assert results.received == []
    engine.fail()  # finds nothing to end
    assert results.received == []


def test_a_longer_message_is_delivered_by_the_thread(monkeypatch):
    monkeypatch.setattr(engine_module, "_MOMENT_SECONDS", -1.0)
    reasons, results = [], Results()
    engine = engine_that_knows_the_name(mpi_that_takes(Countdown(50)), reasons)
    assert engine.run(call(takes_one_message, results)) is None
    (received,) = results.wait()
    np.testing.assert_array_equal(received, [2, 2])


def test_a_name_that_is_not_agreed_on_is_left_to_the_thread():
    results = Results()
    engine = Engine(mpi_that_takes(Countdown(0)), AloneInTheWorld(), print)
    assert engine.run(call(takes_one_message, results)) is None
    (received,) = results.wait()
    np.testing.assert_array_equal(received, [2, 2])


def test_who_finds_mpi_in_use_does_not_wait_for_it():
    results = Results()
    engine = engine_that_knows_the_name(mpi_that_takes(Countdown(0)), [])
    with engine._lock:
        assert engine.run(call(takes_one_message, results)) is None
    (received,) = results.wait()
    np.testing.assert_array_equal(received, [2, 2])


def test_what_fails_in_the_caller_ends_in_one_reason():
    reasons, results = [], Results()
    engine = engine_that_knows_the_name(mpi_that_takes(Countdown(0)), reasons)
    assert engine.run(call(fails, results)) is None
    assert results.wait() == [None]
    assert len(reasons) == 1
    assert "MPI failed on rank 0 (no route to host)" in reasons[0]
    # What comes later ends as well.
    later = Results()
    assert engine.run(call(takes_one_message, later)) is None
    assert later.wait() == [None]


def test_the_monitor_ends_what_waits_and_what_comes_later():
    results = Results(2)
    engine = start([])
    # Of two workers, the other never has this name.
    engine._comm = SimpleNamespace(rank=0, size=2, Dup=None)
    engine.submit(call(waits_for_ever, results))
    engine.fail()
    engine.submit(call(returns, results))
    assert results.wait() == [None, None]


def test_a_result_is_delivered_once():
    results = Results()
    engine = start([])
    engine.submit(call(returns, results))
    (received,) = results.wait()
    engine.fail()
    assert received.tolist() == [1, 1]
    assert len(results.received) == 1


def test_a_stopped_engine_has_done_what_was_submitted():
    results = Results(3)
    engine = start([])
    for name in ("a", "b", "a"):
        engine.submit(call(returns, results, name))
    engine.stop(60)
    assert len(results.received) == 3
