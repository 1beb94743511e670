"""Defines `Transport`: who sums, replicas of one process or of all workers."""

from collections.abc import Sequence
from typing import Any, Protocol

from keras_allreduce.reduce.algorithm import Algorithm, Packs, Sums
from keras_allreduce.reduce.buckets import GradientSpec
from keras_allreduce.reduce.pack_sizes import PackSize
from keras_allreduce.reduce.plan import ReducePlan


class Transport(Protocol):
    """Sums over all replicas: of this process, or of all workers."""

    def expect(self, gradients: Sequence[Any]) -> None:
        """Raises if another process is about to send something else.

        Args:
            gradients: One replica's gradient for each variable.
        """

    def num_replicas(self, devices: Sequence[str]) -> int:
        """Returns how many replicas are summed, with `devices` in here."""

    def pack_size(
        self, algorithm: Algorithm, specs: Sequence[GradientSpec]
    ) -> PackSize:
        """Returns the sizes of packs where the user sets none."""

    def sum_packs(
        self, algorithm: Algorithm, packs: Packs, devices: Sequence[str]
    ) -> Sums:
        """Sums each pack over all replicas.

        Args:
            algorithm: How the replicas of this process are summed.
            packs: `packs[pack][replica]`, of the replicas in this process.
            devices: Device of each of them.

        Returns:
            `sums[pack][replica]` on the same devices, bit for bit equal on
            all replicas.
        """

    def sum_rows(
        self, replicas: Sequence[Any], devices: Sequence[str], owner: str
    ) -> list[Any]:
        """Sums one sparse gradient over all replicas.

        Args:
            replicas: One `tf.IndexedSlices` per replica in this process.
            devices: Device of each of them.
            owner: Device that gathers the rows.

        Returns:
            One `tf.IndexedSlices` per replica in this process, all equal.
        """

    def describe(
        self,
        plan: ReducePlan,
        algorithm: Algorithm,
        specs: Sequence[GradientSpec],
    ) -> ReducePlan:
        """Returns `plan` with this transport's part of the line."""
