"""The group of several workers.

WorkerGroup.connect
    [1] monitor         asks the others, from now on
    [2] check           same versions, devices and options?
    [3] collectives     between logical CPU devices (gRPC or MPI), between GPUs
    [4] wires           exact, and in the format of `compression`
    [5] gradient_ops    what sums gradients
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from keras_allreduce.compat import runtime
from keras_allreduce.compat.keras_calls import KerasCall
from keras_allreduce.devices import on_gpus
from keras_allreduce.reduce.process_group import ProcessGroup
from keras_allreduce.workers import excepthook
from keras_allreduce.workers.between_workers import (
    BetweenWorkers,
    WorkerAllReduce,
)
from keras_allreduce.workers.calls import Calls
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.collectives import (
    FIRST_KEY,
    CollectiveGroup,
    Collectives,
)
from keras_allreduce.workers.consistency_check import (
    ConsistencyCheck,
    environment,
)
from keras_allreduce.workers.fingerprint import Fingerprint
from keras_allreduce.workers.health import (
    AwakeClock,
    CollectiveTimeout,
    HealthMonitor,
)
from keras_allreduce.workers.heartbeats import Heartbeats
from keras_allreduce.workers.host_collectives import (
    HostCollectives,
    all_gather_tensors,
)
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.mpi.collectives import MpiCollectives
from keras_allreduce.workers.mpi.start import MPI, engine_of
from keras_allreduce.workers.progress import Progress
from keras_allreduce.workers.stall import StallInspector
from keras_allreduce.workers.store import KeyValueStore
from keras_allreduce.workers.timing import TIMING
from keras_allreduce.workers.weight_fingerprint import WeightCheck
from keras_allreduce.workers.wire import Wire
from keras_allreduce.workers.wire_formats import WireFormat


@dataclass(frozen=True)
class WorkerOptions:
    """Options of a strategy, which must be the same on all workers.

    Attributes:
        bytes_per_pack: See `BatchAllReduce`.
        timeout_seconds: How long a worker waits for the others.
        wire_format: In which gradients cross between workers.
        measure_lateness: Whether waits are measured.
        sparse_as_dense: See `BatchAllReduce`.
        weigh_samples: See `AllReduceStrategy`.
        transport: `"grpc"` or `"mpi"`: what sums between logical CPU devices.
    """

    bytes_per_pack: int
    timeout_seconds: float
    wire_format: WireFormat
    measure_lateness: bool
    sparse_as_dense: bool
    weigh_samples: bool | None
    transport: str

    def facts(self) -> dict[str, Any]:
        """The options by name, as workers compare them."""
        return {**vars(self), "wire_format": self.wire_format.name}


class WorkerGroup(ProcessGroup):
    """The workers of one strategy, seen from one of them.

    Args:
        num_workers: Number of workers.
        check: The consistency check.
        calls: Compares the calls of Keras.
        collectives: The collectives between their logical CPU devices.
        gpus: The collectives between all of their devices.
        options: Options of the strategy.
    """

    def __init__(
        self,
        num_workers: int,
        check: ConsistencyCheck,
        calls: Calls,
        collectives: HostCollectives,
        gpus: Collectives,
        options: WorkerOptions,
    ):
        self.rank, self.size = check.rank, num_workers
        self._check = check
        self._collectives = collectives
        # On GPUs NCCL sums, which TensorFlow's strategy numbers there.
        self._sums_eagerly = options.transport == MPI and not on_gpus()
        self._exact = Wire(collectives, num_workers)  # [4]
        self._calls = calls
        self._wire = Wire(collectives, num_workers, options.wire_format)
        super().__init__(
            WorkerAllReduce(  # [5]
                BetweenWorkers(
                    self._wire, gpus, num_workers, check.compare_gradients
                ),
                num_workers,
                options.bytes_per_pack,
                sparse_as_dense=options.sparse_as_dense,
            )
        )

    @classmethod
    def connect(
        cls,
        cluster: Cluster,
        owner: Any,
        devices: Sequence[str],
        host: str,
        options: WorkerOptions,
        in_flight: InFlight,
        paths: Callable[[int], Sequence[str]],
        key_base: int,
    ) -> "WorkerGroup":
        """Starts the monitor and compares the workers, as drawn at the top.

        Args:
            cluster: The workers, which TensorFlow has connected.
            owner: The monitor watches as long as this object is there.
            devices: Devices of this worker.
            host: Host device of this worker.
            options: Options of the strategy.
            in_flight: Tracks the collectives.
            paths: Returns the paths of the variables of as many gradients.
            key_base: Where TensorFlow's numbers of groups begin.

        Raises:
            WorkerError: If workers differ in what [2] compares, or one fails.
        """
        seconds, progress = options.timeout_seconds, Progress(in_flight)
        monitor, store = _watch(  # [1]
            cluster, owner, seconds, in_flight, progress
        )
        check = ConsistencyCheck(cluster, store, progress, paths)  # [2]
        facts: Mapping[str, Any] = environment(devices) | options.facts()
        check.compare("versions, devices and options", Fingerprint(facts))
        workers = len(cluster.tasks)
        key = FIRST_KEY + key_base
        group = CollectiveGroup(workers, host, key)  # [3]
        gpus = CollectiveGroup(workers * len(devices), host, key + 1)
        between: HostCollectives = Collectives(group, in_flight)
        if options.transport == MPI:
            between = _over_mpi(cluster, group, seconds, in_flight, monitor)
        nccl = Collectives(gpus, in_flight)
        weights = WeightCheck(check, Wire(between, workers).all_reduce)
        calls = Calls(check, progress, weights)
        return cls(workers, check, calls, between, nccl, options)

    def note_constant(self, initial_value: Any) -> bool:
        """See `ConsistencyCheck`."""
        return self._check.note_constant(initial_value)

    def compare_initial_value(self, initial_value: Any) -> Any:
        """See `ConsistencyCheck`."""
        return self._check.compare_initial_value(initial_value)

    def barrier(self) -> tuple[float, float]:
        """See `ConsistencyCheck`."""
        return self._check.barrier()

    def all_gather_text(self, name: str, text: str) -> list[str]:
        """See `ConsistencyCheck`."""
        return self._check.all_gather_text(name, text)

    def begin_call(
        self,
        call: KerasCall,
        dataset: Any,
        steps: tuple[int | None, int | None],
    ) -> int | None:
        """See `Calls.begin`."""
        return self._calls.begin(call, dataset, steps)

    def broadcast(self, model: keras.Model) -> None:
        """See `WeightCheck`."""
        self._calls.weights.broadcast(model)

    @property
    def sums_now(self) -> bool:
        """Whether sums are those of this group, or of TensorFlow's strategy.

        Over gRPC eager ones are TensorFlow's: our names are for graphs.
        """
        return self._sums_eagerly or not tf.executing_eagerly()

    def broadcast_text(self, text: str) -> str:
        """See `ConsistencyCheck`."""
        return self._check.broadcast_text(text)

    def all_reduce(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of a tensor that each worker has, in its own dtype."""
        return self._exact.all_reduce(value, name)

    def all_gather_tensors(
        self, tensors: Sequence[tf.Tensor], name: str
    ) -> list[list[tf.Tensor]]:
        """The tensors of each worker; see `workers/host_collectives.py`."""
        return all_gather_tensors(tensors, name, self._collectives, self.size)

    def sum_dtype(self, dtype: tf.DType) -> tf.DType:
        """The dtype in which TensorFlow may sum gradients of `dtype`."""
        return self._wire.format_of(dtype).sum_dtype(dtype) or dtype


