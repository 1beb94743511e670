"""The state of one replica while its thread runs a step."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class Replica:
    """One replica in a step of Keras.

    Attributes:
        share: float32 scalar; its share of the batch, times the number of
            replicas. `None`: 1.
        correction: float32 scalar; what a loss that Keras divides by the sum
            of the sample weights is scaled by beside the share. `None`: 1.
        has_samples: bool scalar; false on an empty replica. `None`: true.
        num_replicas: Number of replicas of all workers.
        scaled: `"loss"` or `"gradients"`: which of them the share scales.
            `None` until Keras scales the loss.
        calls: How often the step has asked for each kind of thing; replicas
            ask in the same order.
        reduced: `id` of each variable whose gradient is the sum already.
        gradients: Those sums, by their `id`.
        assigned: `id` of each variable that it has assigned on its own.
        recorder: What a measurement records; `None` in a step that counts.
        graph: The graph that its step is traced into, if it is.
    """

    share: Any = None
    correction: Any = None
    has_samples: Any = None
    num_replicas: int = 1
    scaled: str | None = None
    calls: Counter[str] = field(default_factory=Counter)
    reduced: set[int] = field(default_factory=set)
    gradients: dict[int, Any] = field(default_factory=dict)
    assigned: set[int] = field(default_factory=set)
    recorder: Any = None
    graph: Any = field(
        default_factory=lambda: _graph_of_thread(), compare=False
    )

    def has_summed(self, value: Any) -> bool:
        """Whether all of a value are gradients that are sums already."""
        flat = tf.nest.flatten(value)
        return bool(flat) and all(id(each) in self.gradients for each in flat)

    @property
    def weight(self) -> Any:
        """Its samples over those of the batch: a float or a float32 scalar."""
        if self.share is None:
            return 1 / self.num_replicas
        return self.share / self.num_replicas

    def next_call(self, kind: str) -> int:
        """Number of the next thing of a kind that the step asks for.

        Outside of a step nothing is counted.
        """
        if self is NO_REPLICA:
            return 0
        self.calls[kind] += 1
        return self.calls[kind] - 1

    def inverse_weight(self) -> Any:
        """1 / `weight`, and 0 on an empty replica."""
        if self.share is None:
            return float(self.num_replicas)
        return tf.math.divide_no_nan(float(self.num_replicas), self.share)


def _graph_of_thread() -> Any:
    """The graph that this thread traces into; `None` if it traces none."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


_thread = threading.local()
NO_REPLICA = Replica()
"""That of a thread that runs no step."""


def current() -> Replica:
    """The replica of this thread; outside of a step one without a share."""
    return getattr(_thread, "replica", NO_REPLICA)


def is_measured() -> bool:
    """Whether this thread runs a step only to measure it."""
    return current().recorder is not None


def sees_one_device() -> bool:
    """Whether this thread runs a step, in which there is one device only."""
    return current() is not NO_REPLICA


@contextlib.contextmanager
def running(replica: Replica) -> Iterator[None]:
    """This thread runs a step of `replica` inside the block."""
    before = current()
    _thread.replica = replica
    try:
        yield
    finally:
        _thread.replica = before


def become(replica: Replica) -> None:
    """Replaces the replica of this thread until its step ends."""
    _thread.replica = replica
