"""Asks the servers of the other workers whether they are there.

C++ threads answer, so a worker that computes, compiles, saves or stands in a
debugger does answer; one that was killed or frozen, or whose network is cut,
does not.
"""

import time

import tensorflow as tf

from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster

IS_GONE = "is gone"
"""What is wrong with a worker whose port is closed: it may have ended."""

REFUSALS = 3
"""A closed port is asked so often, in case only one connection broke."""

_PROBE_SECONDS = 2.0


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
        try:
            runtime.check_peer(
                self._cluster.tasks[rank],
                min(_PROBE_SECONDS, self._limit_seconds),
            )
        except tf.errors.DeadlineExceededError:
            silent = time.monotonic() - self._answered[rank]
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
