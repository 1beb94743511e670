"""MultiWorkerAllReduceStrategy: the same on several machines."""

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce import internals, memory, weighing, worker_checks
from keras_allreduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.checks import host_devices, on_gpus
from keras_allreduce.collectives import Collectives, WorkerGroup
from keras_allreduce.meter import StepLog
from keras_allreduce.progress import Progress
from keras_allreduce.strategy_base import ExtendedBase, StrategyBase
from keras_allreduce.wire import WIRE_DTYPES, Wire
from keras_allreduce.worker_agreement import Agreement, environment
from keras_allreduce.worker_all_reduce import WorkerAllReduce
from keras_allreduce.worker_watch import WorkerWatch

TIMEOUT_SECONDS = 600.0

HOST_DEVICES = "KERAS_ALLREDUCE_HOST_DEVICES"
"""Environment variable with the number of host devices per worker."""


class MultiWorkerAllReduceStrategy(
    StrategyBase, tf.distribute.MultiWorkerMirroredStrategy
):
    """Trains one model on the devices of several workers, all in step.

    A drop-in replacement for `tf.distribute.MultiWorkerMirroredStrategy`,
    configured as it is, that runs under `model.fit` of Keras 3. Every worker
    runs the same script; each has its part of every batch.

    Args:
        cluster_resolver: Where the workers are and which of them this is.
            `None`: from the environment variable TF_CONFIG. Without that,
            there is one worker.
        communication_options: A
            `tf.distribute.experimental.CommunicationOptions`; its
            `bytes_per_pack` and `timeout_seconds` go before the arguments
            below.
        bytes_per_pack: Capacity of a pack in bytes; 0: chosen for you.
        timeout_seconds: How long a worker waits for the others before the
            step ends in an error, in seconds; 20 if one does not answer.
        wire_dtype: `"bfloat16"` or `"float16"`: gradients of wider float
            dtypes cross between workers in this one, at half the bytes of
            float32, and are summed in their own. Rounds each worker's part:
            to 8 bits (bfloat16) or 11 bits (float16, which overflows above
            65504). `None`: every gradient crosses as it is.
        sparse_as_dense: See `BatchAllReduce`.
        weigh_samples: See `AllReduceStrategy`.
        fit_log: See `AllReduceStrategy`.
        measure_lateness: Whether `worker_lateness` and `AllReduceLogger` tell
            which worker the others wait for.

    Raises:
        ValueError: If an argument is not one of the above, or TF_CONFIG does
            not describe workers.
        RuntimeError: If a worker's port is not free, if a worker does not
            come within `timeout_seconds`, or if workers differ in versions,
            options or devices.
    """

    def __init__(
        self,
        cluster_resolver: Any = None,
        communication_options: Any = None,
        *,
        bytes_per_pack: int = 0,
        timeout_seconds: float = TIMEOUT_SECONDS,
        wire_dtype: str | None = None,
        sparse_as_dense: bool = False,
        weigh_samples: bool | None = None,
        fit_log: bool = True,
        measure_lateness: bool = False,
    ):
        self._init_options(weigh_samples, fit_log)
        self.measure_lateness = bool(measure_lateness)
        if HOST_DEVICES in os.environ:
            host_devices(int(os.environ[HOST_DEVICES]))
        if not timeout_seconds > 0:
            raise ValueError(
                "`timeout_seconds` must be positive. Received: "
                f"timeout_seconds={timeout_seconds!r}"
            )
        if wire_dtype not in (None, *WIRE_DTYPES):
            raise ValueError(
                f"`wire_dtype` must be one of {', '.join(WIRE_DTYPES)}, or "
                f"None. Received: wire_dtype={wire_dtype!r}"
            )
        asked = communication_options or (
            tf.distribute.experimental.CommunicationOptions()
        )
        options = tf.distribute.experimental.CommunicationOptions(
            bytes_per_pack=asked.bytes_per_pack or bytes_per_pack,
            implementation=asked.implementation,
        )
        tf.distribute.Strategy.__init__(
            self,
            MultiWorkerAllReduceExtended(
                self,
                cluster_resolver,
                options,
                asked.timeout_seconds or timeout_seconds,
                wire_dtype,
                sparse_as_dense,
                Progress(timed=measure_lateness),
            ),
        )

    # MultiWorkerMirroredStrategy takes this from its class.
    _collective_key_base = 0

    @property
    def fit_log(self) -> StepLog | None:
        """What the fit output shows: nothing but on the chief."""
        return super().fit_log if self.extended.is_chief else None

    def worker_lateness(self) -> list[float]:
        """How much later than the first each worker comes to a step.

        The first to come waits longest in a collective, so no clocks of
        different hosts are compared. To be called on all workers of a strategy
        with `measure_lateness=True`.

        Returns:
            Milliseconds per step, by worker; 0 for the one that waits
            longest. Means over the steps since the last call; all `nan` if a
            worker has counted none.
        """
        waits = self.extended.waits_of_all_workers()
        return [(max(waits) - each) * 1e3 for each in waits]

    def reduce(self, reduce_op: Any, value: Any, axis: Any) -> Any:
        """Reduces `value` across replicas, as `tf.distribute.Strategy` does.

        Two things that Keras asks for in `fit` stay on this worker: the
        shapes of a first batch, and the logs of a step. Those are means over
        the samples of this worker; what `fit` returns at the end of an epoch
        is exact and the same on all.

        Args:
            reduce_op: `"SUM"`, `"MEAN"` or a `tf.distribute.ReduceOp`.
            value: Distributed value, or a nested structure of such.
            axis: Axis to reduce along within each replica too, or `None`.

        Returns:
            A tensor, or a structure of tensors like `value`.
        """
        mean = _is_mean(reduce_op)
        if mean and axis is None and keras.tree.is_nested(value):
            return keras.tree.map_structure(
                lambda leaf: self.experimental_local_results(leaf)[0], value
            )
        if mean and axis == 0:
            parts = self.experimental_local_results(value)
            if all(_rank(part) == 0 for part in parts):
                return tf.reduce_mean(tf.stack(parts))
        return super().reduce(reduce_op, value, axis)


class MultiWorkerAllReduceExtended(
    ExtendedBase, internals.CollectiveAllReduceExtended
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
        with worker_checks.starting(
            cluster_resolver, timeout_seconds
        ) as cluster:
            if cluster is not None or not on_gpus():
                # Has no effect once TensorFlow has started its threads.
                memory.keep_freed()
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

    def shares_of(self, amounts: list[tf.Tensor]) -> list[tf.Tensor]:
        """Share of each replica of this worker in the whole batch."""
        total = self.sum_over_workers(tf.add_n(amounts), "batch")
        return weighing.shares(
            amounts, total=total, count=self._num_replicas_in_sync
        )

    def sum_over_workers(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of a tensor that each worker has, in its own dtype."""
        if self._num_workers == 1:
            return value
        return self._exact.all_reduce(value, name)

    def sum_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """Sums distributed gradients, weighed if their loss was not."""
        weights = self._step.weights_of_gradients if self._step else ()
        ops = self._gradient_ops
        with (
            ops.weighed(weights)
            if isinstance(ops, WorkerAllReduce)
            else contextlib.nullcontext()
        ):
            return super().sum_gradients(gradients)

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
        steps = internals.steps_of_keras_epochs()
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


def _is_mean(reduce_op: Any) -> bool:
    return str(getattr(reduce_op, "value", reduce_op)).upper() == "MEAN"


def _rank(value: Any) -> int | None:
    return tf.TensorShape(value.shape).rank


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
