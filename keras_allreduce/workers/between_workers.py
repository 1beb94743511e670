"""The cross-device op of several workers.

Host devices: sum inside, then between, then share, so that each pack crosses
between workers once per worker, not once per device. GPUs: NCCL between all of
them, which does the same by itself.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import tensorflow as tf

from keras_allreduce.reduce import nccl, scaling, shared_memory, sparse
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce, PackSize
from keras_allreduce.reduce.buckets import GradientSpec
from keras_allreduce.reduce.plan import ReducePlan, size_of
from keras_allreduce.workers.collectives import Collectives
from keras_allreduce.workers.wire import Wire


def default_pack_size(num_workers: int, nbytes: int) -> PackSize:
    """Sizes of packs where none is asked for.

    What the last pack takes cannot be hidden behind backprop, so packs are
    small, and a gradient above half of one (256 KiB at least) waits for no
    other. But each pack costs time of its own, so that one is a sixteenth of
    all, or 512 KiB, or half of all if that is less; and that time grows with
    the workers, so that the best one grows about as the root of their number.
    See "Pack sizes between workers" in RESULTS.md and docs/scaling.md.

    Args:
        num_workers: Number of workers.
        nbytes: Size of all gradients in bytes.
    """
    half = max(2**17, nbytes // 2)
    capacity = min(half, max(2**19, nbytes // 16)) * math.isqrt(num_workers)
    alone_above = max(capacity // 2, min(capacity, 2**18))
    return PackSize(capacity, alone_above=alone_above)


class WorkerAllReduce(BatchAllReduce):
    """Sums gradients over the devices of all workers.

    Args:
        wire: Sums between the workers.
        gpus: Sums between the GPUs of all workers.
        num_workers: Number of workers.
        bytes_per_pack: See `BatchAllReduce`.
        sparse_as_dense: See `BatchAllReduce`.
        compare: Called with the gradients of each batch that is traced, one
            of each replica's; raises if other workers have others.
    """

    def __init__(
        self,
        wire: Wire,
        gpus: Collectives,
        num_workers: int,
        bytes_per_pack: int = 0,
        *,
        sparse_as_dense: bool = False,
        compare: Callable[[Sequence[Any]], None] = lambda gradients: None,
    ):
        super().__init__(
            "auto", bytes_per_pack, sparse_as_dense=sparse_as_dense
        )
        self._wire = wire
        self._gpus = gpus
        self._num_workers = num_workers
        self._compare = compare
        self._weights: Sequence[tf.Tensor] = ()

    @contextlib.contextmanager
    def weighed(self, weights: Sequence[tf.Tensor]) -> Iterator[None]:
        """What is traced in the block has each replica times its weight.

        Args:
            weights: float32 scalars on the host, one for each replica of this
                worker. A pack waits for them before it leaves, and not before.
        """
        self._weights = weights
        try:
            yield
        finally:
            self._weights = ()

    def _all_reduce(
        self, reduce_op: Any, gradients: list[list[Any]], *args: Any
    ) -> list[list[Any]]:
        if not tf.executing_eagerly():
            self._compare([replicas[0] for replicas in gradients])
        return super()._all_reduce(reduce_op, gradients, *args)

    @property
    def _num_between_graph_workers(self) -> int:
        # CrossDeviceOps takes a value on one device for reduced if this is 1.
        return self._num_workers

    def _sum_packs(
        self,
        algorithm: str,
        packs: list[list[tf.Tensor]],
        devices: Sequence[str],
    ) -> list[list[tf.Tensor]]:
        sums = []
        for pack in packs:
            dtype = pack[0].dtype
            pack = self._weigh(scaling.scale_unless_one, pack, devices)
            crossing = self._wire.dtype_of(dtype)
            if algorithm == "nccl" and crossing in nccl.DTYPES:
                narrow = partial(tf.cast, dtype=crossing)
                widen = partial(tf.cast, dtype=dtype)
                sent = _on_each(devices, narrow, pack)
                totals = self._gpus.all_reduce_on_gpus(sent, devices, "pack")
                sums.append(_on_each(devices, widen, totals))
                continue
            inside = shared_memory.add(pack, devices[0])
            total = self._wire.all_reduce(inside, "pack")
            sums.append(shared_memory.share(total, devices))
        return sums

    def _weigh(
        self,
        times: Callable[[Any, tf.Tensor], Any],
        replicas: list[Any],
        devices: Sequence[str],
    ) -> list[Any]:
        """Each replica's value times its weight, where it is."""
        if not self._weights:
            return replicas
        return _on_each(devices, times, replicas, self._weights)

    def _sum_rows(
        self, replicas: list[Any], devices: Sequence[str], owner: str
    ) -> list[Any]:
        replicas = self._weigh(scaling.scale, replicas, devices)
        inside = sparse.gather(replicas, owner)
        everywhere = tf.IndexedSlices(
            self._wire.all_gather_rows(inside.values, "rows"),
            self._wire.all_gather_rows(inside.indices, "row numbers"),
            inside.dense_shape,
        )
        return sparse.share(everywhere, devices, self._wire.device)

    def _count(self, devices: Sequence[str]) -> int:
        return self._num_workers * len(devices)

    def _plan(
        self, specs: Sequence[GradientSpec], *args: Any, **kwargs: Any
    ) -> ReducePlan:
        plan = super()._plan(specs, *args, **kwargs)
        between = f"between {self._num_workers} workers"
        if plan.nbytes is not None:
            # Reduce-scatter and all-gather: docs/algorithms.md.
            members = self._num_workers
            if plan.algorithm == "nccl":
                members = plan.num_replicas
            share = 2 * (members - 1) / members
            sent = size_of(round(self._wire_bytes(specs) * share))
            between += f", {sent} sent by each in a step"
        dtypes = [tf.as_dtype(spec.dtype) for spec in specs]
        narrowed = {
            wire.name
            for dtype in dtypes
            if (wire := self._wire.dtype_of(dtype)) != dtype
        }
        if narrowed:
            between += f" as {'+'.join(sorted(narrowed))}"
        return replace(plan, reason=between)

    def _wire_bytes(self, specs: Sequence[GradientSpec]) -> float:
        """Bytes of all gradients in the dtypes in which they cross."""
        total = 0.0
        for spec in specs:
            dtype = tf.as_dtype(spec.dtype)
            narrowed = self._wire.dtype_of(dtype).size / dtype.size
            total += (spec.nbytes or 0) * narrowed
        return total

    def _default_pack_size(
        self, algorithm: str, specs: Sequence[GradientSpec]
    ) -> PackSize:
        if algorithm == "nccl":
            return super()._default_pack_size(algorithm, specs)
        nbytes = sum(spec.nbytes or 0 for spec in specs)
        return default_pack_size(self._num_workers, nbytes)


def _on_each(
    devices: Sequence[str], function: Callable[..., Any], *values: Sequence[Any]
) -> list[Any]:
    """What `function` makes on each device of its part of all `values`."""
    made = []
    for device, *parts in zip(devices, *values, strict=True):
        with tf.device(device):
            made.append(function(*parts))
    return made
