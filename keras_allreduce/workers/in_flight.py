"""Tracks the collectives that are in flight, for the watchdog.

TensorFlow's own timeout starts a thread for each collective, which sleeps until
the time is up: with ten minutes and fifty collectives a second, thirty thousand
of them. Here a collective in a graph counts when it begins and when it has
ended, in two variables of its own, so that none waits for another; the
watchdog reads them once in a while.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce.graph_order import keep_with_graph, new_counter


class Counters:
    """How often one collective of a graph has begun, and ended."""

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


class Flight:
    """One collective, while it is traced or run.

    Attributes:
        results: Takes the results.
        tokens: `ordering_token` of its ops, which keeps TensorFlow from
            running it after the one traced before it: it chains stateful ops
            unless they use different variables.
    """

    def __init__(self, tokens: Sequence[tf.Tensor]):
        self.results: list[tf.Tensor] = []
        self.tokens = list(tokens)


class InFlight:
    """The collectives of one strategy that are in flight."""

    timed = False
    """Whether `read_waits` measures."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: weakref.WeakSet[Counters] = weakref.WeakSet()
        self._seen: weakref.WeakKeyDictionary[Counters, tuple[int, float]] = (
            weakref.WeakKeyDictionary()
        )
        self._calls: dict[object, float] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "InFlight":
        """A copy of the strategy has the same watchdog, which reads this."""
        return self

    @contextlib.contextmanager
    def watched(self, tensors: Sequence[tf.Tensor]) -> Iterator[Flight]:
        """Counts the collective that is traced or run in the block.

        It is in flight from when all of `tensors` are ready until all that
        the block appends to `results` is.
        """
        if tf.executing_eagerly():
            with self.during():
                yield Flight(())
            return
        counters = self._new_counters()
        keep_with_graph(counters)
        with self._lock:
            self._counters.add(counters)
        flight = Flight([counters.begun.handle])
        began = counters.begin(tensors)
        with tf.control_dependencies(began[-1:]):
            yield flight
        counters.end(began, flight.results)

    def _new_counters(self) -> Counters:
        return Counters()

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Counts what runs eagerly in the block as in flight.

        What is only traced there counts by itself.
        """
        if not tf.executing_eagerly():
            yield
            return
        call = object()
        self._calls[call] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[call]

    @property
    def runs_eagerly(self) -> bool:
        """Whether a collective outside of a graph is in flight."""
        return bool(self._calls)

    def read_waits(self) -> float:
        """Mean seconds per step in the slowest collective; `nan`, untimed."""
        return float("nan")

    def waiting_seconds(self) -> float:
        """Seconds since the oldest collective in flight was seen to be so.

        To be called again and again: of a collective in a graph this tells
        how long it has been in flight only from the first call that saw it.
        """
        now = time.monotonic()
        since = [now, *list(self._calls.values())]
        since += [self._since(each, now) for each in self._all_counters()]
        return now - min(since)

    def _all_counters(self) -> list[Any]:
        with self._lock:
            return list(self._counters)

    def _since(self, counters: Counters, now: float) -> float:
        # In this order one that ends in between does not look as in flight.
        begun = int(counters.begun.numpy())
        ended = int(counters.ended.numpy())
        if begun <= ended:
            return now
        seen, since = self._seen.get(counters, (0, now))
        if seen != begun:
            since = now
            self._seen[counters] = (begun, now)
        return since
