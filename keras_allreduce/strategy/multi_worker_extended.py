"""How values are reduced over several workers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from keras_allreduce import malloc
from keras_allreduce.compat import distribute, keras_calls
from keras_allreduce.compat.iterators import every_worker_knows_its_steps
from keras_allreduce.devices import (
    num_asked_host_devices,
    on_each,
    on_gpus,
)
from keras_allreduce.reduce import packing
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.reduce.process_group import ProcessGroup
from keras_allreduce.strategy.datasets import share_steps, shuffled_alike
from keras_allreduce.strategy.extended import ExtendedBase
from keras_allreduce.workers import connect
from keras_allreduce.workers.group import WorkerGroup, WorkerOptions
from keras_allreduce.workers.in_flight import (
    Counters,
    InFlight,
    TimedCounters,
    nothing_is_read,
)
from keras_allreduce.workers.resolvers import resolver_for

_SUM = tf.distribute.ReduceOp.SUM


class MultiWorkerAllReduceExtended(
    ExtendedBase, distribute.CollectiveAllReduceExtended
):
    """MultiWorkerMirroredStrategy's, with another path for gradients.

    Args:
        container_strategy: Its strategy.
        cluster_resolver: See `MultiWorkerAllReduceStrategy`.
        communication_options: TensorFlow's, for its own reductions.
        options: Options of the strategy.
    """

    # The health monitor does this, and names the worker.
    _enable_check_health = False

    def __init__(
        self,
        container_strategy: Any,
        cluster_resolver: Any,
        communication_options: Any,
        options: WorkerOptions,
    ):
        self._in_flight = InFlight(
            TimedCounters if options.measure_lateness else Counters
        )
        # For the variables that TensorFlow makes while it connects.
        self._workers = ProcessGroup(
            BatchAllReduce(
                "auto",
                options.bytes_per_pack,
                sparse_as_dense=options.sparse_as_dense,
            )
        )
        self.metric_sums = MetricSums(
            lambda value, name: self._workers.all_reduce(value, name)
        )
        seconds = options.timeout_seconds
        resolver = resolver_for(cluster_resolver, seconds, options.transport)
        with connect.starting(resolver, seconds) as cluster:
            if cluster is not None or not on_gpus():
                # Has no effect once TensorFlow has started its threads.
                malloc.keep_freed()
            with nothing_is_read():
                super().__init__(
                    container_strategy,
                    cluster_resolver=resolver,
                    communication_options=communication_options,
                )
        if cluster is not None:
            distribute.count_collectives(self, self._in_flight.count_eager)
            self._workers = WorkerGroup.connect(
                cluster,
                self,
                self.worker_devices,
                f"{self._worker_device}/device:CPU:0",
                options,
                self._in_flight,
                self.paths_of_gradients,
                self._collective_key_base,
            )

    def _get_variable_creator_initial_value(
        self, replica_id: int, device: Any, primary_var: Any, **kwargs: Any
    ) -> Any:
        if replica_id == 0:
            initial_value = kwargs["initial_value"]
            if self._workers.note_constant(initial_value):
                return initial_value
            kwargs["initial_value"] = self._workers.compare_initial_value(
                initial_value
            )
        return super()._get_variable_creator_initial_value(
            replica_id, device, primary_var, **kwargs
        )

    def waits(self) -> list[float]:
        """Mean seconds per step in a collective, by worker; `nan`: none."""
        own = tf.constant([self._in_flight.read_waits()], tf.float64)
        of_all = self._workers.all_gather_tensors([own], "waits")
        return [float(wait[0]) for (wait,) in of_all]

    def sum_gradients(
        self, gradients: Sequence[Any], weights: Sequence[tf.Tensor] = ()
    ) -> list[Any]:
        """See `Replicas.sum_gradients`; gradients of empty replicas are 0."""
        if self._workers.sums_now:
            return self._workers.gradient_ops.sum(gradients, weights)
        if weights:
            gradients = _scaled(gradients, weights, self.worker_devices)
        return super().sum_gradients(gradients)

    def _update_config_proto(self, config_proto: Any) -> Any:
        # TensorFlow's defaults cut messages of a worker into strings of 4 KiB
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
            # TensorFlow takes one.
            devices = _asked_cpus(worker_device)
        return devices, kind

    def _experimental_distribute_dataset(
        self, dataset: Any, options: Any
    ) -> Any:
        self.metric_sums.forget()
        call, steps = keras_calls.current_call(), None
        if call is not None and call.epoch_iterator is not None:
            steps = call.steps
            dataset = shuffled_alike(
                dataset, call, partial(self._workers.begin_call, steps=steps)
            )
        distributed = super()._experimental_distribute_dataset(dataset, options)
        share_steps(dataset, steps, distributed, self)
        return distributed

    def _sum_over_replicas(
        self, reduce_op: Any, value_destination_pairs: Any, options: Any
    ) -> Any:
        pairs = value_destination_pairs
        if self._workers.sums_now:
            return self._workers.gradient_ops.batch_reduce(
                reduce_op, pairs, options
            )
        # Stock numbers its collectives one by one, which is right here, and
        # orders those of NCCL.
        dtypes = [_dtype(value) for value, _ in pairs]
        sent = [
            (_cast(value, self._workers.sum_dtype(dtype)), destination)
            for (value, destination), dtype in zip(pairs, dtypes, strict=True)
        ]
        with self._in_flight.during():
            reduced = super()._sum_over_replicas(reduce_op, sent, options)
        return list(map(_cast, reduced, dtypes))

    def _reduce_to(
        self, reduce_op: Any, value: Any, destinations: Any, options: Any
    ) -> Any:
        if (
            self._workers.sums_now
            and self._workers.size > 1
            and reduce_op == _SUM
            and isinstance(value, tf.Tensor)
        ):
            if every_worker_knows_its_steps():
                return value
            # Whether any worker still has data, which every step asks. In one
            # process TensorFlow refuses to sum a lone tensor.
            return self._workers.all_reduce(value, "reduce")
        with self._in_flight.during():
            return super()._reduce_to(reduce_op, value, destinations, options)

    def _gather_to_implementation(self, *args: Any, **kwargs: Any) -> Any:
        with self._in_flight.during():
            return super()._gather_to_implementation(*args, **kwargs)


class MetricSums:
    """The sums of the metrics that Keras is reading, in one collective.

    At the end of an epoch Keras reads the variables of its metrics one by one,
    each a collective of its own. The first read sums all of them; the others
    take their part of the result.

    Args:
        sum_over_workers: Sums a tensor over the workers, eagerly.
    """

    def __init__(self, sum_over_workers: Callable[[tf.Tensor, str], tf.Tensor]):
        self._sum_over_workers = sum_over_workers
        # The summed metrics; kept, as another object could have the address.
        self._read: list[Any] | None = None
        self._sums: dict[int, tf.Tensor] = {}

    def forget(self) -> None:
        """Metrics are about to change."""
        self._read = None
        self._sums = {}

    def of(self, variable: Any) -> tf.Tensor | None:
        """The sum of a variable over all replicas of all workers.

        Args:
            variable: A distributed variable that is summed when it is read.

        Returns:
            The sum; `None` if Keras is not reading its metrics, or this is
            not one of theirs.
        """
        if not tf.executing_eagerly():
            return None
        read = keras_calls.metrics_being_read()
        if read is None:
            return None
        if read is not self._read:
            self.forget()
            self._sums = self._sum(read)
            self._read = read
        total = self._sums.pop(id(variable), None)
        if not self._sums:
            # Else it would keep the model.
            self._read = None
        return total

    def _sum(self, variables: Sequence[Any]) -> dict[int, tf.Tensor]:
        sums: dict[int, tf.Tensor] = {}
        for dtype in sorted({each.dtype for each in variables}, key=str):
            same = [each for each in variables if each.dtype == dtype]
            with tf.device("CPU:0"):
                local = [
                    tf.add_n([part.read_value() for part in each.values])
                    for each in same
                ]
                total = self._sum_over_workers(
                    packing.pack(local), f"metrics {dtype.name}"
                )
                totals = packing.unpack(total, local)
            sums |= zip(map(id, same), totals, strict=True)
        return sums


def _asked_cpus(worker_device: str) -> tuple[str, ...]:
    """Names of the logical CPU devices of this worker that were asked for."""
    return tuple(
        f"{worker_device}/device:CPU:{index}"
        for index in range(num_asked_host_devices())
    )


def _scaled(
    values: Sequence[Any], weights: Sequence[tf.Tensor], devices: Sequence[str]
) -> list[Any]:
    """Distributed values with the part of each replica scaled."""
    scaled = []
    for value in values:
        parts = distribute.per_replica(value).values
        parts = on_each(devices, packing.scale, parts, weights)
        scaled.append(distribute.PerReplica(tuple(parts)))
    return scaled


def _dtype(value: Any) -> tf.DType:
    return getattr(value, "values", (value,))[0].dtype


def _cast(value: Any, dtype: tf.DType) -> Any:
    """A distributed value with each replica's part cast where it is."""
    if _dtype(value) == dtype:
        return value
    values = getattr(value, "values", (value,))
    devices = [part.device for part in values]
    parts = on_each(devices, lambda part: tf.cast(part, dtype), values)
    return type(value)(tuple(parts)) if hasattr(value, "values") else parts[0]
