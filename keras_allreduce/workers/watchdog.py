"""Checks the health of the other workers, and names the one that failed.

A collective waits for all workers, and TensorFlow's errors tell which socket
was closed, if that. One thread per strategy asks the server of each other
worker for a heartbeat. C++ threads answer it, so a worker that computes,
compiles, saves or stands in a debugger does answer; one that was killed or
frozen, or whose network is cut, does not.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.in_flight import InFlight

FROZEN_SECONDS = 20.0
"""A worker that has not answered for so long has failed."""

_INTERVAL_SECONDS = 2.0
_PROBE_SECONDS = 2.0

# A closed port is asked again so often, in case only one connection broke.
_REFUSALS = 3
_RETRY_SECONDS = 0.3

# A worker whose script has ended is missed only by one that still trains. The
# others may need so long for what they do last, saving as a rule.
_ALONE_SECONDS = 30.0

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
        timeout_seconds: How long a collective may wait for the others. A
            worker has failed if it has not answered for this long, or for
            `FROZEN_SECONDS` if that is shorter.
        in_flight: The collectives in flight.

    Attributes:
        lost: Which worker failed and how, or `None`.
        on_loss: Called then, after the collectives of TensorFlow have ended.
    """

    def __init__(
        self, cluster: Cluster, timeout_seconds: float, in_flight: InFlight
    ):
        self._cluster = cluster
        self._timeout_seconds = timeout_seconds
        self._in_flight = in_flight
        self._limit_seconds = min(timeout_seconds, FROZEN_SECONDS)
        self._stopped = threading.Event()
        self._asking = threading.Lock()
        self._answered = dict.fromkeys(cluster.others, time.monotonic())
        self._refusals = dict.fromkeys(cluster.others, 0)
        self._alone_seconds = _ALONE_SECONDS
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

    def ask_until_sure(self) -> str | None:
        """Asks now, after a collective failed, until a closed port is sure."""
        self._alone_seconds = 0.0
        for _ in range(_REFUSALS + 1):
            if self._look() is not None or not any(self._refusals.values()):
                break
            time.sleep(_RETRY_SECONDS)
        return self.lost

    def _run(self) -> None:
        while not self._stopped.wait(
            _RETRY_SECONDS
            if any(0 < n < _REFUSALS for n in self._refusals.values())
            else _INTERVAL_SECONDS
        ):
            if self._look() is not None:
                return

    def _look(self) -> str | None:
        with self._asking:
            for rank in self._cluster.others:
                if self.lost is not None or self._stopped.is_set():
                    break
                self._ask(rank)
            waiting = self._in_flight.waiting_seconds()
            if self.lost is None and waiting >= self._alone_seconds:
                self._look_for_goodbyes()
            if self.lost is None and waiting >= self._timeout_seconds:
                self._give_up(
                    "All workers must take part in every step within "
                    f"timeout_seconds={self._timeout_seconds:g}. Received: no "
                    "worker was lost, but at least one is somewhere else in "
                    "its script: it has fewer batches, is slower than that, "
                    "or does something else. Give all the same number of "
                    "batches, or raise `timeout_seconds`."
                )
            return self.lost

    def _ask(self, rank: int) -> None:
        asked = time.monotonic()
        try:
            runtime.check_peer(
                self._cluster.tasks[rank],
                min(_PROBE_SECONDS, self._limit_seconds),
            )
        except tf.errors.DeadlineExceededError:
            silent = time.monotonic() - self._answered[rank]
            if silent >= self._limit_seconds:
                self._lose(
                    rank,
                    f"has not answered for {silent:.0f} s: it is frozen, or "
                    "the network is cut.",
                )
        except tf.errors.FailedPreconditionError:
            self._lose(rank, "was started again while this worker was not.")
        except tf.errors.OpError:
            self._refusals[rank] += 1
            if self._refusals[rank] >= _REFUSALS:
                self._is_gone(rank)
        else:
            self._answered[rank] = asked
            self._refusals[rank] = 0

    def _is_gone(self, rank: int) -> None:
        if not self._has_ended(rank):
            clock = time.strftime("%H:%M:%S")
            self._lose(
                rank,
                f"is gone since {clock}, its port is closed: it was killed, "
                "or failed.",
            )
        elif time.monotonic() - self._answered[rank] >= self._alone_seconds:
            self._has_left(rank)

    def _look_for_goodbyes(self) -> None:
        """Finds who has ended its script, and only waits in MPI_Finalize."""
        for rank in self._cluster.others:
            if self._has_ended(rank):
                self._has_left(rank)
                return

    def _has_left(self, rank: int) -> None:
        self._lose(rank, "has ended its script before this worker did.")

    def _has_ended(self, rank: int) -> bool:
        """Whether it has said goodbye. The chief takes what it said along."""
        with contextlib.suppress(tf.errors.OpError):
            runtime.read_published(_goodbye(self._cluster, rank), 0.5)
            return True
        return False

    def say_goodbye(self) -> None:
        """Tells the others that the script of this worker ends as it should."""
        with contextlib.suppress(tf.errors.OpError):
            runtime.publish(_goodbye(self._cluster, self._cluster.rank), "")

    def _lose(self, rank: int, what: str) -> None:
        self._give_up(
            "All workers must stay until training ends. Received: "
            f"{self._cluster.name(rank)} {what} {_REMEDY}"
        )

    def _give_up(self, why: str) -> None:
        self.lost = why
        runtime.abort_collectives(why)
        for each in self.on_loss:
            each()


def _goodbye(cluster: Cluster, rank: int) -> str:
    return f"keras_allreduce/goodbye of {cluster.tasks[rank]}"
