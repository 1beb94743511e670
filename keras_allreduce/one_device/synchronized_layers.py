"""Sums that layers make over the replicas, without the empty ones.

Layers such as `BatchNormalization(synchronized=True)` sum over the replicas in
the forward pass, and their gradients do in backprop.
"""

from collections.abc import Callable, Sequence
from typing import Any

from keras_allreduce.compat import distribute
from keras_allreduce.devices import on_each
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.reduce import packing


class SynchronizedSums:
    """Sums over the replicas in which an empty replica counts 0.

    Args:
        replicas: The replicas of this worker.
        has_samples: Distributed bool, false on empty replicas. `None`: none
            is left out.

    Attributes:
        in_backprop: Whether a sum may now be that of a gradient.
        used: Whether a layer has summed over the replicas.
    """

    def __init__(self, replicas: Replicas, has_samples: Any):
        self._replicas = replicas
        self._has_samples = has_samples
        self.in_backprop = False
        self.used = False

    def sum(
        self,
        sum_over_replicas: Callable[[list[tuple[Any, Any]]], list[Any]],
        value_destination_pairs: Sequence[tuple[Any, Any]],
    ) -> list[Any]:
        """The sums of the values, without those of empty replicas.

        In the forward pass all replicas get the sum: a synchronized layer has
        the same statistics everywhere. In backprop empty replicas get 0, so
        that nothing flows back into them.

        Args:
            sum_over_replicas: Sums all replicas.
            value_destination_pairs: Its argument.
        """
        self.used = True
        sums = sum_over_replicas(
            [
                (self._of_replicas_with_samples(value), destination)
                for value, destination in value_destination_pairs
            ]
        )
        if not self.in_backprop:
            return sums
        return [self._of_replicas_with_samples(total) for total in sums]

    def _of_replicas_with_samples(self, value: Any) -> Any:
        """A distributed value, with 0 in the place of empty replicas."""
        if self._has_samples is None:
            return value
        counts = self._has_samples.values
        parts = on_each(
            [count.device for count in counts],
            packing.scale,
            self._replicas.local_values(value),
            counts,
        )
        return distribute.PerReplica(tuple(parts))
