"""Finds out that workers wait for each other at different places.

A worker that stops an epoch early, decides on numbers of its own, or evaluates
alone never comes to where the others wait. Each publishes where it is when that
changes, and while it waits; a worker that waits reads where the others are.

    tick     worker 0                    worker 1
      1      waits in a step             waits in a sum, publishes beat 1
      2      reads beat 1                publishes beat 2
      3      reads beat 2: they never meet

Two beats, both read while this worker waits, show that the other waited too.

In a tick the chief reads where all are, and another worker where the chief and
one more is. That finds every pair: of two workers at different places, one is
not where the chief is.

A worker that has failed says why in its place, and those that wait for it fail
of the same.
"""

import contextlib
import itertools
import threading
import time
from concurrent import futures
from dataclasses import replace

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers import errors
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import WorkerError, WorkersDifferError
from keras_allreduce.workers.place import Place, never_meet
from keras_allreduce.workers.whereabouts import Whereabouts

# The chief, which reads many, has the store in its own process.
_READ_SECONDS, _CHIEF_READ_SECONDS = 0.5, 0.1
_WRITE_SECONDS = 1.0

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
        number: Number of the strategy, the same on all workers.
    """

    def __init__(self, cluster: Cluster, whereabouts: Whereabouts, number: int):
        self._cluster = cluster
        # The others, one after the other.
        self._in_turn = itertools.cycle(cluster.others[1:] or [0])
        self._whereabouts = whereabouts
        self._number = number
        self._published: Place | None = None
        self._publishing = threading.Lock()
        self._written: futures.Future[None] | None = None
        self._said_last = False
        self._beat = 0
        self._ended: set[int] = set()
        self._failures: dict[int, WorkerError] = {}
        # Places that were read while this worker waits as it does now.
        self._seen: dict[int, Place] = {}
        self._looked = time.monotonic()

    def look(self) -> WorkerError | None:
        """To be called again and again.

        Returns:
            An error if this worker waits for another in vain.
        """
        if self._whereabouts.waits_seconds() < time.monotonic() - self._looked:
            self._seen.clear()
        self._looked = time.monotonic()
        own = self._whereabouts.place()
        own = replace(own, saw_chief_end=self._knows_end_of(0))
        if own.waits_in or own != self._published:
            self._publish(own)
        if own.waits_in:
            return self._compare(own)
        if self._cluster.rank and not self._knows_end_of(0):
            # What it has said ends with it.
            self._read(0)
        return None

    @property
    def waits(self) -> bool:
        """Whether this worker has waited for long enough to ask why."""
        return bool(self._whereabouts.place().waits_in)

    def has_ended(self, rank: int) -> bool:
        """Whether the script of another worker has ended, as it should."""
        if rank not in self._ended:
            self._read(rank)
        return rank in self._ended

    def failure_of(self, rank: int) -> WorkerError | None:
        """The error in which another worker has failed, if it said so."""
        if rank not in self._failures:
            self._read(rank)
        return self._failures.get(rank)

    def say_failure(self, error: WorkerError, seconds: float) -> None:
        """Tells the others why this worker fails.

        Args:
            error: For those that wait for this one, too.
            seconds: How long it may take; see `say_goodbye`.
        """
        failure = type(error).__name__, str(error)
        self._say_last(
            replace(self._whereabouts.place(), failure=failure), seconds
        )

    def say_goodbye(self, seconds: float) -> None:
        """Tells the others that the script of this worker ends as it should.

        Args:
            seconds: How long the chief, with which the store ends, waits for
                those that go on.
        """
        self._say_last(replace(self._whereabouts.place(), ended=True), seconds)

    def _say_last(self, place: Place, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._publishing:
            if self._said_last:
                return
            self._said_last = True
            self._write(place, seconds)
        while not self._cluster.rank and time.monotonic() < end:
            places = [self._read(rank) for rank in self._cluster.others]
            if all(p is None or p.is_last or p.saw_chief_end for p in places):
                return
            time.sleep(0.1)

    def _compare(self, own: Place) -> WorkerError | None:
        for rank in self._read_in_this_tick():
            before, other = self._seen.get(rank), self._read(rank)
            if other is None:
                continue
            if rank in self._failures:
                return self._failures[rank]
            self._seen[rank] = other
            waited = before is not None and (
                before.waits_in == other.waits_in and before.beat < other.beat
            )
            if other.waits_in and not waited and not other.ended:
                other = replace(other, waits_in="")
            if never_meet(own, other):
                return self._error({self._cluster.rank: own, rank: other})
        return None

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

    def _key(self, rank: int) -> str:
        return f"keras_allreduce/{self._number}/place/{rank}"

    def _publish(self, place: Place) -> None:
        with self._publishing:
            if not self._said_last and self._write(place, _WRITE_SECONDS):
                self._published = place

    def _write(self, place: Place, seconds: float) -> bool:
        """Whether the place is there; not if the chief does not answer."""
        end = time.monotonic() + seconds
        if self._written and futures.wait([self._written], seconds).not_done:
            return False
        self._beat += 1
        self._written = runtime.publish_again(
            self._key(self._cluster.rank),
            replace(place, beat=self._beat).to_json(),
        )
        left = max(0, end - time.monotonic())
        return bool(futures.wait([self._written], left).done)

    def _read(self, rank: int) -> Place | None:
        is_chief = self._cluster.rank == 0
        seconds = _CHIEF_READ_SECONDS if is_chief else _READ_SECONDS
        with contextlib.suppress(tf.errors.OpError):
            place = Place.from_json(
                runtime.read_published(self._key(rank), seconds)
            )
            if place.ended:
                self._ended.add(rank)
            if place.failure is not None:
                self._failures[rank] = errors.from_name(*place.failure)
            return place
        return None

    def _knows_end_of(self, rank: int) -> bool:
        return rank in self._ended or rank in self._failures
