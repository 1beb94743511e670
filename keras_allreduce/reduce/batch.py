"""Sums one batch of gradients: packs to the transport, sums to gradients.

The numbers are those of the picture in `batch_all_reduce.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from keras_allreduce.devices import on_each
from keras_allreduce.reduce import packing
from keras_allreduce.reduce.algorithm import Algorithm
from keras_allreduce.reduce.buckets import Bucket, GradientSpec, plan_buckets
from keras_allreduce.reduce.observe import PackTensors
from keras_allreduce.reduce.pack_sizes import PackSize
from keras_allreduce.reduce.plan import ReducePlan, make_plan
from keras_allreduce.reduce.sparse import RowsSpec
from keras_allreduce.reduce.transport import Transport

Summed = tuple[dict[int, list[Any]], PackTensors]
"""Results of each replica by variable, and the tensors between which."""


@dataclass(frozen=True)
class Batch:
    """Gradients that are summed at once and stay on their devices.

    To be planned alone they may be `tf.TensorSpec`s and `RowsSpec`s as well.

    Attributes:
        dense: `dense[variable][replica]`.
        rows: `rows[variable][replica]`, each a `tf.IndexedSlices`.
        devices: Device of each replica.
        algorithm: How the packs are summed.
        transport: Over which replicas.
        weights: float32 scalar of each replica, on the host; empty: all 1.
        mean_over: Number of replicas to divide the sums by; `None`: sums.
    """

    dense: dict[int, list[Any]]
    rows: dict[int, list[Any]]
    devices: tuple[str, ...]
    algorithm: Algorithm
    transport: Transport
    weights: Sequence[tf.Tensor] = ()
    mean_over: int | None = None

    @property
    def specs(self) -> list[GradientSpec]:
        """Specs of the dense gradients, for the plan."""
        return [packing.spec_of(parts[0]) for parts in self.dense.values()]

    def buckets(self, bytes_per_pack: int) -> list[Bucket]:
        """Plans which dense gradients travel together.

        Args:
            bytes_per_pack: Capacity of a pack; 0: chosen by the transport.

        Returns:
            The buckets, with places in `dense`, the last layer first.
        """
        size = PackSize(bytes_per_pack)
        if not bytes_per_pack:
            size = self.transport.pack_size(self.algorithm, self.specs)
        return plan_buckets(
            self.specs,
            size.bytes_per_pack,
            size.first_bytes_per_pack,
            size.alone_above,
        )

    def plan(self, buckets: Sequence[Bucket], reason: str) -> ReducePlan:
        """Describes the batch.

        Args:
            buckets: What `buckets` returned.
            reason: What `algorithms.choose` gave.
        """
        order = list(self.dense)
        packs = [
            replace(each, indices=tuple(order[at] for at in each.indices))
            for each in buckets
        ]
        packs += [
            Bucket((index,), self.rows[index][0].dtype.name, None)
            for index in reversed(self.rows)
        ]
        plan = make_plan(
            self.specs,
            packs=packs,
            num_sparse=len(self.rows),
            algorithm=self.algorithm.name,
            reason=reason,
            num_replicas=self.transport.num_replicas(self.devices),
        )
        return self.transport.describe(plan, self.algorithm, self.specs)

    def sum_dense(self, buckets: Sequence[Bucket]) -> Iterator[Summed]:
        """Yields the results of each bucket.

        Args:
            buckets: What `buckets` returned.
        """
        order = list(self.dense)
        variables = [[order[at] for at in each.indices] for each in buckets]
        # Here they are gradients[pack][replica][i].
        gradients = [
            list(zip(*(self.dense[index] for index in pack), strict=True))
            for pack in variables
        ]
        packs = [  # [3]
            self._scaled(
                packing.scale_unless_one,
                on_each(self.devices, packing.pack, parts),
            )
            for parts in gradients
        ]
        sums = self.transport.sum_packs(  # [4]
            self.algorithm, packs, self.devices
        )
        for pack, parts, totals in zip(variables, gradients, sums, strict=True):
            replicas = on_each(self.devices, self._unpack, totals, parts)  # [5]
            by_variable = map(list, zip(*replicas, strict=True))
            results = dict(zip(pack, by_variable, strict=True))
            yield results, PackTensors(parts, totals)

    def sum_rows(self) -> Iterator[Summed]:
        """Yields the results of each sparse gradient, last layer first."""
        for number, index in enumerate(reversed(self.rows)):  # [6]
            replicas = self.rows[index]
            owner = self.devices[number % len(self.devices)]
            totals = self.transport.sum_rows(
                self._scaled(packing.scale, replicas), self.devices, owner
            )
            results = [divide(total, self.mean_over) for total in totals]
            tensors = PackTensors([[each] for each in replicas], totals)
            yield {index: results}, tensors

    def _scaled(
        self, scale: Callable[[Any, Any], Any], replicas: list[Any]
    ) -> list[Any]:
        """Each replica's value times its weight, where it is."""
        if not self.weights:
            return replicas
        return on_each(self.devices, scale, replicas, self.weights)

    def _unpack(self, total: tf.Tensor, like: Sequence[Any]) -> list[Any]:
        return packing.unpack(divide(total, self.mean_over), like)


def dense_and_sparse(
    gradients: Sequence[list[Any]],
) -> tuple[dict[int, list[Any]], dict[int, list[Any]]]:
    """Divides `gradients[variable][replica]` into dense and sparse ones."""
    dense: dict[int, list[Any]] = {}
    rows: dict[int, list[Any]] = {}
    for index, replicas in enumerate(gradients):
        is_sparse = isinstance(replicas[0], (tf.IndexedSlices, RowsSpec))
        (rows if is_sparse else dense)[index] = replicas
    return dense, rows


def divide(total: Any, count: int | None) -> Any:
    """A sum, dense or sparse, divided by `count`; `None`: as it is."""
    if count is None:
        return total
    if isinstance(total, tf.IndexedSlices):
        return tf.IndexedSlices(
            total.values / count, total.indices, total.dense_shape
        )
    return total / count
