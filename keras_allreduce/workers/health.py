"""Watches the other workers, and ends what waits for one that will not come.

A collective waits for all workers, and TensorFlow's errors tell which socket
was closed, if that. One thread per strategy asks three detectors:

    Heartbeats           a worker is gone, or silent
    StallInspector       workers wait for each other in vain
    CollectiveTimeout    a collective takes longer than `timeout_seconds`
"""

import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerError,
    WorkerTimeoutError,
    shown,
    tagged,
)
from keras_allreduce.workers.heartbeats import (
    REFUSALS,
    REMEDY,
    Heartbeats,
    lost_error,
)
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.stall import StallInspector
from keras_allreduce.workers.timing import TIMING

_REMEDY = (
    "Give all the same number of batches and the same work, or raise "
    "`timeout_seconds`."
)


class AwakeClock:
    """Seconds that this process was awake, as far as it was looked at.

    A job that was suspended as a whole (`scontrol suspend`, `docker pause`, the
    migration of a virtual machine) has waited for nobody in that time.
    """

    def __init__(self) -> None:
        # Time of the last look and seconds until then, which change at once.
        self._looked = time.monotonic(), 0.0
        self._most = TIMING.suspended

    def __call__(self) -> float:
        """Seconds; at most `TIMING.suspended` more than at the last look."""
        last, awake = self._looked
        return awake + min(time.monotonic() - last, self._most)

    def look(self) -> None:
        """Goes on; called with each look of the health monitor."""
        self._looked = time.monotonic(), self()

    def let_go(self) -> None:
        """From now on it goes as the machine's: nobody looks any more."""
        self._most = math.inf


class CollectiveTimeout:
    """Finds a collective that takes longer than a worker may wait.

    Args:
        in_flight: Counts the collectives.
        timeout_seconds: How long one may wait for the others.
        heartbeats: Told when collectives have ended since the last look; knows
            who does not answer.
        inspector: Knows where the others are; `None` where workers cannot
            publish.
    """

    def __init__(
        self,
        in_flight: InFlight,
        timeout_seconds: float,
        heartbeats: Heartbeats,
        inspector: StallInspector | None,
    ):
        self._in_flight = in_flight
        self._timeout_seconds = timeout_seconds
        self._heartbeats = heartbeats
        self._inspector = inspector
        self._ended = 0

    def check(self) -> WorkerError | None:
        """Returns the error once one takes longer."""
        found = self._in_flight.read()
        if found.ended > self._ended:
            self._ended = found.ended
            self._heartbeats.heard_all()
        if found.waiting_seconds < self._timeout_seconds:
            return None
        return WorkerTimeoutError(
            "All workers must take part in every step within "
            f"timeout_seconds={self._timeout_seconds:g}. Received: "
            f"{self._known()}"
        )

    def _known(self) -> str:
        silent = self._heartbeats.unanswered()
        if silent:
            return f"{'; '.join(silent)}. {REMEDY}"
        if self._inspector is None:
            return f"all workers answer. {_REMEDY}"
        behind = self._inspector.behind()
        if behind:
            return f"all workers answer; {'; '.join(behind)}. {_REMEDY}"
        return (
            "all workers answer, and have begun as many steps and sums: a link "
            "is slow, or they run different functions. Raise `timeout_seconds`,"
            " or run the same script on all workers."
        )


class HealthMonitor:
    """Watches the other workers until `stop`, or until one fails.

    Then all collectives of this process end in a `tf.errors.UnavailableError`
    with the message of `failure`.

    Args:
        cluster: The workers.
        clock: Told of each look.
        heartbeats: Asks the others whether they are there.
        inspector: Finds workers that wait in vain; `None` where workers cannot
            publish.
        others: Further detectors: each is called again and again, and
            returns an error once it is sure.

    Attributes:
        on_loss: Called then, after the collectives of TensorFlow have ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        clock: AwakeClock,
        heartbeats: Heartbeats,
        inspector: StallInspector | None,
        others: Sequence[Callable[[], WorkerError | None]] = (),
    ):
        self._cluster = cluster
        self._clock = clock
        self._heartbeats = heartbeats
        self._inspector = inspector
        self._detectors: list[Callable[[], WorkerError | None]]
        self._detectors = [] if inspector is None else [inspector.check]
        self._detectors += others
        self._stopped = threading.Event()
        self._giving_up = threading.Lock()
        self._error: WorkerError | None = None
        self.on_loss: list[Callable[[], None]] = []
        self._thread = threading.Thread(
            target=self._run, name="keras_allreduce.health", daemon=True
        )

    def start(self, owner: Any) -> None:
        """Watches for as long as `owner`, a strategy, is there."""
        # Also runs at the end of the process, before TensorFlow is torn down.
        weakref.finalize(owner, self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch; returns when its thread has ended."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def failure(self) -> WorkerError | None:
        """An error that says which worker failed and how, or `None`."""
        found = self._error
        return None if found is None else type(found)(str(found))

    def cause(self) -> WorkerError | None:
        """Asks the others now, until a closed port is sure; then `failure`."""
        self._heartbeats.needs_all = True
        with tf.init_scope():  # A graph may be traced here.
            for _ in range(REFUSALS + 1):
                if self._error is None and not self._stopped.is_set():
                    self._give_up(self._heartbeats.check(all_now=True))
                if self._error or not self._heartbeats.are_unsure:
                    break
                time.sleep(TIMING.refused)
        return self.failure()

    def say_goodbye(self, seconds: float) -> None:
        """Tells the others that the script of this worker ends as it should.

        Args:
            seconds: How long it may take.
        """
        self._stopped.set()
        if self._inspector is not None:
            self._inspector.say_goodbye(seconds)

    def say_failure(self, error: BaseException, seconds: float) -> None:
        """Tells the others that the script of this worker ends in an error.

        Args:
            error: The error that was raised.
            seconds: How long the chief lingers until they know.
        """
        if self._inspector is None:
            return
        if not isinstance(error, WorkerError):
            what = f"has failed: {shown(error)}."
            error = lost_error(self._cluster, self._cluster.rank, what)
        self._inspector.say_failure(self.failure() or error, seconds)

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            self._clock.let_go()

    def _watch(self) -> None:
        hears = self._inspector is not None  # There is a store.
        hear_until = time.monotonic() + TIMING.preempted if hears else 0
        while not self._stopped.wait(
            TIMING.refused if self._heartbeats.are_unsure else TIMING.tick
        ):
            self._clock.look()
            error = self._heartbeats.check()
            if error is None and self._heartbeats.are_unsure:
                continue  # A closed port is asked again first.
            for detector in self._detectors:
                error = error or detector()
            self._give_up(error)
            if self._error is not None:
                return
            if time.monotonic() < hear_until and _repeat_sigterm(self._cluster):
                hear_until = 0

    def _give_up(self, error: WorkerError | None) -> None:
        with self._giving_up:
            if error is None or self._error or self._stopped.is_set():
                return
            self._error = error
            runtime.abort_collectives(tagged(error))
            for each in self.on_loss:
                each()
        if self._inspector is not None:
            self._inspector.say_failure(error, 0.0)


def _repeat_sigterm(cluster: Cluster) -> bool:
    """Repeats a SIGTERM that came while TensorFlow connected the workers.

    TensorFlow has heard that one, and the script has not: see `signals.py`.

    Returns:
        Whether there was one.
    """
    own = cluster.tasks[cluster.rank]
    if not runtime.was_preempted(own, TIMING.moment):
        return False
    os.kill(os.getpid(), signal.SIGTERM)
    return True
