"""The thread that owns MPI, when MPI fails; a stand-in takes its place."""

import threading
from types import SimpleNamespace

import numpy as np

from keras_allreduce.workers.mpi.engine import Engine, Submission


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


def call(collective, results, name="pack"):
    return Submission(name, collective, np.ones(2), results)


def test_what_mpi_fails_at_ends_in_one_reason_and_nothing_waits():
    reasons, results = [], Results(2)
    engine = start(reasons)
    engine.submit(call(fails, results))
    # Also what comes later.
    while not reasons:
        pass
    engine.submit(call(returns, results))
    assert results.wait() == [None, None]
    (reason,) = reasons
    assert reason.startswith("All workers must stay until training ends.")
    assert "MPI failed on rank 0 (no route to host)" in reason


def test_the_watchdog_ends_what_waits_and_what_comes_later():
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
