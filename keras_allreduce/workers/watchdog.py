"""Checks the health of the other workers, and names the one that failed.

A collective waits for all workers, and TensorFlow's errors tell which socket
was closed, if that. One thread per strategy asks for heartbeats, and looks out
for workers that wait for each other.
"""

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers.board import Board
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerError,
    WorkerLostError,
    WorkerTimeoutError,
    shown,
    tagged,
)
from keras_allreduce.workers.heartbeats import IS_GONE, REFUSALS, Heartbeats
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.lookout import Lookout

_INTERVAL_SECONDS, _WAITING_INTERVAL_SECONDS = 2.0, 1.0
_LOOKOUT_SECONDS = 0.5

# TensorFlow publishes a SIGTERM within a second.
_HEARS_SECONDS = 10.0
_ANSWER_SECONDS = 0.5

_RETRY_SECONDS = 0.3

_REMEDY = (
    "Look at its log, then start all workers again; "
    "keras.callbacks.BackupAndRestore goes on where they were."
)


class Watchdog:
    """Watches the other workers until `stop`, or until one fails.

    Then all collectives of this process end in a `tf.errors.UnavailableError`
    with the message in `lost`.

    Args:
        cluster: The workers.
        timeout_seconds: How long a collective may wait for the others.
        in_flight: The collectives in flight.
        heartbeats: Asks the others whether they are there.
        board: What the others have said last; `None` where workers cannot
            publish.
        lookout: Finds workers that wait for each other at different places;
            `None` likewise.

    Attributes:
        lost: Which worker failed and how, or `None`.
        on_loss: Called then, after the collectives of TensorFlow have ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        timeout_seconds: float,
        in_flight: InFlight,
        heartbeats: Heartbeats,
        board: Board | None,
        lookout: Lookout | None,
    ):
        self._cluster = cluster
        self._timeout_seconds = timeout_seconds
        self._in_flight = in_flight
        self._board = board
        self._lookout = lookout
        self._stopped = threading.Event()
        self._asking = threading.Lock()
        self._heartbeats = heartbeats
        self._needs_all = False
        self._kind: type[WorkerError] = WorkerLostError
        self.lost: str | None = None
        self.on_loss: list[Callable[[], None]] = []
        self._thread = threading.Thread(
            target=self._run, name="keras_allreduce.watchdog", daemon=True
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
        """An error with the message in `lost`, or `None`."""
        return None if self.lost is None else self._kind(self.lost)

    def cause(self) -> WorkerError | None:
        """The same, after it has asked the others now until it is sure."""
        self.ask_until_sure()
        return self.failure()

    def ask_until_sure(self) -> str | None:
        """Asks now, after a collective failed, until a closed port is sure."""
        self._needs_all = True
        with tf.init_scope():  # A graph may be traced here.
            for _ in range(REFUSALS + 1):
                lost = self._look(self._cluster.others)
                if lost is not None or not self._heartbeats.are_unsure:
                    break
                time.sleep(_RETRY_SECONDS)
        return self.lost

    def _run(self) -> None:
        hears = self._lookout is not None  # There is a store.
        hear_until = time.monotonic() + _HEARS_SECONDS if hears else 0
        while not self._stopped.wait(
            _RETRY_SECONDS if self._heartbeats.are_unsure else _LOOKOUT_SECONDS
        ):
            waits = self._lookout is not None and self._lookout.waits
            interval = _WAITING_INTERVAL_SECONDS if waits else _INTERVAL_SECONDS
            if self._look(self._heartbeats.due(interval)) or self._look_out():
                return
            if time.monotonic() < hear_until and _repeat_sigterm(self._cluster):
                hear_until = 0

    def _look_out(self) -> str | None:
        """Gives up if this worker waits in vain; returns why, if so."""
        never = self._lookout.look() if self._lookout else None
        with self._asking:
            if never and self.lost is None and not self._stopped.is_set():
                self._give_up(never)
            return self.lost

    def _look(self, ranks: Sequence[int]) -> str | None:
        """Asks some workers; returns why this one must give up, if so."""
        with self._asking:
            for rank in ranks:
                if self.lost is not None or self._stopped.is_set():
                    break
                wrong = self._heartbeats.ask(rank)
                if wrong == IS_GONE:
                    self._is_gone(rank)
                elif wrong:
                    self._lose(rank, wrong)
            if (
                self.lost is None
                and self._in_flight.waiting_seconds() >= self._timeout_seconds
            ):
                self._give_up(_too_late(self._timeout_seconds))
            return self.lost

    def _is_gone(self, rank: int) -> None:
        failure = self._board.failure_of(rank) if self._board else None
        if failure is not None:
            self._give_up(failure)
        elif self._board is None or not self._board.has_ended(rank):
            self._lose(rank, _killed_or_failed())
        elif self._needs_all:
            self._lose(
                rank,
                "has ended its script, while this worker still needs it.",
            )

    def say_goodbye(self, seconds: float) -> None:
        """Tells the others that the script of this worker ends as it should.

        Args:
            seconds: How long it may take.
        """
        self._stopped.set()
        if self._lookout is not None:
            self._lookout.say_goodbye(seconds)

    def say_failure(self, error: BaseException, seconds: float) -> None:
        """Tells the others that the script of this worker ends in an error.

        Args:
            error: What was raised.
            seconds: How long the chief waits until they know.
        """
        if self._lookout is None:
            return
        if not isinstance(error, WorkerError):
            what = f"has failed: {shown(error)}."
            error = self._lost_error(self._cluster.rank, what)
        self._lookout.say_failure(self.failure() or error, seconds)

    def _lose(self, rank: int, what: str) -> None:
        self._give_up(self._lost_error(rank, what))

    def _lost_error(self, rank: int, what: str) -> WorkerLostError:
        return WorkerLostError(
            "All workers must stay until training ends. Received: "
            f"{self._cluster.name(rank)} {what} {_REMEDY}"
        )

    def _give_up(self, error: WorkerError) -> None:
        self._kind, self.lost = type(error), str(error)
        runtime.abort_collectives(tagged(error))
        for each in self.on_loss:
            each()
        if self._lookout is not None:
            self._lookout.say_failure(error, 0.0)


def _repeat_sigterm(cluster: Cluster) -> bool:
    """Repeats a SIGTERM that came while TensorFlow connected the workers.

    TensorFlow has heard that one, and the script has not: see `signals.py`.

    Returns:
        Whether there was one.
    """
    own = cluster.tasks[cluster.rank]
    if not runtime.was_preempted(own, _ANSWER_SECONDS):
        return False
    os.kill(os.getpid(), signal.SIGTERM)
    return True


def _too_late(timeout_seconds: float) -> WorkerTimeoutError:
    return WorkerTimeoutError(
        "All workers must take part in every step within "
        f"timeout_seconds={timeout_seconds:g}. Received: no worker was lost, "
        "but at least one is somewhere else in its script: it has fewer "
        "batches, is slower than that, or does something else. Give all the "
        "same number of batches, or raise `timeout_seconds`."
    )


def _killed_or_failed() -> str:
    clock = time.strftime("%H:%M:%S")
    return (
        f"is gone since {clock}, its port is closed: it was killed, or failed."
    )
