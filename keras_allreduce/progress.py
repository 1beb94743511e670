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
from typing import Any

import numpy as np
import tensorflow as tf

from keras_allreduce import internals


class _Counters:
    """How often one collective of a graph has begun, and ended."""

    def __init__(self) -> None:
        with tf.init_scope():
            self.begun, self.ended = (
                internals.ResourceVariable(
                    np.int64(0), trainable=False, dtype=tf.int64
                )
                for _ in range(2)
            )


class Progress:
    """The collectives of one strategy that are under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: weakref.WeakSet[_Counters] = weakref.WeakSet()
        self._seen: weakref.WeakKeyDictionary[_Counters, tuple[int, float]] = (
            weakref.WeakKeyDictionary()
        )
        self._calls: dict[object, float] = {}

    def watched(
        self, collective: Callable[[tf.Tensor], tf.Tensor], tensor: tf.Tensor
    ) -> tf.Tensor:
        """Returns `collective(tensor)`, which is under way until it is there.

        It begins when `tensor` is ready.
        """
        if tf.executing_eagerly():
            with self.during():
                return collective(tensor)
        counters = _Counters()
        # The graph keeps them alive, as long as it can run.
        tf.compat.v1.get_default_graph().add_to_collection(
            "keras_allreduce_progress", counters
        )
        with self._lock:
            self._counters.add(counters)
        with tf.control_dependencies([tensor]):
            begun = counters.begun.assign_add(1, read_value=False)
        with tf.control_dependencies([begun]):
            result = collective(tensor)
        with tf.control_dependencies([result]):
            counters.ended.assign_add(1, read_value=False)
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
