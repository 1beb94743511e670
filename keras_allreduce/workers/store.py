"""Publishes what a worker is about to do, and reads what the others do.

The store is that of TensorFlow's coordination service. It ends with the chief.

    worker 1, 2, ...        chief
    publish own    ------>  read each
    read all       <------  publish all

So every worker but the chief reads once, however many workers there are.
"""

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable
from concurrent import futures

import tensorflow as tf
from absl import logging

from keras_allreduce.compat import runtime
from keras_allreduce.workers import errors
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerError,
    WorkerLostError,
    WorkerTimeoutError,
)
from keras_allreduce.workers.timing import TIMING

_numbers = itertools.count()

_ALL = "all"


class Store:
    """The texts that the workers publish under one strategy.

    Args:
        cluster: The workers.
        timeout_seconds: How long to wait for what another publishes.
        failure: Returns an error once the workers cannot go on.
        cause: The same, after a connection broke: asks first who is gone.

    Attributes:
        number: Number of the strategy, the same on all workers.
    """

    def __init__(
        self,
        cluster: Cluster,
        timeout_seconds: float,
        failure: Callable[[], WorkerError | None],
        cause: Callable[[], WorkerError | None],
    ):
        self._cluster = cluster
        self._timeout_seconds = timeout_seconds
        self._failure = failure
        self._cause = cause
        # Strategies are made in one order on all workers.
        self.number = next(_numbers)

    is_shared = True
    """Whether others read what a worker publishes."""

    def exchange(self, name: str, value: str) -> list[str]:
        """Publishes a text and returns those of all workers, by rank.

        Args:
            name: What it is about; not used before.
            value: The text of this worker.

        Raises:
            WorkerTimeoutError: If another worker does not publish its own in
                time.
            WorkerLostError: If it has failed.
        """
        if self._cluster.rank == 0:
            return self._gather(name, value)
        self._publish(name, value)
        try:
            packed = self._read(name, _ALL, self._timeout_seconds)
        except WorkerTimeoutError:
            raise self._too_late(self._missing(name)) from None
        return _unpacked(packed)

    def _gather(self, name: str, value: str) -> list[str]:
        """Reads the texts of all workers, on the chief, and publishes them."""
        end = time.monotonic() + self._timeout_seconds
        try:
            others = [
                self._read(name, rank, end - time.monotonic())
                for rank in self._cluster.others
            ]
        except WorkerError as error:
            # The others learn the reason, not that the chief has ended.
            with contextlib.suppress(WorkerError):
                self._publish(name, _packed_error(error), _ALL)
            raise
        texts = [value, *others]
        self._publish(name, _packed(texts), _ALL)
        return texts

    def let_all_read(self, name: str) -> None:
        """Keeps the chief, with which the store ends, until all have read."""
        read = f"{name} has been read"
        if self._cluster.rank:
            self._publish(read, "")
            return
        end = time.monotonic() + TIMING.linger
        with contextlib.suppress(WorkerError):
            for rank in self._cluster.others:
                self._read(read, rank, end - time.monotonic())

    def _key(self, name: str, of: int | str) -> str:
        return f"keras_allreduce/{self.number}/{name}/{of}"

    def _publish(
        self, name: str, value: str, of: int | str | None = None
    ) -> None:
        """Returns when the value of this worker, or of all, is there."""
        key = self._key(name, self._cluster.rank if of is None else of)
        written = runtime.publish(key, value)
        while not futures.wait([written], TIMING.poll).done:
            failure = self._failure()
            if failure is not None:
                raise failure
        error = written.exception()
        if isinstance(error, tf.errors.OpError):
            raise self._lost(name, error) from error

    def _read(self, name: str, of: int | str, timeout_seconds: float) -> str:
        """Waits for the value of a worker, or of all."""
        end = time.monotonic() + timeout_seconds
        while True:
            left = max(end - time.monotonic(), 0)
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


def _packed(texts: list[str]) -> str:
    """The texts of all workers as one, each different one once."""
    unlike = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return json.dumps([list(unlike), [unlike[text] for text in texts]])


def _packed_error(error: WorkerError) -> str:
    return json.dumps(errors.name_and_message(error))


def _unpacked(packed: str) -> list[str]:
    """Inverse of `_packed`; raises what `_packed_error` has made of."""
    unlike, numbers = json.loads(packed)
    if isinstance(unlike, str):
        raise errors.from_name(unlike, numbers)
    return [unlike[number] for number in numbers]


class NoStore:
    """What there is without TensorFlow's coordination service: no checks.

    Args:
        cluster: The workers.
    """

    def __init__(self, cluster: Cluster):
        self._num_workers = len(cluster.tasks)
        _say_once()

    is_shared = False
    """Whether others read what a worker publishes."""

    def exchange(self, name: str, value: str) -> list[str]:
        """Returns the text of this worker for all of them."""
        return [value] * self._num_workers

    def let_all_read(self, name: str) -> None:
        """Returns at once: there is nothing to read."""


def store_of(
    cluster: Cluster,
    timeout_seconds: float,
    failure: Callable[[], WorkerError | None],
    cause: Callable[[], WorkerError | None],
) -> Store | NoStore:
    """Returns the store of the workers, as far as TensorFlow has one."""
    if runtime.has_store():
        return Store(cluster, timeout_seconds, failure, cause)
    return NoStore(cluster)


@functools.cache
def _say_once() -> None:
    logging.warning(
        "keras_allreduce: TensorFlow's coordination service is switched off. "
        "Workers train without checks that their models, steps and options "
        "are the same, and one that has ended counts as failed. Leave "
        "`service_type` alone to have them."
    )
