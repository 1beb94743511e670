"""The cross-device op: PerReplica gradients in, Mirrored sums out.

    gradients[variable][replica]
        |
        |-- [1] dense              tf.IndexedSlices [6]
        |        |                         |
        |   [2] buckets, last layer first  |
        |        |                         |
        |   [3] packs[pack][replica],      | scaled by
        |        |   scaled by weights     |   weights
        |   [4] sums[pack][replica]   gathered, owners
        |        |                       in turn
        |   [5] mean, unpack             mean
        |        |                         |
        v        v                         v
    [7] results[variable][replica], and a report of the packs

[4] and the gathering are the `Transport`'s: `InProcess`, or between workers.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from keras_allreduce import xla_clusters
from keras_allreduce.compat import distribute
from keras_allreduce.reduce import algorithms, shared_memory, sparse
from keras_allreduce.reduce.batch import Batch, dense_and_sparse, divide
from keras_allreduce.reduce.buckets import parts_of
from keras_allreduce.reduce.observe import BatchRecord, report
from keras_allreduce.reduce.pack_sizes import algorithm_names
from keras_allreduce.reduce.packing import densify
from keras_allreduce.reduce.plan import ReducePlan
from keras_allreduce.reduce.sparse import RowsSpec
from keras_allreduce.reduce.transport import InProcess, Transport

_SUM = tf.distribute.ReduceOp.SUM


class BatchAllReduce(tf.distribute.CrossDeviceOps):
    """All-reduces gradients in packs while backprop continues.

    Also works inside a stock strategy:
    `tf.distribute.MirroredStrategy(cross_device_ops=BatchAllReduce())`.

    With every algorithm, each gradient is reduced exactly once and the result
    is bitwise identical on all replicas.

    Args:
        algorithm: `"nccl"` (GPUs), `"ring"` or `"shared_memory"` (host
            devices of one process), or `"auto"`: NCCL on GPUs that support
            it, shared memory otherwise.
        bytes_per_pack: Capacity of a pack in bytes; a larger gradient gets a
            pack of its own. 0: chosen for the algorithm. The `bytes_per_pack`
            of a `tf.distribute.experimental.CommunicationOptions` passed with
            a call takes precedence.
        sparse_as_dense: Convert `tf.IndexedSlices` to dense gradients first.
            Faster if most rows are used, but needs memory for the whole
            table.

    Raises:
        ValueError: If an argument is not one of the above.
    """

    _transport: Transport = InProcess()

    def __init__(
        self,
        algorithm: str = "auto",
        bytes_per_pack: int = 0,
        *,
        sparse_as_dense: bool = False,
    ):
        _check(algorithm, bytes_per_pack)
        super().__init__()
        self.algorithm = algorithm
        self.bytes_per_pack = bytes_per_pack
        self.sparse_as_dense = bool(sparse_as_dense)

    def choose(self, devices: Sequence[str]) -> tuple[str, str]:
        """The algorithm for these devices, and why if it was not asked for.

        Raises:
            ValueError: If the algorithm asked for cannot run on `devices`.
        """
        algorithm, reason = algorithms.choose(self.algorithm, devices)
        return algorithm.name, reason

    def plan(
        self,
        gradients: Sequence[tf.TensorSpec | RowsSpec],
        devices: Sequence[str],
    ) -> ReducePlan:
        """The plan of gradients that are not there yet, as `sum` makes it.

        Args:
            gradients: A `tf.TensorSpec` for each dense gradient and a
                `RowsSpec` for each sparse one.
            devices: Device of each replica of this process.
        """
        algorithm, reason = algorithms.choose(self.algorithm, devices)
        if self.sparse_as_dense:
            gradients = [tf.TensorSpec(g.shape, g.dtype) for g in gradients]
        batch = Batch(
            *dense_and_sparse([[spec] * len(devices) for spec in gradients]),
            tuple(devices),
            algorithm,
            self._transport,
        )
        return batch.plan(batch.buckets(self.bytes_per_pack), reason)

    def sum(
        self, gradients: Sequence[Any], weights: Sequence[tf.Tensor] = ()
    ) -> list[Any]:
        """Sums gradients over the replicas, each scaled by a weight.

        Args:
            gradients: Distributed values with one part per replica of this
                process; a tensor where there is one replica.
            weights: float32 scalars on the host, one per replica of this
                process. Packs wait for them before they leave, not before
                they are made. Empty: nothing is scaled.

        Returns:
            List of Mirrored values, in the order of `gradients`.
        """
        values = dict(enumerate(map(distribute.per_replica, gradients)))
        results: dict[int, Any] = {}
        for devices, indices in _by_devices(values):
            parts = [list(values[index].values) for index in indices]
            sums = self._reduce_in_packs(_SUM, parts, devices, weights=weights)
            results.update(zip(indices, sums, strict=True))
        return [distribute.mirrored(results[index]) for index in values]

    def reduce_implementation(
        self,
        reduce_op: tf.distribute.ReduceOp,
        per_replica_value: Any,
        destinations: Any,
        options: Any,
    ) -> Any:
        """Reduces one value to the devices of `destinations`.

        Returns:
            Mirrored value on those devices, or a tensor if there is one.
        """
        pairs = [(per_replica_value, destinations)]
        return self.batch_reduce_implementation(reduce_op, pairs, options)[0]

    def batch_reduce_implementation(
        self,
        reduce_op: tf.distribute.ReduceOp,
        value_destination_pairs: Sequence[tuple[Any, Any]],
        options: Any,
    ) -> list[Any]:
        """Reduces many values, in packs where their destinations allow.

        Returns:
            List of Mirrored values, in the order of the pairs.
        """
        pairs = dict(enumerate(value_destination_pairs))
        staying = {i: v for i, (v, where) in pairs.items() if _stays(v, where)}
        results: dict[int, Any] = {}
        for devices, indices in _by_devices(staying):
            parts = [list(staying[index].values) for index in indices]
            reduced = self._reduce_in_packs(reduce_op, parts, devices, options)
            mirrored = map(distribute.mirrored, reduced)
            results.update(zip(indices, mirrored, strict=True))
        for index in pairs:
            if index not in staying:
                moved = self._reduce_elsewhere(reduce_op, *pairs[index])
                results[index] = moved
        return [results[index] for index in pairs]

    def _gather_implementation(
        self,
        per_replica_value: Any,
        destinations: Any,
        axis: int,
        options: Any,
    ) -> Any:
        """Concatenates the replicas' values and gives them to all."""
        del options  # For collectives only.
        device = distribute.devices_of(destinations)[0]
        with tf.device(device):
            gathered = tf.concat(per_replica_value.values, axis)
        return self.broadcast(gathered, destinations)

    def _reduce_elsewhere(
        self, reduce_op: tf.distribute.ReduceOp, value: Any, destinations: Any
    ) -> Any:
        """Reduces one value on the first of other devices, for all of them."""
        owner = distribute.devices_of(destinations)[0]
        count = self._mean_over(reduce_op, distribute.devices_of(value))
        with tf.device(owner):
            total = divide(_sum_on(owner, value), count)
        return self.broadcast(total, destinations)

    def _reduce_in_packs(
        self,
        reduce_op: tf.distribute.ReduceOp,
        gradients: list[list[Any]],
        devices: tuple[str, ...],
        options: Any = None,
        weights: Sequence[tf.Tensor] = (),
    ) -> list[list[Any]]:
        """All-reduces `gradients[variable][replica]`, as drawn at the top."""
        started = time.time()
        algorithm, reason = algorithms.choose(self.algorithm, devices)
        if algorithm.needs_graph and tf.executing_eagerly():
            return tf.function(self._reduce_in_packs)(
                reduce_op, gradients, devices, options, weights
            )
        self._transport.expect([replicas[0] for replicas in gradients])
        if self.sparse_as_dense:
            gradients = [densify(each, devices) for each in gradients]
        batch = Batch(  # [1]
            *dense_and_sparse(gradients),
            devices,
            algorithm,
            self._transport,
            weights,
            self._mean_over(reduce_op, devices),
        )
        asked = getattr(options, "bytes_per_pack", 0) or self.bytes_per_pack
        buckets = batch.buckets(asked)  # [2]
        results: dict[int, list[Any]] = {}
        sent = []
        # [3] to [6]
        for sums, tensors in (*batch.sum_dense(buckets), *batch.sum_rows()):
            results.update(sums)
            sent.append(tensors)
        plan = batch.plan(buckets, reason)  # [7]
        if xla_clusters.is_marking():
            plan = _compiled(plan, gradients)
        report(BatchRecord(plan, sent, devices, started, time.time()))
        return [results[index] for index in range(len(gradients))]

    def _mean_over(
        self, reduce_op: tf.distribute.ReduceOp, devices: Sequence[str]
    ) -> int | None:
        if reduce_op == _SUM:
            return None
        return self._transport.num_replicas(devices)


