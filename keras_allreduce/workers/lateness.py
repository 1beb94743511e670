"""Measures how long each worker waits, which tells the straggler.

The straggler waits least: all others are in a collective before it comes. So
no clocks of different hosts are compared.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_allreduce.compat.distribute import ResourceVariable
from keras_allreduce.graph_order import free_running_clock, new_counter
from keras_allreduce.workers.in_flight import Counters, InFlight


class TimedCounters(Counters):
    """Also how long the collective was in flight, but for the first time."""

    def __init__(self) -> None:
        super().__init__()
        with tf.init_scope():
            self.seconds = ResourceVariable(np.float64(0), trainable=False)
            self._now_begun = free_running_clock(self.begun)
            self._now_ended = free_running_clock(self.ended)
        self.timed = new_counter()

    def begin(self, ready: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Counts, and then takes the time."""
        # The clock pretends to read the variable that this has counted in.
        return [*super().begin(ready), self._now_begun()]

    def end(
        self, began: Sequence[tf.Tensor], results: Sequence[tf.Tensor]
    ) -> None:
        """Counts, and adds up the time since `begin`."""
        super().end(began, results)
        times, start = began
        first = self._first_of_this_graph()
        with tf.control_dependencies(results):
            seconds = self._now_ended() - start
        counts = times > first
        self.seconds.assign_add(
            tf.where(counts, seconds, 0.0), read_value=False
        )
        self.timed.assign_add(tf.cast(counts, tf.int64), read_value=False)

    def _first_of_this_graph(self) -> int:
        """The count of the first run of the graph that is traced now."""
        with tf.init_scope():
            return int(self.begun.numpy()) + 1


class TimedInFlight(InFlight):
    """The collectives of one strategy that are in flight, and for how long."""

    timed = True

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[str, tuple[float, int]] = {}

    def _new_counters(self) -> TimedCounters:
        return TimedCounters()

    def read_waits(self) -> float:
        """Mean seconds per step in the collective that takes longest.

        Of those in graphs, since the last call. Several are in flight at the
        same time, and all of them wait for a straggler. `nan` if there was no
        step.
        """
        longest = float("nan")
        for name, each in self._all_counters():
            now = float(each.seconds.numpy()), int(each.timed.numpy())
            before = self._read.get(name, (0.0, 0))
            self._read[name] = now
            seconds, steps = now[0] - before[0], now[1] - before[1]
            if steps:
                longest = np.fmax(longest, seconds / steps)
        return float(longest)


def complete(waits: Sequence[float]) -> list[float]:
    """The waits of all workers; all `nan` if a worker has counted no step."""
    if any(math.isnan(each) for each in waits):
        return [math.nan] * len(waits)
    return list(waits)


def lateness_ms(waits: Sequence[float]) -> list[float]:
    """How much later than the first each worker came, in ms, from its wait."""
    return [(max(waits) - each) * 1e3 for each in waits]
