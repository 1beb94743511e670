"""Defines `Algorithm`: one way to sum packs over the replicas of a process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tensorflow as tf

Packs = Sequence[Sequence[tf.Tensor]]
"""`packs[pack][replica]`; the replicas of a pack have one dtype and shape."""

Sums = list[list[tf.Tensor]]
"""`sums[pack][replica]`, like the packs; all replicas of a pack are equal."""


def _takes_all(_dtype: tf.DType) -> bool:
    return True


def _runs_anywhere(_devices: Sequence[str]) -> str:
    return ""


@dataclass(frozen=True)
class Algorithm:
    """One way to sum packs over the replicas of a process.

    A new one is a file with an `ALGORITHM`, a line in `algorithms.ALGORITHMS`
    and a row in `pack_sizes.DEFAULTS`.

    Attributes:
        name: Name in the argument `algorithm` and in the plan line.
        all_reduce: `all_reduce(packs, devices)` returns the sums. Given no
            packs, it makes no ops.
        takes: Whether it sums tensors of a dtype. The packs of other dtypes
            are summed in shared memory.
        refuses: The rule that these devices break, such as "runs between GPUs
            only", or `""`.
        discouraged: Why `"auto"` avoids it on these devices, which it does
            not refuse, or `""`.
        crosses_workers: Whether the same algorithm sums over the devices of
            all workers at once, in TensorFlow's collectives.
        needs_graph: Whether each replica's op waits for those of the others,
            which eager mode, op by op, would never launch.
    """

    name: str
    all_reduce: Callable[[Packs, Sequence[str]], Sums]
    takes: Callable[[tf.DType], bool] = _takes_all
    refuses: Callable[[Sequence[str]], str] = _runs_anywhere
    discouraged: Callable[[Sequence[str]], str] = _runs_anywhere
    crosses_workers: bool = False
    needs_graph: bool = False
