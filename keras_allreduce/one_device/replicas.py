"""The interface through which a step calls its strategy."""

from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf


class Replicas(Protocol):
    """The replicas of one process, among those of all workers.

    `strategy/extended.py` implements it for all strategies.
    """

    @property
    def devices(self) -> Sequence[str]:
        """Device of each replica of this worker."""

    @property
    def num_workers(self) -> int:
        """Number of workers; each has as many replicas as this one."""

    def local_values(self, value: Any) -> Sequence[Any]:
        """The parts of a distributed value, one for each of `devices`.

        Empty if `value` is not distributed.
        """

    def shares_of(self, amounts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Share of each replica in the sum of all workers' amounts.

        Args:
            amounts: float32 scalars, one for each of `devices`.

        Returns:
            float32 scalars: the shares times the number of all replicas.
        """

    def sum_over_workers(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of a tensor that each worker has, in its own dtype."""

    def largest_of_workers(self, value: tf.Tensor) -> tf.Tensor:
        """The largest of what each worker has, element by element."""

    def tensors_of_others(
        self, tensors: Sequence[tf.Tensor]
    ) -> tuple[list[list[tf.Tensor]], list[list[tf.Tensor]]]:
        """The tensors that the other workers have, `[worker][tensor]`.

        Numbers of rows may differ between workers.

        Returns:
            Those of the workers before this one, and of those after it.
        """

    def chiefs(self, text: str) -> str:
        """The text of the chief; to be called on all workers."""

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
