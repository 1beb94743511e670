"""Sums over the devices of all workers.

Host devices: sum inside, then between, then share, so that each pack crosses
between workers once per worker, not once per device. GPUs: NCCL between all of
them, which does the same by itself.

    packs[pack][replica]                         of this worker
      |-- [1] GPUs: narrow, NCCL over the GPUs of all workers, widen
      |-- [2] else: add up on the first device
      |         [3] the wire: sum between workers, on the host
      |         [4] share with every device
    sums[pack][replica]                          of all workers
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import tensorflow as tf

from keras_allreduce.devices import on_each
from keras_allreduce.reduce import pack_sizes, shared_memory, sparse
from keras_allreduce.reduce.algorithm import Algorithm, Packs, Sums
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.reduce.buckets import Bucket, GradientSpec
from keras_allreduce.reduce.pack_sizes import PackSize
from keras_allreduce.reduce.plan import ReducePlan, bus_share, size_of
from keras_allreduce.reduce.transport import Transport
from keras_allreduce.workers.collectives import Collectives
from keras_allreduce.workers.wire import Wire
from keras_allreduce.workers.wire_formats import EXACT


class BetweenWorkers(Transport):
    """Sums over the devices of all workers.

    Args:
        wire: Sums between the workers.
        gpus: Sums between the GPUs of all workers.
        num_workers: Number of workers.
        compare: Called with one replica's gradients of each batch that is
            traced; raises if other workers have others.
    """

    def __init__(
        self,
        wire: Wire,
        gpus: Collectives,
        num_workers: int,
        compare: Callable[[Sequence[Any]], None] = lambda gradients: None,
    ):
        self._wire = wire
        self._gpus = gpus
        self._num_workers = num_workers
        self._compare = compare

    def expect(self, gradients: Sequence[Any]) -> None:
        """Raises if another worker traces a step with other gradients."""
        if not tf.executing_eagerly():
            self._compare(gradients)

    def num_replicas(self, devices: Sequence[str]) -> int:
        """Returns the number of replicas, as many as here on each worker."""
        return self._num_workers * len(devices)

    def pack_size(
        self, algorithm: Algorithm, specs: Sequence[GradientSpec]
    ) -> PackSize:
        """Returns the default of the algorithm, or of the wire."""
        if algorithm.crosses_workers:
            return pack_sizes.DEFAULTS[algorithm.name]
        nbytes = sum(spec.nbytes or 0 for spec in specs)
        return pack_sizes.between_workers(self._num_workers, nbytes)

    def sum_packs(
        self, algorithm: Algorithm, packs: Packs, devices: Sequence[str]
    ) -> Sums:
        """Sums packs, as drawn at the top."""
        sums = []
        for pack in packs:
            dtype = pack[0].dtype
            narrow = self._wire.format_of(dtype).sum_dtype(dtype)
            if algorithm.crosses_workers and algorithm.takes(narrow):  # [1]
                sums.append(self._sum_on_gpus(pack, devices, narrow))
                continue
            inside = shared_memory.add(pack, devices[0])  # [2]
            total = self._wire.all_reduce(inside, "pack")  # [3]
            sums.append(shared_memory.share(total, devices))  # [4]
        return sums

    def _sum_on_gpus(
        self, pack: Sequence[tf.Tensor], gpus: Sequence[str], narrow: tf.DType
    ) -> list[tf.Tensor]:
        sent = on_each(gpus, partial(tf.cast, dtype=narrow), pack)
        totals = self._gpus.all_reduce_on_gpus(sent, gpus, "pack")
        return on_each(gpus, partial(tf.cast, dtype=pack[0].dtype), totals)

    def sum_rows(
        self, replicas: Sequence[Any], devices: Sequence[str], owner: str
    ) -> list[Any]:
        """Gathers the rows of all replicas, those of the chief first."""
        inside = sparse.gather(replicas, owner)
        everywhere = tf.IndexedSlices(
            self._wire.all_gather_rows(inside.values, "rows"),
            self._wire.all_gather_rows(inside.indices, "row numbers"),
            inside.dense_shape,
        )
        return sparse.share(everywhere, devices, self._wire.device)

    def describe(
        self,
        plan: ReducePlan,
        algorithm: Algorithm,
        specs: Sequence[GradientSpec],
    ) -> ReducePlan:
        """Returns the plan with the bytes and format that each worker sends."""
        between = f"between {self._num_workers} workers"
        if not algorithm.crosses_workers:
            between += f" over {self._wire.medium}"
        formats = set()
        for spec in specs:
            wire_format = self._wire.format_of(tf.as_dtype(spec.dtype))
            if wire_format is not EXACT:
                formats.add(wire_format.name)
        ranks = self._num_workers
        if algorithm.crosses_workers:
            ranks = plan.num_replicas
        sent = tuple(self._sent(pack, ranks) for pack in plan.packs)
        if plan.nbytes is not None:
            total = size_of(sum(size or 0 for size in sent))
            between += f", {total} sent by each in a step"
        if formats:
            between += f" as {'+'.join(sorted(formats))}"
        return replace(plan, reason=between, sent=sent)

    def _sent(self, pack: Bucket, ranks: int) -> int | None:
        """Bytes of a pack that each of `ranks` sends."""
        if pack.nbytes is None:
            return None
        dtype = tf.as_dtype(pack.dtype)
        crossing = self._wire.format_of(dtype).nbytes(pack.nbytes, dtype)
        return round(crossing * bus_share(ranks))


class WorkerAllReduce(BatchAllReduce):
    """Sums gradients over the devices of all workers.

    Args:
        between: Sums over all workers.
        num_workers: Number of workers.
        bytes_per_pack: See `BatchAllReduce`.
        sparse_as_dense: See `BatchAllReduce`.
    """

    def __init__(
        self,
        between: BetweenWorkers,
        num_workers: int,
        bytes_per_pack: int = 0,
        *,
        sparse_as_dense: bool = False,
    ):
        super().__init__(
            "auto", bytes_per_pack, sparse_as_dense=sparse_as_dense
        )
        self._transport = between
        self._num_workers = num_workers

    @property
    def _num_between_graph_workers(self) -> int:
        # CrossDeviceOps takes a value on one device for reduced if this is 1.
        return self._num_workers
