"""Publishes the next action of a worker, and reads those of the others.

The store is that of TensorFlow's coordination service. It ends with the chief.

    worker 1, 2, ...        chief
    publish own    ------>  read each
    read all       <------  publish all

So every worker but the chief reads once, however many workers there are. What
nobody may miss, such as why the chief fails, the others acknowledge, and the
chief, with which the store ends, lingers until they have.

All keys are made here: `keras_allreduce/<strategy>/<name>/<worker>`.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from concurrent import futures

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers import errors
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerError,
    WorkerLostError,
    WorkersDifferError,
    WorkerTimeoutError,
)
from keras_allreduce.workers.timing import TIMING

_numbers = itertools.count()

_ALL = "all"


class KeyValueStore:
    """The texts that the workers publish under one strategy.

    Args:
        cluster: The workers.
        timeout_seconds: How long to wait for what another publishes.
        failure: Returns an error once the workers cannot go on.
        cause: The same, after a connection broke: first asks which worker
            failed.
        answers: Asks another worker whether it is there.
        clock: Tells the seconds; see `health.AwakeClock`.

    Attributes:
        answers: The same.
    """

    def __init__(
        self,
        cluster: Cluster,
        timeout_seconds: float,
        failure: Callable[[], WorkerError | None] = lambda: None,
        cause: Callable[[], WorkerError | None] = lambda: None,
        answers: Callable[[int], bool] = lambda rank: True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._cluster = cluster
        self._timeout_seconds = timeout_seconds
        self._failure = failure
        self._cause = cause
        self.answers = answers
        self._clock = clock
        # Strategies are made in one order on all workers.
        self._number = next(_numbers)
        self._replaced: dict[str, futures.Future[None]] = {}
        self._acknowledged: dict[str, futures.Future[None]] = {}

    def all_gather(self, point: int, kind: str, text: str) -> list[str]:
        """Publishes a text and returns those of all workers, by rank.

        Args:
            point: Number of the point in the script of each worker.
            kind: Action of the worker there; must be the same on all.
            text: The text of this worker.

        Raises:
            WorkersDifferError: If another worker does something else there.
            WorkerTimeoutError: If another worker does not come in time.
            WorkerLostError: If it has failed.
        """
        name = f"point {point}"
        own = json.dumps({"kind": kind, "text": text})
        if self._cluster.rank == 0:
            said = self._gather(name, own)
        else:
            self._publish(name, own, self._cluster.rank)
            try:
                said = _unpacked(self._read(name, _ALL, self._timeout_seconds))
            except WorkerTimeoutError:
                raise self._too_late(self._missing(name)) from None
        found = [json.loads(each) for each in said]
        kinds = [each["kind"] for each in found]
        if len(set(kinds)) > 1:
            self.linger(point)
            raise self._unlike(kinds)
        return [str(each["text"]) for each in found]

    def _gather(self, name: str, own: str) -> list[str]:
        """Reads the texts of all workers, on the chief, and publishes them."""
        end = self._clock() + self._timeout_seconds
        try:
            others = [
                self._read(name, rank, end - self._clock())
                for rank in self._cluster.others
            ]
        except WorkerError as error:
            # The others learn the reason, not that the chief has ended.
            with contextlib.suppress(WorkerError):
                self._publish(name, _packed_error(error), _ALL)
            raise
        texts = [own, *others]
        self._publish(name, _packed(texts), _ALL)
        return texts

    def get(self, name: str, rank: int) -> str | None:
        """Reads what another worker has put last, or `None`.

        Waits for a moment; of one that cannot be reached nothing is read.
        """
        is_chief = self._cluster.rank == 0
        seconds = TIMING.read_by_chief if is_chief else TIMING.read
        with contextlib.suppress(tf.errors.OpError):
            return runtime.read_published(self._key(name, rank), seconds)
        return None

    def put(self, name: str, text: str, seconds: float) -> bool:
        """Puts a text in the place of the last.

        Args:
            name: Its subject.
            text: The text of this worker.
            seconds: How long to wait until it is there.

        Returns:
            Whether it is there, or on its way; else the last one still is.
        """
        end = time.monotonic() + seconds
        last = self._replaced.get(name)
        if last is not None and futures.wait([last], seconds).not_done:
            return False
        written = runtime.publish(
            self._key(name, self._cluster.rank), text, overwrite=True
        )
        self._replaced[name] = written
        futures.wait([written], max(0, end - time.monotonic()))
        return True

    def acknowledge(self, what: int | str, seconds: float = 0.0) -> None:
        """Lets the chief know that it need not linger for this worker.

        Args:
            what: See `linger`.
            seconds: How long to wait until the chief knows.
        """
        name = _read_of(what)
        if name not in self._acknowledged:
            key = self._key(name, self._cluster.rank)
            self._acknowledged[name] = runtime.publish(key, "")
        futures.wait([self._acknowledged[name]], seconds)

    def linger(self, what: int | str, seconds: float = TIMING.linger) -> None:
        """Keeps the chief until the others have read something, or are gone.

        Called by the others it acknowledges that this worker has.

        Args:
            what: Number of a point, or another name.
            seconds: How long, at most.
        """
        if self._cluster.rank:
            self.acknowledge(what, seconds)
            return
        end = time.monotonic() + seconds
        left = self._cluster.others
        while left and time.monotonic() < end:
            left = [
                rank
                for rank in left
                if self.get(_read_of(what), rank) is None and self.answers(rank)
            ]

    def _key(self, name: str, of: int | str) -> str:
        return f"keras_allreduce/{self._number}/{name}/{of}"

    def _publish(self, name: str, text: str, of: int | str) -> None:
        """Returns when the text of this worker, or of all, is there."""
        written = runtime.publish(self._key(name, of), text)
        while not futures.wait([written], TIMING.poll).done:
            failure = self._failure()
            if failure is not None:
                raise failure
        error = written.exception()
        if isinstance(error, tf.errors.OpError):
            raise self._lost(name, error) from error

    def _read(self, name: str, of: int | str, timeout_seconds: float) -> str:
        """Waits for the text of a worker, or of all."""
        end = self._clock() + timeout_seconds
        while True:
            left = max(end - self._clock(), 0)
            try:
                return runtime.read_published(
                    self._key(name, of), min(TIMING.poll, left)
                )
            except tf.errors.DeadlineExceededError:
                failure = self._failure()
                if failure is not None:
                    raise failure from None
                if not left:
                    raise self._too_late(0 if of == _ALL else int(of)) from None
            except tf.errors.OpError as error:
                raise self._lost(name, error) from error

    def _missing(self, name: str) -> int:
        """The first worker that has not published; else the chief."""
        for rank in self._cluster.others[1:]:
            try:
                runtime.read_published(self._key(name, rank), TIMING.poll)
            except tf.errors.OpError:
                return rank
        return 0

    def _unlike(self, kinds: list[str]) -> WorkersDifferError:
        rank = next(r for r, kind in enumerate(kinds) if kind != kinds[0])
        return WorkersDifferError(
            "All workers must do the same at each point of the script. "
            f"Received: {self._cluster.name(0)} is at {kinds[0]}, "
            f"{self._cluster.name(rank)} is at {kinds[rank]}. Run the same "
            "script on all workers, and make the same calls."
        )

    def _too_late(self, rank: int) -> WorkerTimeoutError:
        return WorkerTimeoutError(
            "All workers must make the same models and steps, within "
            f"timeout_seconds={self._timeout_seconds:g} of each other. "
            f"Received: nothing from {self._cluster.name(rank)}. Run the same "
            "script on all workers; look at that worker's log."
        )

    def _lost(self, name: str, error: tf.errors.OpError) -> WorkerError:
        return self._cause() or WorkerLostError(
            "All workers must stay while they compare what they do. "
            f"Received: {self._cluster.name(0)} is not there to compare the "
            f"{name} ({error.message.splitlines()[0]}). Look at its log, then "
            "start all workers again."
        )


def _read_of(what: int | str) -> str:
    return f"read of {what}"


def _packed(texts: list[str]) -> str:
    """The texts of all workers as one, each different one once."""
    unlike = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return json.dumps(
        {"texts": list(unlike), "of workers": [unlike[text] for text in texts]}
    )


def _packed_error(error: WorkerError) -> str:
    name, message = errors.name_and_message(error)
    return json.dumps({"error": name, "message": message})


def _unpacked(packed: str) -> list[str]:
    """Inverse of `_packed`; raises what `_packed_error` has made of."""
    said = json.loads(packed)
    if "error" in said:
        raise errors.from_name(said["error"], said["message"])
    return [said["texts"][number] for number in said["of workers"]]
