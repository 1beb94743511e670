"""Publishes what a worker is about to do, and reads what the others do.

The store is that of TensorFlow's coordination service. It ends with the chief.
"""

import functools
import itertools
import threading
import time
from collections.abc import Callable

import tensorflow as tf
from absl import logging

from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerError,
    WorkerLostError,
    WorkerTimeoutError,
)

_numbers = itertools.count()

_READ_SECONDS = 1.0
_GRACE_SECONDS = 10.0


class Store:
    """The texts that the workers publish under one strategy.

    Args:
        cluster: The workers.
        timeout_seconds: How long to wait for what another publishes.
        failure: Returns an error once the workers cannot go on.

    Attributes:
        number: Number of the strategy, the same on all workers.
    """

    def __init__(
        self,
        cluster: Cluster,
        timeout_seconds: float,
        failure: Callable[[], WorkerError | None],
    ):
        self._cluster = cluster
        self._timeout_seconds = timeout_seconds
        self._failure = failure
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
        self._publish(name, value)
        return [
            value
            if rank == self._cluster.rank
            else self._read(name, rank, self._timeout_seconds)
            for rank in range(len(self._cluster.tasks))
        ]

    def let_all_read(self, name: str) -> None:
        """Keeps the chief, with which the store ends, until all have read."""
        self._publish(f"{name} has been read", "")
        if self._cluster.rank == 0:
            for rank in self._cluster.others:
                try:
                    self._read(f"{name} has been read", rank, _GRACE_SECONDS)
                except WorkerError:
                    return

    def _key(self, name: str, rank: int) -> str:
        return f"keras_allreduce/{self.number}/{name}/{rank}"

    def _publish(self, name: str, value: str) -> None:
        # Without an end for a chief that does not answer, hence aside.
        found: list[tf.errors.OpError] = []

        def publish() -> None:
            try:
                runtime.publish(self._key(name, self._cluster.rank), value)
            except tf.errors.OpError as error:
                found.append(error)

        thread = threading.Thread(target=publish, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_READ_SECONDS)
            failure = self._failure()
            if failure is not None and thread.is_alive():
                raise failure
        if found:
            raise self._failed(name, found[0]) from found[0]

    def _read(self, name: str, rank: int, timeout_seconds: float) -> str:
        end = time.monotonic() + timeout_seconds
        while True:
            left = end - time.monotonic()
            try:
                return runtime.read_published(
                    self._key(name, rank), min(_READ_SECONDS, max(left, 0))
                )
            except tf.errors.DeadlineExceededError:
                failure = self._failure()
                if failure is not None:
                    raise failure from None
                if left <= 0:
                    raise WorkerTimeoutError(
                        "All workers must make the same models and steps, "
                        f"within timeout_seconds={timeout_seconds:g} of each "
                        "other. Received: nothing from "
                        f"{self._cluster.name(rank)}. Run the same script on "
                        "all workers; look at that worker's log."
                    ) from None
            except tf.errors.OpError as error:
                raise self._failed(name, error) from error

    def _failed(self, name: str, error: tf.errors.OpError) -> WorkerError:
        return self._failure() or WorkerLostError(
            "All workers must stay while they compare what they do. "
            f"Received: {self._cluster.name(0)} is not there to compare the "
            f"{name} ({error.message.splitlines()[0]}). Look at its log, then "
            "start all workers again."
        )


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
) -> Store | NoStore:
    """Returns the store of the workers, as far as TensorFlow has one."""
    if runtime.has_store():
        return Store(cluster, timeout_seconds, failure)
    return NoStore(cluster)


@functools.cache
def _say_once() -> None:
    logging.warning(
        "keras_allreduce: TensorFlow's coordination service is switched off. "
        "Workers train without checks that their models, steps and options "
        "are the same, and one that has ended counts as failed. Leave "
        "`service_type` alone to have them."
    )
