"""Which collectives are under way, and for how long.

TensorFlow's own timeout starts a thread for each collective, which sleeps until
the time is up: with ten minutes and fifty collectives a second, thirty thousand
of them. Here a collective in a graph counts when it begins and when it has
ended, in two variables of its own, so that none waits for another; who watches
looks at them once in a while.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.graph_order import free_running_clock

_T = TypeVar("_T", tf.Tensor, list[tf.Tensor])


class _Counters:
    """How often one collective of a graph has begun, and ended.

    Args:
        timed: Also how long it was under way in all, but for the first time.
    """

    def __init__(self, timed: bool) -> None:
        with tf.init_scope():
            self.begun, self.ended = (
                distribute.ResourceVariable(
                    np.int64(0), trainable=False, dtype=tf.int64
                )
                for _ in range(2)
            )
            if timed:
                self.seconds = distribute.ResourceVariable(
                    np.float64(0), trainable=False
                )
                self.timed = distribute.ResourceVariable(
                    np.int64(0), trainable=False, dtype=tf.int64
                )
                self.now_begun = free_running_clock(self.begun)
                self.now_ended = free_running_clock(self.ended)


class Progress:
    """The collectives of one strategy that are under way.

    Args:
        timed: Whether `read_waits` tells how long they were.
    """

    def __init__(self, timed: bool = False) -> None:
        self.timed = timed
        self._read: weakref.WeakKeyDictionary[_Counters, tuple[float, int]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()
        self._counters: weakref.WeakSet[_Counters] = weakref.WeakSet()
        self._seen: weakref.WeakKeyDictionary[_Counters, tuple[int, float]] = (
            weakref.WeakKeyDictionary()
        )
        self._calls: dict[object, float] = {}

    def watched(self, collective: Callable[[_T], _T], tensors: _T) -> _T:
        """Returns `collective(tensors)`, under way until all of it is there.

        It begins when all of `tensors` are ready: one tensor, or a list.
        """
        if tf.executing_eagerly():
            with self.during():
                return collective(tensors)
        counters = _Counters(self.timed)
        # The graph keeps them alive, as long as it can run.
        tf.compat.v1.get_default_graph().add_to_collection(
            "keras_allreduce_progress", counters
        )
        with self._lock:
            self._counters.add(counters)
        with tf.control_dependencies(tf.nest.flatten(tensors)):
            times = counters.begun.assign_add(1)
        start = counters.now_begun() if self.timed else times
        with tf.control_dependencies([start]):
            result = collective(tensors)
        results = tf.nest.flatten(result)
        with tf.control_dependencies(results):
            counters.ended.assign_add(1, read_value=False)
        if self.timed:
            with tf.control_dependencies(results):
                seconds = counters.now_ended() - start
            counts = times > 1
            counters.seconds.assign_add(
                tf.where(counts, seconds, 0.0), read_value=False
            )
            counters.timed.assign_add(
                tf.cast(counts, tf.int64), read_value=False
            )
        return result

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """What runs eagerly in the block is under way."""
        call = object()
        self._calls[call] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[call]

    def read_waits(self) -> float:
        """Mean seconds per step in the collective that takes longest.

        Of those in graphs, since the last call. Several are under way at the
        same time, and all of them wait for a worker that is late. `nan` if
        there was no step, or if they are not `timed`.
        """
        with self._lock:
            counters = list(self._counters)
        if not self.timed:
            return float("nan")
        longest = float("nan")
        for each in counters:
            now = float(each.seconds.numpy()), int(each.timed.numpy())
            before = self._read.get(each, (0.0, 0))
            self._read[each] = now
            seconds, steps = now[0] - before[0], now[1] - before[1]
            if steps:
                longest = np.fmax(longest, seconds / steps)
        return float(longest)

    def waiting_seconds(self) -> float:
        """Seconds since the oldest collective under way was seen to be so.

        To be called again and again: of a collective in a graph this tells
        how long it has been under way only from the first call that saw it.
        """
        now = time.monotonic()
        with self._lock:
            counters = list(self._counters)
        since = [now, *list(self._calls.values())]
        since += [self._since(each, now) for each in counters]
        return now - min(since)

    def _since(self, counters: Any, now: float) -> float:
        # In this order one that ends in between does not look as if under way.
        begun = int(counters.begun.numpy())
        ended = int(counters.ended.numpy())
        if begun <= ended:
            return now
        seen, since = self._seen.get(counters, (0, now))
        if seen != begun:
            since = now
            self._seen[counters] = (begun, now)
        return since
