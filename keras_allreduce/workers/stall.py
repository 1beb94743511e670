"""Finds workers that wait for each other in vain, by proof and not by time.

A worker that waits for longer than a moment publishes how far it has come, and
reads how far the others have. `progress.py` has the proof.
"""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from keras_allreduce.workers import errors
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerError,
    WorkersDifferError,
    name_and_message,
)
from keras_allreduce.workers.progress import Progress, Snapshot, never_meet
from keras_allreduce.workers.store import KeyValueStore
from keras_allreduce.workers.timing import TIMING

_PROGRESS = "progress"
_LAST_OF_THE_CHIEF = "last progress of the chief"

_REMEDY = (
    "All workers must make the same calls, and stop in the same step. What a "
    "callback decides, it must decide on all workers, by numbers that are the "
    "same on all: the logs are, time and local values are not."
)


class StallInspector:
    """Publishes how far this worker is, and compares it with the others.

    Args:
        cluster: The workers.
        progress: How far this worker is.
        store: Where all publish.
        heard: Called with the rank of a worker that has published anew.

    Attributes:
        waits: Whether this worker waited for others at the last check.
    """

    def __init__(
        self,
        cluster: Cluster,
        progress: Progress,
        store: KeyValueStore,
        heard: Callable[[int], None] = lambda rank: None,
    ):
        self._cluster = cluster
        # The others, one after the other.
        self._in_turn = itertools.cycle(cluster.others[1:] or [0])
        self._progress = progress
        self._store = store
        self._heard = heard
        self._publishing = threading.Lock()
        self._number = 0
        self._said_last = False
        self._published = ("", "")
        self._read_last: dict[int, Snapshot] = {}
        self.waits = False

    def check(self) -> WorkerError | None:
        """To be called again and again.

        Returns:
            An error if this worker waits for another in vain.
        """
        own = self._progress.snapshot()
        if own is None:
            return None
        self.waits = bool(own.waits_in)
        said = own.call, own.waits_in
        if (self.waits or said != self._published) and self._publish(
            own, TIMING.write
        ):
            self._published = said
        if self.waits:
            return self._compare(own)
        if self._cluster.rank and not self._knows_end_of(0):
            # Its messages end with it.
            self._read(0)
        return None

    def say_failure(self, error: WorkerError, seconds: float) -> None:
        """Tells the others why this worker fails.

        Args:
            error: For those that wait for this one, too.
            seconds: How long the chief lingers until the others know.
        """
        self._say_last(seconds, failure=name_and_message(error))

    def say_goodbye(self, seconds: float) -> None:
        """Tells the others that the script of this worker ends as it should.

        Args:
            seconds: See `say_failure`.
        """
        self._say_last(seconds, ended=True)

    def behind(self) -> list[str]:
        """Says where the workers are that this one may wait for.

        Returns:
            A clause for each that is behind this one, by what it has published
            last, or that has published nothing.
        """
        own = self._progress.snapshot()
        clauses = []
        for rank in self._cluster.others:
            other = self._read(rank) or self._read_last.get(rank)
            if other is None:
                what: object = "has not published where it is"
            elif own is None or other.is_behind(own):
                what = other
            else:
                continue
            clauses.append(f"{self._cluster.name(rank)} {what}")
        return clauses

    def has_ended(self, rank: int) -> bool:
        """Whether the script of another worker has ended, as it should."""
        last = self._last_of(rank)
        return last is not None and last.ended

    def failure_of(self, rank: int) -> WorkerError | None:
        """The error in which another worker has failed, if it said so."""
        last = self._last_of(rank)
        if last is None or last.failure is None:
            return None
        return errors.from_name(*last.failure)

    def _compare(self, own: Snapshot) -> WorkerError | None:
        for rank in self._read_in_this_check():
            other = self._read(rank)
            if other is None:
                continue
            if other.failure is not None:
                return self.failure_of(rank)
            if never_meet(own, other):
                return self._error({self._cluster.rank: own, rank: other})
        return None

    def _read_in_this_check(self) -> list[int]:
        if self._cluster.rank == 0:
            return self._cluster.others
        return sorted({0, next(self._in_turn)})

    def _read(self, rank: int) -> Snapshot | None:
        """How far another worker is; `None` if it has not said so."""
        text = self._store.get(_PROGRESS, rank)
        if text is None:
            return None
        found = Snapshot.from_json(text)
        before = self._read_last.get(rank)
        if before is None or before.number < found.number:
            self._heard(rank)
        self._read_last[rank] = found
        if found.is_last and rank == 0:
            self._store.acknowledge(_LAST_OF_THE_CHIEF)
        return found

    def _knows_end_of(self, rank: int) -> bool:
        return rank in self._read_last and self._read_last[rank].is_last

    def _last_of(self, rank: int) -> Snapshot | None:
        if not self._knows_end_of(rank):
            self._read(rank)
        return self._read_last[rank] if self._knows_end_of(rank) else None

    def _publish(self, snapshot: Snapshot, seconds: float) -> bool:
        """Publishes, unless this worker has said its last, or cannot."""
        with self._publishing:
            if self._said_last:
                return False
            self._number += 1
            numbered = replace(snapshot, number=self._number)
            is_said = self._store.put(_PROGRESS, numbered.to_json(), seconds)
            self._said_last = is_said and snapshot.is_last
            return is_said

    def _say_last(
        self,
        seconds: float,
        *,
        ended: bool = False,
        failure: tuple[str, str] | None = None,
    ) -> None:
        if seconds and self._cluster.rank and not self._store.answers(0):
            return
        own = self._progress.snapshot() or Snapshot()
        last = replace(own, ended=ended, failure=failure)
        self._publish(last, min(seconds, TIMING.last_write))
        if not seconds:
            return
        if ended:
            self._let_receive(own, seconds)
        # The others acknowledge here that they need no word of the chief.
        self._store.linger(
            _LAST_OF_THE_CHIEF,
            seconds if self._cluster.rank == 0 else TIMING.moment,
        )

    def _let_receive(self, own: Snapshot, seconds: float) -> None:
        """Stays while others still receive a result that this worker has.

        Its messages may still be in its own buffers, which end with its
        process.
        """
        end = time.monotonic() + seconds
        left = self._cluster.others
        while left and time.monotonic() < end:
            left = [rank for rank in left if self._receives(rank, own)]
            time.sleep(TIMING.retry if left else 0)

    def _receives(self, rank: int, own: Snapshot) -> bool:
        """Whether a worker waits in a collective that this one has ended."""
        other = self._read(rank)
        return (
            other is not None
            and not other.is_last
            and bool(other.waits_in)
            and not never_meet(other, replace(own, ended=True))
        )

    def _error(self, snapshots: dict[int, Snapshot]) -> WorkersDifferError:
        where = "; ".join(
            f"{self._cluster.name(rank)} {snapshots[rank]}"
            for rank in sorted(snapshots)
        )
        return WorkersDifferError(
            "All workers must take part in each step and sum. Received: "
            f"{where}. {_REMEDY}"
        )
