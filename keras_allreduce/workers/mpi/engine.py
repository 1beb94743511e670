"""The thread that runs collectives over MPI.

    [1] a collective is submitted by any thread; the submission returns at once
    [2] a name that is new waits until all workers have it, and rank 0 says:
        now. Then all make its communicator, in the order in which rank 0 says
        so; from then on the name never waits for another
    [3] the messages of a collective begin, and later ones follow when they
        are done
    [4] the result is delivered

A collective that takes no longer than a moment is run by its caller: two
hand-overs between threads take longer than a small message. One thread at a
time uses MPI.

Nothing in here blocks while messages are in flight. Blocking calls would need
one thread for each collective, all of which spin; more than that, a worker
whose threads all wait for one collective can never begin the one that the
others wait for.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_allreduce.workers.mpi.communicators import Communicators, Submission
from keras_allreduce.workers.mpi.messages import Buffers, Exchange

# A message that is nearly there is worth more tests; longer waits leave the
# core to other threads. A nap is at most this part of the wait so far.
_TESTS_BEFORE_NAPS = 20
_NAP_SECONDS = (2e-5, 1e-3)
_NAP_PART = 1 / 16

# How long a caller tries by itself. Longer tries keep a core from whoever
# computes.
_MOMENT_SECONDS = 3e-4


@dataclass(eq=False)
class _Running:
    """A call whose messages have begun, and how many of them are not done."""

    call: Submission
    exchange: Exchange
    requests: list[Any] = field(default_factory=list)
    pending: int = 0


_Work = Submission | _Running


class Engine:
    """Runs named collectives over MPI, in a thread or in that of the caller.

    Args:
        mpi: The module `mpi4py.MPI`.
        comm: Communicator of all workers, in the order of their ranks.
        abort: Called with the reason if MPI fails; ends the collectives of
            TensorFlow.
    """

    def __init__(self, mpi: Any, comm: Any, abort: Callable[[str], None]):
        self._mpi = mpi
        self._comm = comm
        self._abort = abort
        self._buffers = Buffers()
        self._submitted: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        # Held by whoever uses MPI.
        self._lock = threading.Lock()
        self._calls: dict[Submission, None] = {}
        self._communicators = Communicators(mpi, comm)
        self._requests: list[Any] = []
        self._owners: list[_Running] = []
        self._failed = False
        self._thread = threading.Thread(
            target=self._run, name="keras_allreduce.mpi", daemon=True
        )
        self._thread.start()

    def run(self, call: Submission) -> np.ndarray | None:
        """Runs a collective in this thread, or submits it.

        Returns:
            The received array; `None` if it will be delivered later.
        """
        comm = self._communicators.comms.get(call.name)
        if comm is None or not self._lock.acquire(blocking=False):
            self.submit(call)
            return None
        self._calls[call] = None
        try:
            exchange = call.collective(comm, call.own, self._buffers)
            received = self._run_for_a_moment(_Running(call, exchange))
        except Exception as error:  # noqa: BLE001 - Whatever MPI fails at.
            self._break_off(error)
            return None
        finally:
            self._lock.release()
        if self._failed:
            self._finish(call, None)
        elif received is not None and self._calls.pop(call, self) is None:
            return received
        return None

    def _run_for_a_moment(self, running: _Running) -> np.ndarray | None:
        """The received array; `None` if the thread goes on with it."""
        end = time.perf_counter() + _MOMENT_SECONDS
        while True:
            try:
                running.requests = next(running.exchange)
            except StopIteration as stop:
                return stop.value
            while not self._mpi.Request.Testall(running.requests):
                if time.perf_counter() > end:
                    self._submitted.put(running)
                    return None

    def submit(self, call: Submission) -> None:
        """Begins a collective as soon as its name is agreed on."""
        self._calls[call] = None
        self._submitted.put(call)
        if self._failed:
            self._finish(call, None)

    def fail(self) -> None:
        """Ends all collectives, now and from now on, without a result."""
        self._failed = True
        for call in list(self._calls):
            self._finish(call, None)

    def stop(self, seconds: float) -> None:
        """Ends the thread, if nothing is in flight.

        Args:
            seconds: How long to wait for that.
        """
        self._submitted.put(None)
        self._thread.join(seconds)

    def _finish(self, call: Submission, received: np.ndarray | None) -> None:
        # The thread that takes it out delivers.
        with contextlib.suppress(KeyError):
            del self._calls[call]
            call.deliver(received)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # noqa: BLE001
            # Else everybody would wait for a thread that is gone.
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        self._abort(
            "All workers must stay until training ends. Received: MPI failed "
            f"on rank {self._comm.rank} ({error}). Look at its log, then start "
            "all workers again."
        )
        self.fail()

    def _loop(self) -> None:
        idle, since = 0, 0.0
        while not self._failed:
            with contextlib.suppress(queue.Empty):
                work = self._next(idle, since)
                if work is None:
                    return
                idle = 0
                with self._lock:
                    self._take(work)
            with self._lock:
                if self._communicators.are_asked_for:
                    self._begin(*self._communicators.agree())
                has_advanced = self._test()
            if has_advanced:
                idle = 0
            elif idle == 0:
                idle, since = 1, time.monotonic()
            else:
                idle += 1

    def _next(self, idle: int, since: float) -> _Work | None:
        """New submissions; sleeps if there is nothing to do."""
        if not self._requests and not self._communicators.are_asked_for:
            return self._submitted.get()
        if idle < _TESTS_BEFORE_NAPS:
            return self._submitted.get_nowait()
        shortest, longest = _NAP_SECONDS
        nap = (time.monotonic() - since) * _NAP_PART
        return self._submitted.get(timeout=min(max(nap, shortest), longest))

    def _take(self, work: _Work) -> None:
        if isinstance(work, _Running):
            self._await(work)
        elif work.name in self._communicators.comms:
            self._begin(work)
        else:
            self._begin(*self._communicators.ask(work))  # [2]

    def _begin(self, *calls: Submission) -> None:
        for call in calls:
            comm = self._communicators.comms[call.name]
            exchange = call.collective(comm, call.own, self._buffers)
            self._advance(_Running(call, exchange))

    def _advance(self, running: _Running) -> None:
        try:
            running.requests = next(running.exchange)  # [3]
        except StopIteration as end:
            self._finish(running.call, end.value)  # [4]
            return
        self._await(running)

    def _await(self, running: _Running) -> None:
        running.pending = len(running.requests)
        self._requests += running.requests
        self._owners += [running] * running.pending

    def _test(self) -> bool:
        """Goes on with the collectives whose messages are done."""
        done = self._requests and self._mpi.Request.Testsome(self._requests)
        if not done:
            return False
        owners = [self._owners[index] for index in done]
        for index in sorted(done, reverse=True):
            del self._requests[index], self._owners[index]
        for running in owners:
            running.pending -= 1
            if running.pending == 0:
                self._advance(running)
        return True
