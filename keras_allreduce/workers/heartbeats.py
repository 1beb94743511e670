"""Asks the servers of the other workers whether they are there.

C++ threads answer, so a worker that computes, compiles, saves or stands in a
debugger does answer; one that was killed or frozen, or whose network is cut,
does not.
"""

import time

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster

FROZEN_SECONDS = 20.0
"""A worker that has not answered for so long has failed."""

IS_GONE = "is gone"
"""What is wrong with a worker whose port is closed: it may have ended."""

REFUSALS = 3
"""A closed port is asked so often, in case only one connection broke."""

_PROBE_SECONDS, _MOMENT_SECONDS = 2.0, 0.5

# A probe that took so much longer has been frozen with this process.
_FROZEN_HERE_SECONDS = 3.0


class Heartbeats:
    """When each of the other workers has answered.

    Args:
        cluster: The workers.
        limit_seconds: A worker that has not answered for so long has failed.
    """

    def __init__(self, cluster: Cluster, limit_seconds: float):
        self._cluster = cluster
        self._limit_seconds = limit_seconds
        self._asked = dict.fromkeys(cluster.others, time.monotonic())
        self._answered = dict(self._asked)
        self._refusals = dict.fromkeys(cluster.others, 0)

    @property
    def are_unsure(self) -> bool:
        """Whether a worker has refused, but not yet often enough."""
        return any(0 < n < REFUSALS for n in self._refusals.values())

    def due(self, interval_seconds: float) -> list[int]:
        """The workers to ask now.

        Args:
            interval_seconds: How often a worker is asked that answers.
        """
        now = time.monotonic()
        return [
            rank
            for rank in self._cluster.others
            if 0 < self._refusals[rank] < REFUSALS
            or now - self._asked[rank] >= interval_seconds
        ]

    def ask(self, rank: int) -> str | None:
        """Asks a worker, and waits for its answer.

        Returns:
            What is wrong with it: `IS_GONE`, or a part of a sentence.
        """
        asked = self._asked[rank] = time.monotonic()
        patience = min(_PROBE_SECONDS, self._limit_seconds)
        try:
            runtime.check_peer(self._cluster.tasks[rank], patience)
        except tf.errors.DeadlineExceededError:
            now = time.monotonic()
            if now - asked > patience + _FROZEN_HERE_SECONDS:
                self._answered[rank] = now
            silent = now - self._answered[rank]
            if silent < self._limit_seconds:
                return None
            return (
                f"has not answered for {silent:.0f} s: it is frozen, or the "
                "network is cut."
            )
        except tf.errors.FailedPreconditionError:
            return "was started again while this worker was not."
        except tf.errors.OpError:
            self._refusals[rank] += 1
            return IS_GONE if self._refusals[rank] >= REFUSALS else None
        self._answered[rank] = asked
        self._refusals[rank] = 0
        return None

    def answers(self, rank: int) -> bool:
        """Asks a worker once, for a moment; whether it answered."""
        try:
            runtime.check_peer(self._cluster.tasks[rank], _MOMENT_SECONDS)
        except tf.errors.OpError:
            return False
        return True
