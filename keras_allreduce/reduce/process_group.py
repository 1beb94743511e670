"""The processes that train together: `ProcessGroup`."""

import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


class ProcessGroup:
    """All processes of one strategy, seen from one of them.

    This class is the group of a process that trains alone: every collective is
    the identity, and every comparison finds nothing. `workers/group.py` has
    the group of several; nobody asks which of the two it is.

    Methods are to be called in all processes, in one order.

    Args:
        gradient_ops: Sums gradients over the devices of all processes.

    Attributes:
        rank: Number of this process; 0 is the chief.
        size: Number of processes.
        gradient_ops: As above.
    """

    rank, size = 0, 1

    def __init__(self, gradient_ops: tf.distribute.CrossDeviceOps):
        self.gradient_ops = gradient_ops

    def __deepcopy__(self, memo: dict[int, Any]) -> "ProcessGroup":
        """A copy of a strategy has the same processes."""
        return self

    def all_reduce(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of a tensor that each process has, in its own dtype."""
        return value

    def broadcast_text(self, text: str) -> str:
        """The text of the chief."""
        return text

    def all_gather_text(self, name: str, text: str) -> list[str]:
        """The texts of all processes, by rank."""
        return [text]

    def all_gather_tensors(
        self, tensors: Sequence[tf.Tensor], name: str
    ) -> list[list[tf.Tensor]]:
        """The tensors of all processes, `[rank][tensor]`.

        Numbers of rows may differ between processes.
        """
        return [list(tensors)]

    def barrier(self) -> tuple[float, float]:
        """Waits until all have called this.

        Returns:
            When this one came, and when it knew that all had come, in seconds
            since the epoch.
        """
        return (now := time.time()), now

    @property
    def sums_now(self) -> bool:
        """Whether sums are those of this group, or of TensorFlow's strategy.

        TensorFlow's sums eagerly: our names of collectives are for graphs.
        """
        return not tf.executing_eagerly()

    def sum_dtype(self, dtype: tf.DType) -> tf.DType:
        """The dtype in which TensorFlow's may sum gradients of `dtype`."""
        return dtype

    def note_constant(self, initial_value: Any) -> bool:
        """Notes a new variable if its value is the same on all workers anyhow.

        Returns whether it is. Then it is compared later.

        Args:
            initial_value: Value of the variable, or a function that makes it.
        """
        return False

    def compare_initial_value(self, initial_value: Any) -> Any:
        """Compares a variable as it is made.

        Args:
            initial_value: Value of a new variable, or a function that makes
                it.

        Returns:
            A value, or a function that makes one, in its place.
        """
        return initial_value

    def begin_call(
        self, call: Any, dataset: Any, steps: tuple[int | None, int | None]
    ) -> int | None:
        """Compares a call of Keras that has its data distributed.

        Args:
            call: The `KerasCall`.
            dataset: The data set that Keras has made.
            steps: Steps that were asked for, and batches of the data set.

        Returns:
            A seed that all processes share; `None` if they share none.
        """
        return None

    def broadcast(self, model: Any) -> None:
        """Gives all processes the chief's variables of a model."""


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
