"""Sums all metrics of a model between workers at once.

At the end of an epoch Keras reads the variables of its metrics one by one, each
a collective of its own. The first read sums all of them; the others take
their part of the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import keras_calls


class MetricSums:
    """The sums of the metrics that Keras is reading.

    Args:
        sum_over_workers: Sums a tensor over the workers, eagerly.
    """

    def __init__(self, sum_over_workers: Callable[[tf.Tensor, str], tf.Tensor]):
        self._sum_over_workers = sum_over_workers
        # The summed metrics; kept, as another object could have the address.
        self._read: list[Any] | None = None
        self._sums: dict[int, tf.Tensor] = {}

    def forget(self) -> None:
        """Metrics are about to change."""
        self._read = None
        self._sums = {}

    def of(self, variable: Any) -> tf.Tensor | None:
        """The sum of a variable over all replicas of all workers.

        Args:
            variable: A distributed variable that is summed when it is read.

        Returns:
            The sum; `None` if Keras is not reading its metrics, or this is
            not one of theirs.
        """
        if not tf.executing_eagerly():
            return None
        read = keras_calls.metrics_being_read()
        if read is None:
            return None
        if read is not self._read:
            self.forget()
            self._sums = self._sum(read)
            self._read = read
        total = self._sums.pop(id(variable), None)
        if not self._sums:
            # Else it would keep the model.
            self._read = None
        return total

    def _sum(self, variables: Sequence[Any]) -> dict[int, tf.Tensor]:
        sums: dict[int, tf.Tensor] = {}
        for dtype in sorted({each.dtype for each in variables}, key=str):
            same = [each for each in variables if each.dtype == dtype]
            with tf.device("CPU:0"):
                local = [
                    tf.add_n([part.read_value() for part in each.values])
                    for each in same
                ]
                pack = tf.concat([tf.reshape(each, [-1]) for each in local], 0)
                total = self._sum_over_workers(pack, f"metrics {dtype.name}")
                parts = tf.split(total, [int(tf.size(each)) for each in local])
                for each, value, part in zip(same, local, parts, strict=True):
                    sums[id(each)] = tf.reshape(part, value.shape)
        return sums
