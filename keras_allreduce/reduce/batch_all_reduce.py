"""The cross-device op: PerReplica gradients in, Mirrored sums out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.devices import are_virtual
from keras_allreduce.reduce import nccl, packing, ring, shared_memory, sparse
from keras_allreduce.reduce.buckets import GradientSpec, plan_buckets
from keras_allreduce.reduce.observe import BatchRecord, PackTensors, report
from keras_allreduce.reduce.plan import ReducePlan

ALGORITHMS = ("auto", "nccl", "ring", "shared_memory")

_TRANSPORTS = {
    "nccl": nccl.all_reduce,
    "ring": ring.all_reduce,
    "shared_memory": shared_memory.all_reduce,
}


@dataclass(frozen=True)
class PackSize:
    """Sizes of packs in bytes; see `buckets.plan_buckets`."""

    bytes_per_pack: int
    first_bytes_per_pack: int | None = None
    alone_above: int | None = None


# Where a transfer has a price of its own, packs are as large as still starts
# early (PyTorch DistributedDataParallel's sizes). In shared memory only the
# copy into the pack has a price, so only gradients travel together whose ops
# cost more than their bytes: see "Pack sizes" in benchmarks/RESULTS.md.
_DEFAULT_PACK_SIZES = {
    "nccl": PackSize(nccl.BYTES_PER_PACK, 2**20),
    "ring": PackSize(4 * 2**20, 2**20),
    "shared_memory": PackSize(2**20, 2**18, alone_above=2**14),
}


class BatchAllReduce(tf.distribute.CrossDeviceOps):
    """Sums gradients over replicas in packs that leave during backprop.

    Also works inside a stock strategy:
    `tf.distribute.MirroredStrategy(cross_device_ops=BatchAllReduce())`.

    Whatever the algorithm, every gradient is reduced exactly once and all
    replicas get bit for bit the same result.

    Args:
        algorithm: `"nccl"` (GPUs), `"ring"` or `"shared_memory"` (host
            devices of one process), or `"auto"`: NCCL on GPUs that have it,
            shared memory elsewhere.
        bytes_per_pack: Capacity of a pack in bytes; a larger gradient travels
            alone. 0: chosen for the algorithm. A
            `tf.distribute.experimental.CommunicationOptions` with a
            `bytes_per_pack` passed with a call goes before this.
        sparse_as_dense: Turn `tf.IndexedSlices` into dense gradients first.
            Faster where most rows are used, at the price of the memory of
            the whole table.

    Raises:
        ValueError: If an argument is not one of the above.
    """

    def __init__(
        self,
        algorithm: str = "auto",
        bytes_per_pack: int = 0,
        *,
        sparse_as_dense: bool = False,
    ):
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"`algorithm` must be one of {', '.join(ALGORITHMS)}. "
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
        super().__init__()
        self.algorithm = algorithm
        self.bytes_per_pack = bytes_per_pack
        self.sparse_as_dense = bool(sparse_as_dense)

    def choose(self, devices: Sequence[str]) -> tuple[str, str]:
        """The algorithm for these devices, and why if it was not asked for.

        Raises:
            ValueError: If the algorithm asked for cannot run on `devices`.
        """
        on_gpus = all("GPU" in device.upper() for device in devices)
        if self.algorithm == "nccl" and not on_gpus:
            raise ValueError(
                "algorithm='nccl' runs between GPUs only. Received: "
                f"devices={list(devices)}. Use algorithm='auto'."
            )
        if self.algorithm != "auto":
            return self.algorithm, ""
        if not on_gpus:
            return "shared_memory", ""
        if not distribute.has_nccl():
            return "shared_memory", "this TensorFlow is built without NCCL"
        if are_virtual(devices):
            return "shared_memory", "NCCL does not work between virtual GPUs"
        return "nccl", ""

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
        devices = distribute.devices_of(destinations)
        if set(devices) == set(distribute.devices_of(per_replica_value)):
            return self._all_reduce_batch(
                reduce_op, [per_replica_value], options
            )[0]
        values = per_replica_value.values
        if isinstance(values[0], tf.IndexedSlices):
            total = sparse.gather(values, devices[0])
        else:
            total = shared_memory.add(values, devices[0])
        with tf.device(devices[0]):
            total = self._finish(total, reduce_op, values)
        return self.broadcast(total, destinations)

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
        together: list[int] = []
        apart: list[int] = []
        for index, (value, destination) in enumerate(value_destination_pairs):
            stays = set(distribute.devices_of(destination)) == set(
                distribute.devices_of(value)
            )
            (together if stays else apart).append(index)
        results: dict[int, Any] = {}
        values = [value_destination_pairs[index][0] for index in together]
        if values:
            reduced = self._all_reduce_batch(reduce_op, values, options)
            results = dict(zip(together, reduced, strict=True))
        for index in apart:
            value, destination = value_destination_pairs[index]
            results[index] = self.reduce_implementation(
                reduce_op, value, destination, options
            )
        return [results[index] for index in range(len(results))]

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

    def _all_reduce_batch(
        self,
        reduce_op: tf.distribute.ReduceOp,
        values: Sequence[Any],
        options: Any,
    ) -> list[Any]:
        """All-reduces distributed values that stay on their devices."""
        by_devices: dict[tuple[str, ...], list[int]] = {}
        for index, value in enumerate(values):
            devices = distribute.devices_of(value)
            by_devices.setdefault(devices, []).append(index)
        results: dict[int, Any] = {}
        for devices, indices in by_devices.items():
            gradients = [list(values[index].values) for index in indices]
            all_reduce = self._all_reduce
            if self.choose(devices)[0] == "nccl" and tf.executing_eagerly():
                # Launched one by one, each GPU's kernel would wait for the
                # next one's, which is not launched yet.
                all_reduce = tf.function(all_reduce)
            reduced = all_reduce(reduce_op, gradients, devices, options)
            for index, replicas in zip(indices, reduced, strict=True):
                results[index] = distribute.mirrored(replicas)
        return [results[index] for index in range(len(values))]

    def _all_reduce(
        self,
        reduce_op: tf.distribute.ReduceOp,
        gradients: list[list[Any]],
        devices: tuple[str, ...],
        options: Any,
    ) -> list[list[Any]]:
        """All-reduces `gradients[variable][replica]`."""
        started = time.time()
        if self.sparse_as_dense:
            gradients = [_densify(replicas, devices) for replicas in gradients]
        algorithm, _ = self.choose(devices)
        dense: list[int] = []
        rows: list[int] = []
        for index, replicas in enumerate(gradients):
            is_sparse = isinstance(replicas[0], tf.IndexedSlices)
            (rows if is_sparse else dense).append(index)
        specs = [_spec(gradients[index][0]) for index in dense]
        size = self._pack_size(algorithm, options, specs)
        buckets = [
            [dense[position] for position in bucket.indices]
            for bucket in plan_buckets(
                specs,
                size.bytes_per_pack,
                size.first_bytes_per_pack,
                size.alone_above,
            )
        ]
        results: dict[int, list[Any]] = {}
        packs = _pack(gradients, buckets, devices)
        sums = self._sum_packs(algorithm, packs, devices)
        sent = []
        for bucket, pack_sums in zip(buckets, sums, strict=True):
            inputs = [
                [gradients[index][replica] for index in bucket]
                for replica in range(len(devices))
            ]
            sent.append(PackTensors(inputs, pack_sums))
            outputs = []
            for device, total, like in zip(
                devices, pack_sums, inputs, strict=True
            ):
                with tf.device(device):
                    finished = self._finish(total, reduce_op, devices)
                    outputs.append(packing.unpack(finished, like))
            for position, index in enumerate(bucket):
                results[index] = [replica[position] for replica in outputs]
        for number, index in enumerate(reversed(rows)):
            owner = devices[number % len(devices)]
            totals = self._sum_rows(gradients[index], devices, owner)
            sent.append(PackTensors([[g] for g in gradients[index]], totals))
            results[index] = [
                self._finish(total, reduce_op, devices) for total in totals
            ]
        plan = self._plan(specs, len(rows), len(buckets), devices)
        report(BatchRecord(plan, sent, devices, started, time.time()))
        return [results[index] for index in range(len(gradients))]

    def _sum_packs(
        self,
        algorithm: str,
        packs: list[list[tf.Tensor]],
        devices: Sequence[str],
    ) -> list[list[tf.Tensor]]:
        """Sums packs with `algorithm`, and those it cannot sum in memory."""
        if algorithm != "nccl":
            return _TRANSPORTS[algorithm](packs, devices)
        able = [pack[0].dtype in nccl.DTYPES for pack in packs]
        by_nccl = iter(
            nccl.all_reduce(
                [p for p, yes in zip(packs, able, strict=True) if yes], devices
            )
        )
        others = iter(
            shared_memory.all_reduce(
                [p for p, yes in zip(packs, able, strict=True) if not yes],
                devices,
            )
        )
        return [next(by_nccl) if yes else next(others) for yes in able]

    def _sum_rows(
        self, replicas: list[Any], devices: Sequence[str], owner: str
    ) -> list[Any]:
        """Sums one sparse gradient."""
        return sparse.all_reduce(replicas, devices, owner)

    def _finish(
        self,
        total: Any,
        reduce_op: tf.distribute.ReduceOp,
        devices: Sequence[str],
    ) -> Any:
        """The sum itself, or the mean over all replicas."""
        if reduce_op == tf.distribute.ReduceOp.SUM:
            return total
        count = self._count(devices)
        if isinstance(total, tf.IndexedSlices):
            return tf.IndexedSlices(
                total.values / count, total.indices, total.dense_shape
            )
        return total / count

    def _count(self, devices: Sequence[str]) -> int:
        """Number of replicas that values on `devices` are reduced over."""
        return len(devices)

    def _plan(
        self,
        specs: Sequence[GradientSpec],
        num_sparse: int,
        num_packs: int,
        devices: Sequence[str],
    ) -> ReducePlan:
        algorithm, reason = self.choose(devices)
        sizes = [spec.nbytes for spec in specs]
        known = [size for size in sizes if size is not None]
        return ReducePlan(
            num_gradients=len(specs),
            num_sparse=num_sparse,
            algorithm=algorithm,
            reason=reason,
            num_packs=num_packs,
            # The rows of sparse gradients are counted only as the step runs.
            nbytes=(
                None if num_sparse or len(known) < len(sizes) else sum(known)
            ),
            dtypes=tuple(sorted({spec.dtype for spec in specs})),
            num_replicas=self._count(devices),
        )

    def _pack_size(
        self, algorithm: str, options: Any, specs: Sequence[GradientSpec]
    ) -> PackSize:
        asked = getattr(options, "bytes_per_pack", 0) or self.bytes_per_pack
        if asked:
            return PackSize(asked)
        return self._default_pack_size(algorithm, specs)

    def _default_pack_size(
        self, algorithm: str, specs: Sequence[GradientSpec]
    ) -> PackSize:
        return _DEFAULT_PACK_SIZES[algorithm]


def _pack(
    gradients: list[list[Any]],
    buckets: list[list[int]],
    devices: Sequence[str],
) -> list[list[tf.Tensor]]:
    """The pack of each bucket and replica: `packs[pack][replica]`."""
    packs = []
    for bucket in buckets:
        replicas = []
        for replica, device in enumerate(devices):
            with tf.device(device):
                replicas.append(
                    packing.pack([gradients[i][replica] for i in bucket])
                )
        packs.append(replicas)
    return packs


def _densify(replicas: list[Any], devices: Sequence[str]) -> list[Any]:
    if not isinstance(replicas[0], tf.IndexedSlices):
        return replicas
    dense = []
    for gradient, device in zip(replicas, devices, strict=True):
        with tf.device(device):
            dense.append(tf.convert_to_tensor(gradient))
    return dense


def _spec(gradient: tf.Tensor) -> GradientSpec:
    elements = gradient.shape.num_elements()
    nbytes = None if elements is None else elements * gradient.dtype.size
    return GradientSpec(gradient.dtype.name, nbytes)
