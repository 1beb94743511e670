"""How values are reduced over several workers."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce import malloc
from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.devices import on_gpus
from keras_allreduce.one_device import shares
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.strategy.extended import ExtendedBase
from keras_allreduce.workers import connect
from keras_allreduce.workers.agreement import Agreement, environment
from keras_allreduce.workers.between_workers import WorkerAllReduce
from keras_allreduce.workers.collectives import Collectives, WorkerGroup
from keras_allreduce.workers.in_flight import Progress
from keras_allreduce.workers.watchdog import WorkerWatch
from keras_allreduce.workers.wire import Wire


class MultiWorkerAllReduceExtended(
    ExtendedBase, distribute.CollectiveAllReduceExtended
):
    """MultiWorkerMirroredStrategy's, with another road for gradients."""

    _agreement: Agreement | None = None

    def __init__(
        self,
        container_strategy: Any,
        cluster_resolver: Any,
        options: Any,
        timeout_seconds: float,
        wire_dtype: str | None,
        sparse_as_dense: bool,
        progress: Progress,
    ):
        self._progress = progress
        with connect.starting(cluster_resolver, timeout_seconds) as cluster:
            if cluster is not None or not on_gpus():
                # Has no effect once TensorFlow has started its threads.
                malloc.keep_freed()
            super().__init__(
                container_strategy,
                cluster_resolver=cluster_resolver,
                communication_options=options,
            )
        self._gradient_ops: BatchAllReduce
        if cluster is None:
            self._gradient_ops = BatchAllReduce(
                "auto", options.bytes_per_pack, sparse_as_dense=sparse_as_dense
            )
            return
        watch = WorkerWatch(cluster, timeout_seconds, self._progress)
        watch.start(self)
        self._agreement = Agreement(
            cluster, timeout_seconds, lost=lambda: watch.lost
        )
        self._agreement.compare(
            "versions, devices and options",
            {
                **environment(self.worker_devices),
                "bytes_per_pack": options.bytes_per_pack,
                "timeout_seconds": timeout_seconds,
                "wire_dtype": wire_dtype,
                "measure_lateness": progress.timed,
                "sparse_as_dense": sparse_as_dense,
                "weigh_samples": container_strategy.weigh_samples,
            },
        )
        host = f"{self._worker_device}/device:CPU:0"
        self._collectives = Collectives(
            WorkerGroup(self._num_workers, host), self._progress
        )
        self._exact = Wire(self._collectives, self._num_workers)
        self._wire = Wire(self._collectives, self._num_workers, wire_dtype)
        self._gradient_ops = WorkerAllReduce(
            self._wire,
            Collectives(
                WorkerGroup(self._num_replicas_in_sync, host), self._progress
            ),
            self._num_workers,
            options.bytes_per_pack,
            sparse_as_dense=sparse_as_dense,
            compare=self._agreement.compare_gradients,
        )

    def _get_variable_creator_initial_value(
        self, replica_id: int, device: Any, primary_var: Any, **kwargs: Any
    ) -> Any:
        if replica_id == 0 and self._agreement is not None:
            kwargs["initial_value"] = self._agreement.compare_initial_value(
                kwargs["initial_value"]
            )
        return super()._get_variable_creator_initial_value(
            replica_id, device, primary_var, **kwargs
        )

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return int(self._num_workers)

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that reports and saves."""
        return bool(self._is_chief)

    def waits_of_all_workers(self) -> list[float]:
        """Mean seconds per step in a collective, by worker."""
        wait = self._progress.read_waits()
        if self._num_workers == 1:
            return [wait]
        gathered = self._collectives.all_gather(
            tf.constant([wait], tf.float64), "waits"
        )
        waits = [float(each) for each in gathered.numpy()]
        incomplete = any(math.isnan(each) for each in waits)
        return [math.nan] * len(waits) if incomplete else waits

    def shares_of(self, amounts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Share of each replica of this worker in the whole batch."""
        total = self.sum_over_workers(tf.add_n(list(amounts)), "batch")
        return shares.shares_of(
            amounts, total=total, count=self._num_replicas_in_sync
        )

    def sum_over_workers(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of a tensor that each worker has, in its own dtype."""
        if self._num_workers == 1:
            return value
        return self._exact.all_reduce(value, name)

    def sum_gradients(
        self, gradients: Sequence[Any], weights: Sequence[tf.Tensor] = ()
    ) -> list[Any]:
        """Sums distributed gradients, each replica's scaled by its weight."""
        ops = self._gradient_ops
        with (
            ops.weighed(weights)
            if isinstance(ops, WorkerAllReduce)
            else contextlib.nullcontext()
        ):
            return self._sum_over_replicas(
                tf.distribute.ReduceOp.SUM,
                [(gradient, gradient) for gradient in gradients],
                tf.distribute.experimental.CommunicationOptions(),
            )

    def _update_config_proto(self, config_proto: Any) -> Any:
        # TensorFlow's defaults cut what a worker sends into strings of 4 KiB
        # and send all of it through one connection.
        config = super()._update_config_proto(config_proto)
        config.experimental.recv_buf_max_chunk = -1
        config.rpc_options.num_channels_per_target = 4
        return config

    def _initialize_local_devices(
        self, cluster_resolver: Any, worker_device: str
    ) -> tuple[tuple[str, ...], str]:
        devices, kind = super()._initialize_local_devices(
            cluster_resolver, worker_device
        )
        if kind == "CPU":
            host = tf.config.list_physical_devices("CPU")[0]
            made = tf.config.get_logical_device_configuration(host) or [None]
            devices = tuple(
                f"{worker_device}/device:CPU:{index}"
                for index in range(len(made))
            )
        return devices, kind

    def _experimental_distribute_dataset(
        self, dataset: Any, options: Any
    ) -> Any:
        steps = keras_compat.steps_of_keras_epochs()
        if steps is not None and self._agreement is not None:
            self._agreement.compare_steps(*steps)
        return super()._experimental_distribute_dataset(dataset, options)

    def _sum_over_replicas(
        self, reduce_op: Any, value_destination_pairs: Any, options: Any
    ) -> Any:
        if not tf.executing_eagerly():
            return self._gradient_ops.batch_reduce(
                reduce_op, value_destination_pairs, options
            )
        # Stock numbers its collectives one by one, which is right here, and
        # orders those of NCCL.
        with self._waiting():
            reduced = super()._sum_over_replicas(
                reduce_op,
                [
                    (self._as_sent(value), destination)
                    for value, destination in value_destination_pairs
                ],
                options,
            )
        return [
            _cast(total, _dtype(value))
            for total, (value, _) in zip(
                reduced, value_destination_pairs, strict=True
            )
        ]

    def _as_sent(self, value: Any) -> Any:
        """A distributed value in the dtype in which it crosses."""
        if self._num_workers == 1:
            return value
        return _cast(value, self._wire.dtype_of(_dtype(value)))

    def _reduce_to(
        self, reduce_op: Any, value: Any, destinations: Any, options: Any
    ) -> Any:
        if (
            not tf.executing_eagerly()
            and self._num_workers > 1
            and reduce_op == tf.distribute.ReduceOp.SUM
            and isinstance(value, tf.Tensor)
        ):
            # Whether any worker still has data, which every step asks.
            return self._exact.all_reduce(value, "reduce")
        with self._waiting():
            return super()._reduce_to(reduce_op, value, destinations, options)

    def _gather_to_implementation(self, *args: Any, **kwargs: Any) -> Any:
        with self._waiting():
            return super()._gather_to_implementation(*args, **kwargs)

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        """What stock runs eagerly in the block is under way."""
        if tf.executing_eagerly():
            return self._progress.during()
        return contextlib.nullcontext()


def _dtype(value: Any) -> tf.DType:
    return getattr(value, "values", (value,))[0].dtype


def _cast(value: Any, dtype: tf.DType) -> Any:
    """A distributed value with each replica's part cast where it is."""
    if _dtype(value) == dtype:
        return value
    parts = []
    for part in getattr(value, "values", (value,)):
        with tf.device(part.device):
            parts.append(tf.cast(part, dtype))
    return type(value)(tuple(parts)) if hasattr(value, "values") else parts[0]
