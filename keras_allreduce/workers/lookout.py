"""Finds out that workers wait for each other at different places.

A worker that stops an epoch early, decides on numbers of its own, or evaluates
alone never comes to where the others wait. Each publishes where it is when that
changes, and while it waits; a worker that waits reads where the others are.

    tick     worker 0                    worker 1
      1      waits in a step             waits in a sum, publishes beat 1
      2      reads beat 1                publishes beat 2
      3      reads beat 2: they never meet

Two beats, both read while this worker waits and a second apart, show that the
other waited too.

In a tick the chief reads where all are, and another worker where the chief and
one more is. That finds every pair: of two workers at different places, one is
not where the chief is.

A worker that has failed says why in its place, and those that wait for it fail
of the same.
"""

import itertools
import time
from dataclasses import replace

from keras_allreduce.workers.board import Board
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerError,
    WorkersDifferError,
    name_and_message,
)
from keras_allreduce.workers.place import Place, never_meet
from keras_allreduce.workers.whereabouts import Whereabouts

# One worker may have all of a sum while another still receives the rest.
_APART_SECONDS = 1.0

_REMEDY = (
    "All workers must make the same calls, and stop in the same step. What a "
    "callback decides, it must decide on all workers, by numbers that are the "
    "same on all: the logs are, time and local values are not."
)


class Lookout:
    """Publishes where this worker is, and reads where the others are.

    Args:
        cluster: The workers.
        whereabouts: Where this worker is.
        board: Where all publish.

    Attributes:
        waits: Whether this worker waited for others at the last look.
    """

    def __init__(
        self, cluster: Cluster, whereabouts: Whereabouts, board: Board
    ):
        self._cluster = cluster
        # The others, one after the other.
        self._in_turn = itertools.cycle(cluster.others[1:] or [0])
        self._whereabouts = whereabouts
        self._board = board
        # Places that were first read while this worker waits as it does now,
        # and when.
        self._seen: dict[int, tuple[Place, float]] = {}
        self._looked = time.monotonic()
        self.waits = False

    def look(self) -> WorkerError | None:
        """To be called again and again.

        Returns:
            An error if this worker waits for another in vain.
        """
        if self._whereabouts.waits_seconds() < time.monotonic() - self._looked:
            self._seen.clear()
        self._looked = time.monotonic()
        own = self._whereabouts.place()
        own = replace(own, saw_chief_end=self._board.knows_end_of(0))
        self.waits = bool(own.waits_in)
        if own.waits_in or own != self._board.published:
            self._board.publish(own)
        if own.waits_in:
            return self._compare(own)
        if self._cluster.rank and not self._board.knows_end_of(0):
            # What it has said ends with it.
            self._board.read(0)
        return None

    def say_failure(self, error: WorkerError, seconds: float) -> None:
        """Tells the others why this worker fails.

        Args:
            error: For those that wait for this one, too.
            seconds: See `Board.say_last`.
        """
        failure = name_and_message(error)
        place = replace(self._whereabouts.place(), failure=failure)
        self._board.say_last(place, seconds)

    def say_goodbye(self, seconds: float) -> None:
        """Tells the others that the script of this worker ends as it should.

        Args:
            seconds: See `Board.say_last`.
        """
        place = replace(self._whereabouts.place(), ended=True)
        self._board.say_last(place, seconds)

    def _compare(self, own: Place) -> WorkerError | None:
        for rank in self._read_in_this_tick():
            other = self._board.read(rank)
            if other is None:
                continue
            if other.failure is not None:
                return self._board.failure_of(rank)
            if not self._has_waited(rank, other):
                other = replace(other, waits_in="")
            if never_meet(own, other):
                return self._error({self._cluster.rank: own, rank: other})
        return None

    def _has_waited(self, rank: int, other: Place) -> bool:
        """Whether another waits as it did when it was first read."""
        now = time.monotonic()
        first, since = self._seen.setdefault(rank, (other, now))
        if not other.waits_in or first.waits_in != other.waits_in:
            self._seen[rank] = other, now
            return False
        return first.beat < other.beat and now - since >= _APART_SECONDS

    def _read_in_this_tick(self) -> list[int]:
        if self._cluster.rank == 0:
            return self._cluster.others
        return sorted({0, next(self._in_turn)})

    def _error(self, places: dict[int, Place]) -> WorkersDifferError:
        where = "; ".join(
            f"{self._cluster.name(rank)} {places[rank]}"
            for rank in sorted(places)
        )
        return WorkersDifferError(
            "All workers must take part in each step and sum. Received: "
            f"{where}. {_REMEDY}"
        )
