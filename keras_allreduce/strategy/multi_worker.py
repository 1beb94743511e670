"""MultiWorkerMirroredStrategy whose gradients go through `BatchAllReduce`."""

import itertools
import os
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.devices import host_devices
from keras_allreduce.environment import HOST_DEVICES
from keras_allreduce.strategy.base import StrategyBase
from keras_allreduce.strategy.checks import explained
from keras_allreduce.strategy.multi_worker_extended import (
    MultiWorkerAllReduceExtended,
)
from keras_allreduce.workers.group import WorkerOptions
from keras_allreduce.workers.in_flight import lateness_ms
from keras_allreduce.workers.mpi.start import TRANSPORTS, choose_transport
from keras_allreduce.workers.timing import TIMING
from keras_allreduce.workers.wire_formats import (
    EXACT,
    WIRE_FORMATS,
    WireFormat,
    wire_dtypes,
)

_CommunicationOptions = tf.distribute.experimental.CommunicationOptions


# Strategies are made in one order on all workers. Groups of our own begin far
# above: `workers/collectives.py`.
_key_bases = itertools.count(0, 100)


class MultiWorkerAllReduceStrategy(
    StrategyBase, tf.distribute.MultiWorkerMirroredStrategy
):
    """Synchronous data-parallel training on the devices of several workers.

    A drop-in replacement for `tf.distribute.MultiWorkerMirroredStrategy` that
    works with `model.fit` of Keras 3. Every worker runs the same script and
    processes its part of each global batch.

    Args:
        cluster_resolver: Addresses of the workers and the index of this one.
            `None`: read from TF_CONFIG if it is set, else from `mpirun`,
            `srun` or Kubernetes (see `LauncherClusterResolver`); otherwise
            this process is the only worker.
        communication_options: A
            `tf.distribute.experimental.CommunicationOptions`; its
            `bytes_per_pack` and `timeout_seconds` override the arguments
            below.
        bytes_per_pack: Capacity of a pack in bytes; 0: automatic.
        timeout_seconds: Seconds a worker waits for the others before the step
            fails; 20 for a worker that does not answer health checks.
        wire_dtype: `"bfloat16"` or `"float16"`: gradients of wider float
            dtypes are sent in this dtype, half the bytes of float32, and
            summed in their own. Rounds the gradients of each worker to 8 bits
            (bfloat16) or 11 bits (float16, which overflows above 65504).
            `None`: gradients are sent without rounding.
        compression: A `WireFormat`: any other way to send gradients, as a
            communication hook of PyTorch DDP is. Replaces `wire_dtype`.
        sparse_as_dense: See `BatchAllReduce`.
        weigh_samples: See `AllReduceStrategy`.
        fit_log: See `AllReduceStrategy`.
        measure_lateness: Whether to measure stragglers, for
            `worker_lateness` and `AllReduceLogger`.
        transport: Transport between workers without GPUs: `"grpc"`,
            TensorFlow's ring; `"mpi"`, the MPI that started the workers;
            `"auto"`, MPI if it started them and mpi4py is installed, else
            gRPC.

    Raises:
        TypeError: If `compression` is not a `WireFormat`.
        ValueError: If an argument is not one of the above, or TF_CONFIG does
            not describe workers.
        WorkerError: If a worker's port is in use, if a worker does not join
            within `timeout_seconds`, or if the workers differ in versions,
            options or devices. A `RuntimeError`.
    """

    _collective_key_base: int

    @explained
    def __init__(
        self,
        cluster_resolver: Any = None,
        communication_options: Any = None,
        *,
        bytes_per_pack: int = 0,
        timeout_seconds: float = TIMING.timeout,
        wire_dtype: str | None = None,
        compression: WireFormat | None = None,
        sparse_as_dense: bool = False,
        weigh_samples: bool | None = None,
        fit_log: bool = True,
        measure_lateness: bool = False,
        transport: str = "auto",
    ):
        self._init_options(weigh_samples, fit_log)
        self.measure_lateness = bool(measure_lateness)
        if HOST_DEVICES in os.environ:
            host_devices(int(os.environ[HOST_DEVICES]))
        _check(timeout_seconds, transport)
        wire_format = _wire_format(wire_dtype, compression)
        asked = communication_options or _CommunicationOptions()
        options = WorkerOptions(
            asked.bytes_per_pack or bytes_per_pack,
            asked.timeout_seconds or timeout_seconds,
            wire_format,
            self.measure_lateness,
            sparse_as_dense,
            weigh_samples,
            choose_transport(transport, os.environ),
        )
        stock_options = _CommunicationOptions(
            bytes_per_pack=options.bytes_per_pack,
            implementation=asked.implementation,
        )
        # TensorFlow numbers its groups of devices from here. The eager
        # collectives of two strategies are two groups, or the second would
        # repeat the numbers of the first. TensorFlow's tests set it, for
        # workers that are threads.
        self._collective_key_base = self._collective_key_base or next(
            _key_bases
        )
        extended = MultiWorkerAllReduceExtended(
            self, cluster_resolver, stock_options, options
        )
        tf.distribute.Strategy.__init__(self, extended)
        self._set_options_of_hints(self.extended.group.gradient_ops)
        self._log_start(
            f"worker {self.cluster_resolver.task_id}",
            f"{self.extended.num_workers} workers",
            f"options: {options.facts()}",
        )

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
        return lateness_ms(self.extended.waits())

    def broadcast(self, model: keras.Model) -> None:
        """Gives all workers the chief's weights and optimizer state.

        For values that only the chief has loaded or set. To be called on all
        workers, outside of `fit`.

        Args:
            model: A model that was made inside the scope of this strategy.
        """
        self.extended.group.broadcast(model)

    def reduce(self, reduce_op: Any, value: Any, axis: Any) -> Any:
        """See `tf.distribute.Strategy.reduce`.

        The logs of a step stay on this worker. Those of training are means
        over the samples of all workers already.
        """
        if keras_compat.are_scalar_logs(reduce_op, value, axis):
            parts = self.experimental_local_results(value)
            return tf.reduce_mean(tf.stack(parts))
        if isinstance(value, tf.Variable) and axis is None:
            total = self.extended.metric_sums.of(value)
            if total is not None:
                return total
        return super().reduce(reduce_op, value, axis)


