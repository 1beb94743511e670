"""Finds out that workers wait for each other at different places.

A worker that stops an epoch early, decides on numbers of its own, or evaluates
alone never comes to where the others wait. Each publishes where it is when that
changes, and while it waits; a worker that waits reads where the others are.

    tick     worker 0                    worker 1
      1      waits in a step             waits in a sum, publishes beat 1
      2      reads beat 1                publishes beat 2
      3      reads beat 2: they never meet

Two beats, both read while this worker waits, show that the other waited too.
"""

import contextlib
import threading
import time
from dataclasses import replace

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.place import Place, never_meet
from keras_allreduce.workers.whereabouts import Whereabouts

_READ_SECONDS = 0.5

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
        self._whereabouts = whereabouts
        self._number = number
        self._published: Place | None = None
        self._publishing = threading.Lock()
        self._said_goodbye = False
        self._beat = 0
        self._ended: set[int] = set()
        # Places that were read while this worker waits as it does now.
        self._seen: dict[int, Place] = {}
        self._looked = time.monotonic()

    def look(self) -> str | None:
        """To be called again and again.

        Returns:
            A message if this worker waits for another in vain.
        """
        if self._whereabouts.waits_seconds() < time.monotonic() - self._looked:
            self._seen.clear()
        self._looked = time.monotonic()
        own = self._whereabouts.place()
        own = replace(own, saw_chief_end=0 in self._ended)
        if own.waits_in or own != self._published:
            self._publish(own)
        if own.waits_in:
            return self._compare(own)
        if self._cluster.rank and 0 not in self._ended:
            # What it has said ends with it.
            self._read(0)
        return None

    def has_ended(self, rank: int) -> bool:
        """Whether the script of another worker has ended, as it should."""
        if rank not in self._ended:
            self._read(rank)
        return rank in self._ended

    def say_goodbye(self, seconds: float) -> None:
        """Tells the others that the script of this worker ends as it should.

        Args:
            seconds: How long the chief, with which the store ends, waits for
                those that go on.
        """
        with self._publishing:
            self._said_goodbye = True
        self._write(replace(self._whereabouts.place(), ended=True))
        end = time.monotonic() + seconds
        while not self._cluster.rank and time.monotonic() < end:
            places = [self._read(rank) for rank in self._cluster.others]
            if all(p is None or p.ended or p.saw_chief_end for p in places):
                return
            time.sleep(0.1)

    def _compare(self, own: Place) -> str | None:
        for rank in self._cluster.others:
            before, other = self._seen.get(rank), self._read(rank)
            if other is None:
                continue
            self._seen[rank] = other
            waited = before is not None and (
                before.waits_in == other.waits_in and before.beat < other.beat
            )
            if other.waits_in and not waited and not other.ended:
                other = replace(other, waits_in="")
            if never_meet(own, other):
                return self._message({self._cluster.rank: own, rank: other})
        return None

    def _message(self, places: dict[int, Place]) -> str:
        where = "; ".join(
            f"{self._cluster.name(rank)} {places[rank]}"
            for rank in sorted(places)
        )
        return (
            "All workers must take part in each step and sum. Received: "
            f"{where}. {_REMEDY}"
        )

    def _key(self, rank: int) -> str:
        return f"keras_allreduce/{self._number}/place/{rank}"

    def _publish(self, place: Place) -> None:
        with self._publishing:
            if not self._said_goodbye:
                self._write(place)
        self._published = place

    def _write(self, place: Place) -> None:
        self._beat += 1
        with contextlib.suppress(tf.errors.OpError):
            runtime.publish_again(
                self._key(self._cluster.rank),
                replace(place, beat=self._beat).to_json(),
            )

    def _read(self, rank: int) -> Place | None:
        with contextlib.suppress(tf.errors.OpError):
            place = Place.from_json(
                runtime.read_published(self._key(rank), _READ_SECONDS)
            )
            if place.ended:
                self._ended.add(rank)
            return place
        return None
