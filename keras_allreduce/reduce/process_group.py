"""The processes that train together: `ProcessGroup`, and a group of one."""

import time
from collections.abc import Sequence
from typing import Protocol

import tensorflow as tf


class ProcessGroup(Protocol):
    """All processes of one strategy, seen from one of them.

    Every method but `rank` and `size` is to be called in all processes, in
    one order.

    Attributes:
        rank: Number of this process; 0 is the chief.
        size: Number of processes.
        gradient_ops: Sums gradients over the devices of all processes.
    """

    rank: int
    size: int
    gradient_ops: tf.distribute.CrossDeviceOps

    def all_reduce(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of a tensor that each process has, in its own dtype."""

    def broadcast_text(self, text: str) -> str:
        """The text of the chief."""

    def all_gather_text(self, name: str, text: str) -> list[str]:
        """The texts of all processes, by rank."""

    def all_gather_tensors(
        self, tensors: Sequence[tf.Tensor], name: str
    ) -> list[list[tf.Tensor]]:
        """The tensors of all processes, `[rank][tensor]`.

        Numbers of rows may differ between processes.
        """

    def barrier(self) -> tuple[float, float]:
        """Waits until all have called this.

        Returns:
            When this one came, and when it knew that all had come, in seconds
            since the epoch.
        """


class OneProcess(ProcessGroup):
    """A group of one: every method is the identity.

    Args:
        gradient_ops: Sums gradients over the devices of this process.
    """

    rank, size = 0, 1

    def __init__(self, gradient_ops: tf.distribute.CrossDeviceOps):
        self.gradient_ops = gradient_ops

    def all_reduce(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """Returns `value`."""
        return value

    def broadcast_text(self, text: str) -> str:
        """Returns `text`."""
        return text

    def all_gather_text(self, name: str, text: str) -> list[str]:
        """Returns the text of the one process."""
        return [text]

    def all_gather_tensors(
        self, tensors: Sequence[tf.Tensor], name: str
    ) -> list[list[tf.Tensor]]:
        """Returns the tensors of the one process."""
        return [list(tensors)]

    def barrier(self) -> tuple[float, float]:
        """Returns the time twice: nobody else comes."""
        return (now := time.time()), now


def all_reduce_max(group: ProcessGroup, value: tf.Tensor) -> tf.Tensor:
    """The largest of what each process has, element by element.

    Args:
        group: The processes.
        value: Tensor of one shape in all of them.
    """
    is_own = tf.range(group.size) == group.rank
    rows = tf.where(
        tf.reshape(is_own, [group.size, *[1] * len(value.shape)]),
        value[tf.newaxis],
        tf.zeros_like(value),
    )
    return tf.reduce_max(group.all_reduce(rows, "largest"), axis=0)