def _check(timeout_seconds: float, transport: str) -> None:
    """Raises a `ValueError` if an argument is wrong."""
    if not timeout_seconds > 0:
        raise ValueError(
            "`timeout_seconds` must be positive. Received: "
            f"timeout_seconds={timeout_seconds!r}"
        )
    if transport not in TRANSPORTS:
        raise ValueError(
            f"`transport` must be one of {', '.join(TRANSPORTS)}. "
            f"Received: transport={transport!r}"
        )


def _wire_format(
    wire_dtype: str | None, compression: WireFormat | None
) -> WireFormat:
    """The format that one of two arguments names.

    Raises:
        TypeError: If `compression` is not a format.
        ValueError: If both are given, or there is no such dtype.
    """
    if compression is None:
        if wire_dtype not in (None, *wire_dtypes()):
            raise ValueError(
                f"`wire_dtype` must be one of {', '.join(wire_dtypes())}, or "
                f"None. Received: wire_dtype={wire_dtype!r}"
            )
        return WIRE_FORMATS[wire_dtype or EXACT.name]
    if not isinstance(compression, WireFormat):
        raise TypeError(
            "`compression` must be an object of a subclass of "
            f"`keras_allreduce.WireFormat`. Received: {compression!r}. For "
            'half precision pass `wire_dtype="float16"` or `"bfloat16"`.'
        )
    if wire_dtype is not None:
        raise ValueError(
            "Pass either `wire_dtype` or `compression`. Received: wire_dtype="
            f"{wire_dtype!r}, compression={compression.name!r}."
        )
    return compression
