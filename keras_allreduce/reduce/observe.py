"""Records one batch of all-reduces, for the log and observers."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from keras_allreduce import debug
from keras_allreduce.reduce.plan import ReducePlan


@dataclass(frozen=True)
class PackTensors:
    """The tensors between which one pack is in flight.

    Attributes:
        gradients: `gradients[replica][i]`, the content of the pack.
        results: `results[replica]`, the sum on each replica.
    """

    gradients: Sequence[Sequence[Any]]
    results: Sequence[Any]


@dataclass(frozen=True)
class BatchRecord:
    """One batch of all-reduces, for an observer.

    Attributes:
        plan: The plan.
        packs: The tensors of each pack.
        devices: Device of each replica.
        started: When it was called, in seconds since the epoch. In eager
            mode that is when all its gradients were ready.
        ended: When it returned; in eager mode with all results.
    """

    plan: ReducePlan
    packs: Sequence[PackTensors]
    devices: Sequence[str]
    started: float
    ended: float

    def every(self, steps: int) -> "BatchRecord":
        """The same, sent once in `steps` steps."""
        return replace(self, plan=replace(self.plan, every=steps))


_observed: contextvars.ContextVar[list[BatchRecord] | None] = (
    contextvars.ContextVar("keras_allreduce_observed", default=None)
)


@contextlib.contextmanager
def observe() -> Iterator[list[BatchRecord]]:
    """Collects a `BatchRecord` of every batch in the block.

    The observer reports the plan, so `BatchAllReduce` does not log it.
    """
    records: list[BatchRecord] = []
    token = _observed.set(records)
    try:
        yield records
    finally:
        _observed.reset(token)


def report(record: BatchRecord) -> None:
    """Passes `record` to the observer, or logs the plan of a traced batch."""
    if debug.is_on() and not tf.executing_eagerly():
        debug.log(f"a step was traced: {record.plan}")
        for number, pack in enumerate(record.plan.packs):
            debug.log(
                f"pack {number}: {pack.nbytes} bytes of {pack.dtype}, "
                f"gradients {list(pack.indices)}"
            )
    observed = _observed.get()
    if observed is not None:
        observed.append(record)
    elif not tf.executing_eagerly():
        tf.get_logger().info("%s", record.plan)