def _check(algorithm: str, bytes_per_pack: int) -> None:
    """Raises a `ValueError` if an argument of `BatchAllReduce` is wrong."""
    names = algorithm_names()
    if algorithm not in names:
        raise ValueError(
            f"`algorithm` must be one of {', '.join(names)}. "
            f"Received: algorithm={algorithm!r}"
        )
    if (
        isinstance(bytes_per_pack, bool)
        or not isinstance(bytes_per_pack, int)
        or bytes_per_pack < 0
    ):
        raise ValueError(
            "`bytes_per_pack` must be a number of bytes, 0 or more (0: "
            f"chosen for you). Received: bytes_per_pack={bytes_per_pack!r}"
        )


def _compiled(plan: ReducePlan, gradients: list[list[Any]]) -> ReducePlan:
    """Lets XLA's programs end where packs do; returns the plan with it."""
    parts = parts_of(plan.packs)
    for replica in zip(*gradients, strict=True):
        if len(parts) > 1:
            xla_clusters.cut([[replica[at] for at in part] for part in parts])
    return replace(plan, parts=len(parts))


def _sum_on(owner: str, value: Any) -> Any:
    """The sum of a distributed value, dense or sparse, on one device."""
    if isinstance(value.values[0], tf.IndexedSlices):
        return sparse.gather(value.values, owner)
    return shared_memory.add(value.values, owner)


def _stays(value: Any, destinations: Any) -> bool:
    """Whether a value is reduced to the devices that it is on."""
    where = set(distribute.devices_of(destinations))
    return where == set(distribute.devices_of(value))


def _by_devices(
    values: Mapping[int, Any],
) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """Yields devices, and the numbers of the values on them."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, value in values.items():
        devices = distribute.devices_of(value)
        found.setdefault(devices, []).append(index)
    yield from found.items()
