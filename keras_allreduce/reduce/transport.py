"""Defines `Transport`: sums in one process, or between all workers.

`InProcess` is the first; `workers/between_workers.py` has the second.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from keras_allreduce.reduce import pack_sizes, shared_memory, sparse
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
        """Returns `plan` with this transport's part of the line, if any."""
        return plan


class InProcess(Transport):
    """Sums over the replicas of one process, by the algorithm it is given."""

    def expect(self, gradients: Sequence[Any]) -> None:
        """Accepts all gradients: no other process takes part."""

    def num_replicas(self, devices: Sequence[str]) -> int:
        """Returns the number of devices: each holds one replica."""
        return len(devices)

    def pack_size(
        self, algorithm: Algorithm, specs: Sequence[GradientSpec]
    ) -> PackSize:
        """Returns the default of the algorithm."""
        return pack_sizes.DEFAULTS[algorithm.name]

    def sum_packs(
        self, algorithm: Algorithm, packs: Packs, devices: Sequence[str]
    ) -> Sums:
        """Sums packs with `algorithm`; other dtypes in shared memory."""
        takes = [algorithm.takes(pack[0].dtype) for pack in packs]
        both = list(zip(packs, takes, strict=True))
        own = iter(algorithm.all_reduce([p for p, yes in both if yes], devices))
        others = iter(
            shared_memory.all_reduce([p for p, yes in both if not yes], devices)
        )
        return [next(own if yes else others) for yes in takes]

    def sum_rows(
        self, replicas: Sequence[Any], devices: Sequence[str], owner: str
    ) -> list[Any]:
        """Gathers the rows of all replicas on `owner`, for all."""
        return sparse.all_reduce(replicas, devices, owner)
