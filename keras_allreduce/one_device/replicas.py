"""The interface through which a step calls its strategy."""

from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

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
