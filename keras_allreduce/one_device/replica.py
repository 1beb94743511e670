"""The replicas, the step in flight, and the replica that a thread runs.

A step calls its strategy through the interface `Replicas`. One value per thread
says which step, and which replica of it, the thread runs, so that models of one
strategy may train in several threads at once:

    thread                                       step    replica
    that called the step; merge_calls run here   it      NO_REPLICA
    of a replica                                 it      its own
    in which an optimizer, called in a           it      NO_REPLICA
      merge_call, updates one replica
    any other                                    None    NO_REPLICA
"""

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import tensorflow as tf

from keras_allreduce.compat import graphs
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.reduce.process_group import ProcessGroup


class Replicas(Protocol):
    """The replicas of one process, among those of all workers.

    `strategy/extended.py` implements it for all strategies.
    """

    @property
    def devices(self) -> Sequence[str]:
        """Device of each replica of this worker."""

    @property
    def group(self) -> ProcessGroup:
        """The processes; each has as many replicas as this one."""

    def local_values(self, value: Any) -> Sequence[Any]:
        """The parts of a distributed value, one for each of `devices`.

        Empty if `value` is not distributed.
        """

    def sum_gradients(
        self, gradients: Sequence[Any], weights: Sequence[tf.Tensor] = ()
    ) -> list[Any]:
        """Sums distributed gradients over all replicas of all workers.

        Args:
            gradients: Distributed values, one per variable.
            weights: float32 scalars on the host, one for each of `devices`:
                the gradients of each replica are scaled by its weight first,
                and those of weight 0 count 0 even if they are NaN. Empty: all
                weigh 1.

        Returns:
            Distributed values with the sum on every replica.
        """


@dataclass(frozen=True)
class Replica:
    """One replica in a step of Keras.

    Attributes:
        share: float32 scalar; its share of the batch, times the number of
            replicas. `None`: 1.
        correction: float32 scalar; scale beside the share of a loss that
            Keras divides by the sum of the sample weights. `None`: 1.
        has_samples: bool scalar; false on an empty replica. `None`: true.
        num_replicas: Number of replicas of all workers.
        calls: How often the step has asked for each kind of thing; replicas
            ask in the same order.
        reduced: `id` of each variable whose gradient is the sum already.
        gradients: Those sums, by their `id`.
        assigned: `id` of each variable that it has assigned on its own.
        differentiated: The scalars that its losses are linear in, by `id`.
        metric_results: The results of metrics that it has read, by `id`.
        functions: Targets and outputs of functions, by `id` of the metric
            that takes the mean of their values.
        recorder: Records a measurement; `None` in a step that counts.
        graph: The graph that its step is traced into, if it is.
    """

    share: Any = None
    correction: Any = None
    has_samples: Any = None
    num_replicas: int = 1
    calls: Counter[str] = field(default_factory=Counter)
    reduced: set[int] = field(default_factory=set)
    gradients: dict[int, Any] = field(default_factory=dict)
    assigned: set[int] = field(default_factory=set)
    differentiated: dict[int, Any] = field(default_factory=dict)
    metric_results: dict[int, Any] = field(default_factory=dict)
    functions: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    recorder: Any = None
    graph: Any = field(default_factory=graphs.of_thread, compare=False)

    def have_summed(
        self, variables: Sequence[Any], gradients: Sequence[Any]
    ) -> None:
        """The gradients of variables are sums over all replicas now."""
        self.reduced.update(map(keras_compat.identity_of, variables))
        self.gradients.update(
            (id(each), each) for each in gradients if each is not None
        )

    def has_summed_any(self, variables: Sequence[Any]) -> bool:
        """Whether the gradient of one of the variables is a sum already."""
        return any(
            keras_compat.identity_of(each) in self.reduced for each in variables
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


NO_REPLICA = Replica()
"""The state of a thread that runs no replica."""


@dataclass(frozen=True)
class Current:
    """The step that a thread runs.

    Attributes:
        step: The step in flight, a `CurrentStep`; `None` if there is none.
        replica: The replica of it.
        updates_locally: Whether the replicas update their variables alike,
            each its own part.
    """

    step: Any = None
    replica: Replica = NO_REPLICA
    updates_locally: bool = False


_NOTHING = Current()
_thread = threading.local()


def current_of_thread() -> Current:
    """The step that this thread runs."""
    return getattr(_thread, "current", _NOTHING)


@contextlib.contextmanager
def entered(current_of_thread: Current) -> Iterator[None]:
    """This thread runs the same as another one inside the block."""
    before = getattr(_thread, "current", _NOTHING)
    _thread.current = current_of_thread
    try:
        yield
    finally:
        _thread.current = before


def current_step() -> Any:
    """The step that this thread runs, or runs a replica of; or `None`."""
    return current_of_thread().step


def current() -> Replica:
    """The replica of this thread; outside of a step one without a share."""
    return current_of_thread().replica


def is_measured() -> bool:
    """Whether this thread runs a step only to measure it."""
    return current().recorder is not None


def sees_one_device() -> bool:
    """Whether this thread runs a replica, for which there is one device."""
    return current() is not NO_REPLICA


def updates_locally() -> bool:
    """Whether this thread updates variables with reduced values."""
    return current_of_thread().updates_locally


def merged(merge: Callable[..., Any], *values: Any) -> Any:
    """Calls `merge` once for all replicas; in the thread of each.

    Args:
        merge: Called with the strategy and the distributed `values`. What it
            needs beside them is bound to it, and stays as it is.
        *values: Those of this replica.

    Returns:
        The part of this replica in what `merge` returns.
    """
    context = tf.distribute.get_replica_context()
    return context.merge_call(
        tf.autograph.experimental.do_not_convert(merge), args=values
    )


def running(
    replica: Replica, step: Any = None
) -> contextlib.AbstractContextManager[None]:
    """This thread runs a replica of `step` inside the block."""
    return entered(Current(step, replica))


def local_update() -> contextlib.AbstractContextManager[None]:
    """All replicas update their variables alike in the block, each its own."""
    return entered(
        dataclasses.replace(current_of_thread(), updates_locally=True)
    )