def _watch(
    cluster: Cluster,
    owner: Any,
    timeout_seconds: float,
    in_flight: InFlight,
    progress: Progress,
) -> tuple[HealthMonitor, KeyValueStore | None]:
    """Watches the other workers for as long as `owner` is there.

    Args:
        cluster: The workers.
        owner: A strategy.
        timeout_seconds: How long a worker waits for the others.
        in_flight: Counts the collectives.
        progress: How far this worker is.

    Returns:
        The monitor, and the store, whose readers fail when it gives up;
        `None` without TensorFlow's coordination service.
    """
    clock = in_flight.clock = AwakeClock()
    heartbeats = Heartbeats(cluster, min(timeout_seconds, TIMING.silent), clock)
    store = inspector = None
    if runtime.has_store():
        store = KeyValueStore(
            cluster,
            timeout_seconds,
            failure=lambda: monitor.failure(),
            cause=lambda: monitor.cause(),
            answers=heartbeats.answers,
            clock=clock,
        )
        inspector = StallInspector(cluster, progress, store, heartbeats.heard)
        heartbeats.inspector = inspector
    else:
        _say_that_nothing_is_compared()
    timeout = CollectiveTimeout(
        in_flight, timeout_seconds, heartbeats, inspector
    )
    monitor = HealthMonitor(
        cluster, clock, heartbeats, inspector, [timeout.check]
    )
    excepthook.install(monitor)
    monitor.start(owner)
    return monitor, store


@functools.cache
def _say_that_nothing_is_compared() -> None:
    logging.warning(
        "keras_allreduce: TensorFlow's coordination service is switched off. "
        "Workers train without checks that their models, steps and options "
        "are the same, and one that has ended counts as failed. Leave "
        "`service_type` alone to have them."
    )


def _over_mpi(
    cluster: Cluster,
    group: CollectiveGroup,
    timeout_seconds: float,
    in_flight: InFlight,
    monitor: HealthMonitor,
) -> HostCollectives:
    """Collectives over MPI, which fail when the monitor gives up."""
    engine = engine_of(cluster, timeout_seconds)
    monitor.on_loss.append(engine.fail)
    return MpiCollectives(engine, group, in_flight)
