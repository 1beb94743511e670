"""Counts the collectives that have begun and ended, for the health monitor.

TensorFlow's own timeout starts a thread for each collective, which sleeps until
the time is up: with ten minutes and fifty collectives a second, thirty thousand
of them. Here a collective in a graph counts when it begins and when it has
ended, in two variables of its own, so that none waits for another; the health
monitor reads them once in a while. The variables belong to the name of the
collective, which a graph that is traced again uses again: so the counts of all
workers are of the same collectives, however often each of them traces.

With `measure_lateness=True` the time in flight is added up too, which tells the
straggler: it waits least, as all others are in a collective before it comes. So
no clocks of different hosts are compared.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_allreduce.compat.distribute import ResourceVariable
from keras_allreduce.graph_order import (
    free_running_clock,
    keep_with_graph,
    new_counter,
)

# Held by the thread that reads counters.
_reading = threading.RLock()

# A key for each block in which none may be read.
_connecting: set[object] = set()


@contextlib.contextmanager
def nothing_is_read() -> Iterator[None]:
    """No counter is read in the block, in which TensorFlow connects.

    It makes its devices anew for another strategy of the process, and ends
    the process if a variable is read meanwhile.
    """
    block = object()
    with _reading:
        _connecting.add(block)
    try:
        yield
    finally:
        with _reading:
            _connecting.remove(block)


class Counters:
    """How often one collective of graphs has begun, and ended."""

    def __init__(self) -> None:
        self.begun, self.ended = new_counter(), new_counter()

    def begin(self, ready: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Counts as soon as all of `ready` is there.

        Returns:
            What `end` needs; the collective has to wait for the last.
        """
        with tf.control_dependencies(ready):
            return [self.begun.assign_add(1)]

    def end(
        self, began: Sequence[tf.Tensor], results: Sequence[tf.Tensor]
    ) -> None:
        """Counts as soon as all of `results` is there."""
        with tf.control_dependencies(results):
            self.ended.assign_add(1, read_value=False)

    def waited(self) -> tuple[float, int]:
        """Seconds in flight, and runs that they are the sum of: none here."""
        return 0.0, 0


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

    def waited(self) -> tuple[float, int]:
        """See `Counters`."""
        return float(self.seconds.numpy()), int(self.timed.numpy())

    def _first_of_this_graph(self) -> int:
        """The count of the first run of the graph that is traced now."""
        with tf.init_scope():
            return int(self.begun.numpy()) + 1


@dataclass(frozen=True)
class Reading:
    """The collectives of one strategy at one time.

    Attributes:
        begun: How many of graphs have begun.
        ended: How many of graphs have ended.
        waiting_seconds: Since the oldest in flight, in a graph or not, was
            seen to be so; 0: none is.
    """

    begun: int
    ended: int
    waiting_seconds: float


class InFlight:
    """The collectives of one strategy that are in flight.

    Args:
        new_counters: Makes the counters of each; with `TimedCounters`
            `read_waits` tells how long they take.

    Attributes:
        clock: Tells the seconds; see `health.AwakeClock`.
        eager: How many collectives outside of graphs have begun.
        on_eager: Called before each of them.
    """

    def __init__(self, new_counters: Callable[[], Counters] = Counters):
        self._new_counters = new_counters
        self.clock: Callable[[], float] = time.monotonic
        self.eager = 0
        self.on_eager: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._counters: dict[str, Counters] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        self._calls: dict[object, float] = {}
        self._last_reading = Reading(0, 0, 0.0)
        self._waits: dict[str, tuple[float, int]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "InFlight":
        """A copy of the strategy has the same monitor, which reads this."""
        return self

    @contextlib.contextmanager
    def watched(
        self, name: str, tensors: Sequence[tf.Tensor]
    ) -> Iterator[tuple[list[tf.Tensor], list[tf.Tensor]]]:
        """Counts the collective that is traced or run in the block.

        It is in flight from when all of `tensors` are ready until all of its
        results are.

        Args:
            name: Name of the collective, the same on all workers.
            tensors: The tensors that it sends.

        Yields:
            An empty list, to which the block appends the results, and the
            `ordering_token` of its ops. That keeps TensorFlow from running it
            after the one traced before it: it chains stateful ops unless they
            use different variables.
        """
        if tf.executing_eagerly():
            self.count_eager()
            with self.during():
                yield [], []
            return
        if not tf.compat.v1.executing_eagerly_outside_functions():
            # Only a session could read the counters of its graph.
            yield [], []
            return
        with self._lock:
            if name not in self._counters:
                self._counters[name] = self._new_counters()
            counters = self._counters[name]
        keep_with_graph(counters)
        results: list[tf.Tensor] = []
        began = counters.begin(tensors)
        with tf.control_dependencies(began[-1:]):
            yield results, [counters.begun.handle]
        counters.end(began, results)

    def count_eager(self) -> None:
        """Counts a collective outside of a graph, which is about to begin."""
        self.on_eager()
        self.eager += 1

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Counts eager ops in the block as in flight.

        Traced ops count by themselves.
        """
        if not tf.executing_eagerly():
            yield
            return
        call = object()
        self._calls[call] = self.clock()
        try:
            yield
        finally:
            del self._calls[call]

    @property
    def runs_eagerly(self) -> bool:
        """Whether a collective outside of a graph is in flight."""
        return bool(self._calls)

    def read(self) -> Reading:
        """Reads the collectives of graphs, and the oldest wait of all.

        To be called again and again: of a collective in a graph this tells
        how long it has been in flight only from the first call that saw it.

        Returns:
            The reading; where nothing may be read, the last one.
        """
        with _reading:
            if not _connecting:
                self._last_reading = self._read_counters()
            return self._last_reading

    def _read_counters(self) -> Reading:
        now = self.clock()
        since = [now, *list(self._calls.values())]
        begun = ended = 0
        for name, each in self._all_counters():
            # In this order one that ends in between is not seen in flight.
            runs = int(each.begun.numpy()), int(each.ended.numpy())
            begun, ended = begun + runs[0], ended + runs[1]
            if runs[0] > runs[1]:
                since.append(self._since(name, runs[0], now))
        return Reading(begun, ended, now - min(since))

    def read_waits(self) -> float:
        """Mean seconds per step in the collective that takes longest.

        Of those in graphs, since the last call. Several are in flight at the
        same time, and all of them wait for a straggler. `nan` if there was no
        step that was timed.
        """
        longest = float("nan")
        for name, each in self._all_counters():
            now, before = each.waited(), self._waits.get(name, (0.0, 0))
            self._waits[name] = now
            seconds, steps = now[0] - before[0], now[1] - before[1]
            if steps:
                longest = np.fmax(longest, seconds / steps)
        return float(longest)

    def _all_counters(self) -> list[tuple[str, Counters]]:
        with self._lock:
            return list(self._counters.items())

    def _since(self, name: str, begun: int, now: float) -> float:
        seen, since = self._seen.get(name, (0, now))
        if seen != begun:
            since = now
            self._seen[name] = (begun, now)
        return since


def lateness_ms(waits: Sequence[float]) -> list[float]:
    """How much later than the first each worker came, in ms, from its wait.

    All `nan` if a worker has counted no step.
    """
    if any(math.isnan(each) for each in waits):
        return [math.nan] * len(waits)
    return [(max(waits) - each) * 1e3 for each in waits]
