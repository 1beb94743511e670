"""What one batch of all-reduces sends, for the log and for whoever watches."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class ReducePlan:
    """What one batch of all-reduces sends, as the log line tells it."""

    num_gradients: int
    num_sparse: int
    algorithm: str
    reason: str
    num_packs: int
    nbytes: int | None
    dtypes: tuple[str, ...]
    num_replicas: int
    every: int = 1

    def __str__(self) -> str:
        size = "size not known" if self.nbytes is None else size_of(self.nbytes)
        line = (
            f"batch_all_reduce: {self.num_gradients} all-reduces with "
            f"algorithm = {self.algorithm}, num_packs = {self.num_packs} "
            f"({size} {'+'.join(self.dtypes)}), "
            f"num_replicas = {self.num_replicas}"
        )
        if self.num_sparse:
            line += f", {self.num_sparse} sparse gathered"
        if self.every > 1:
            line += (
                f", sent once in {self.every} steps (gradients accumulate on "
                "their replica in between)"
            )
        return f"{line}; {self.reason}" if self.reason else line


@dataclass(frozen=True)
class PackTensors:
    """The tensors between which one pack is under way.

    Attributes:
        gradients: `gradients[replica][i]`, what the pack is made of.
        results: `results[replica]`, what came back on each replica.
    """

    gradients: Sequence[Sequence[Any]]
    results: Sequence[Any]


@dataclass(frozen=True)
class BatchRecord:
    """One batch of all-reduces, for whoever observes.

    Attributes:
        plan: What is sent.
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

    The observer says what is reduced, so `BatchAllReduce` does not log it.
    """
    records: list[BatchRecord] = []
    token = _observed.set(records)
    try:
        yield records
    finally:
        _observed.reset(token)


def report(record: BatchRecord) -> None:
    """Hands `record` to the observer, or else logs what is traced."""
    observed = _observed.get()
    if observed is not None:
        observed.append(record)
    elif not tf.executing_eagerly():
        tf.get_logger().info("%s", record.plan)


def size_of(nbytes: int) -> str:
    """Bytes in the unit that reads best."""
    mib = nbytes / 2**20
    return f"{mib:.1f} MiB" if mib >= 0.1 else f"{nbytes / 2**10:.1f} KiB"
