"""The places of all workers, in the store of the coordination service.

The store ends with the chief. What the chief says last is read by the others
before it goes, and remembered by them.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers import errors
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import WorkerError
from keras_allreduce.workers.place import Place

# The chief, which reads many, has the store in its own process.
_READ_SECONDS, _CHIEF_READ_SECONDS = 0.5, 0.1
_WRITE_SECONDS, _LAST_WRITE_SECONDS = 1.0, 2.0


class Board:
    """Where each worker publishes its place.

    Args:
        cluster: The workers.
        number: Number of the strategy, the same on all workers.
        answers: Asks another worker whether it is there.

    Attributes:
        published: The last place that this worker has published.
    """

    def __init__(
        self, cluster: Cluster, number: int, answers: Callable[[int], bool]
    ):
        self._cluster = cluster
        self._number = number
        self._answers = answers
        self._writing = threading.Lock()
        self._written: futures.Future[None] | None = None
        self._beat = 0
        self._said_last = False
        self._last: dict[int, Place] = {}
        self.published: Place | None = None

    def publish(self, place: Place) -> None:
        """Publishes where this worker is, unless it has said its last."""
        with self._writing:
            if self._said_last:
                return
            written = self._write(place, _WRITE_SECONDS)
            if written is not None and written.done():
                self.published = place

    def say_last(self, place: Place, seconds: float) -> None:
        """Publishes the place in which this worker ends.

        Args:
            place: What nothing comes after.
            seconds: How long the chief waits until the others know, as long
                as they answer.
        """
        end = time.monotonic() + seconds
        is_chief = self._cluster.rank == 0
        if seconds and not is_chief and not self._answers(0):
            return
        with self._writing:
            if not self._said_last:
                written = self._write(place, min(seconds, _LAST_WRITE_SECONDS))
                self._said_last = written is not None
        if is_chief:
            self._stay(end)

    def read(self, rank: int) -> Place | None:
        """Where another worker is; `None` if it has not said so."""
        is_chief = self._cluster.rank == 0
        seconds = _CHIEF_READ_SECONDS if is_chief else _READ_SECONDS
        with contextlib.suppress(tf.errors.OpError):
            place = Place.from_json(
                runtime.read_published(self._key(rank), seconds)
            )
            if place.is_last:
                self._last[rank] = place
            return place
        return None

    def knows_end_of(self, rank: int) -> bool:
        """Whether the last of another worker has been read."""
        return rank in self._last

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

    def _last_of(self, rank: int) -> Place | None:
        if rank not in self._last:
            self.read(rank)
        return self._last.get(rank)

    def _key(self, rank: int) -> str:
        return f"keras_allreduce/{self._number}/place/{rank}"

    def _write(
        self, place: Place, seconds: float
    ) -> "futures.Future[None] | None":
        """Writes a place; waits until it is there, or the time is over.

        Returns:
            A future, or `None` if the chief has not answered the last time.
        """
        end = time.monotonic() + seconds
        if self._written and futures.wait([self._written], seconds).not_done:
            return None
        self._beat += 1
        self._written = runtime.publish_again(
            self._key(self._cluster.rank),
            replace(place, beat=self._beat).to_json(),
        )
        futures.wait([self._written], max(0, end - time.monotonic()))
        return self._written

    def _stay(self, end: float) -> None:
        left = self._cluster.others
        while left and time.monotonic() < end:
            places = {rank: self.read(rank) for rank in left}
            left = [
                rank
                for rank, place in places.items()
                if not (place and (place.is_last or place.saw_chief_end))
                and self._answers(rank)
            ]
            time.sleep(0.1 if left else 0)
