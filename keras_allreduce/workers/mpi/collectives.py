"""The collectives of `workers/collectives.py`, over MPI.

    graph:   tensor --> run (Python, returns in a moment) ---> tensor
                           :                                     ^
    engine:                messages of MPI, result into a queue  |
                           :                                     |
    graph:              dequeue (holds no thread) ---------------'

Nothing is copied on the way: the array that MPI sends from is the tensor's
memory, and the tensor that comes out is the memory MPI received in.
"""

import itertools
import threading
from typing import Any

import numpy as np
import tensorflow as tf

from keras_allreduce.graph_order import keep_with_graph
from keras_allreduce.workers.collectives import CollectiveGroup, CollectiveNames
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.mpi import messages
from keras_allreduce.workers.mpi.communicators import Submission
from keras_allreduce.workers.mpi.engine import Engine
from keras_allreduce.workers.mpi.messages import Collective

# The sums that every MPI can do. It has no 16-bit floats: those are exchanged.
_SUMMED = (
    tf.float32,
    tf.float64,
    tf.int8,
    tf.int16,
    tf.int32,
    tf.int64,
    tf.uint8,
    tf.uint16,
    tf.uint32,
    tf.uint64,
)

# Instead of the number of a run.
_FAILED, _DONE = -1, -2
_ABORTED_GROUP = 999_999


class _Site:
    """One collective at its place in a graph, which may run again and again.

    A result in the queue carries the number of its run, so that none is taken
    for another.

    Args:
        engine: Runs the collective.
        name: Its name, the same on all workers.
        collective: One of `messages.py`.
        dtype: Dtype of the messages.
        device: Host device of this worker.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        collective: Collective,
        dtype: tf.DType,
        device: str,
    ):
        self._engine = engine
        self._name = name
        self._collective = collective
        self._dtype = dtype
        self._runs = itertools.count()
        with tf.init_scope(), tf.device(device):
            self._queue = tf.queue.FIFOQueue(2, [dtype, tf.int64])

    def trace(self, tensor: tf.Tensor) -> tf.Tensor:
        """Adds the collective to the graph that is traced."""
        queue = self._queue.queue_ref
        # With the queue as an input the op waits for no other collective, as
        # TensorFlow orders ops by the resource that they use.
        run, received = tf.numpy_function(
            self._run, [tensor, queue], [tf.int64, self._dtype]
        )
        return tf.cond(
            run == _DONE,
            lambda: received,
            lambda: self._dequeued(run, queue),
        )

    def _dequeued(self, run: tf.Tensor, queue: tf.Tensor) -> tf.Tensor:
        received, of_run = tf.raw_ops.QueueDequeueV2(
            handle=queue, component_types=[self._dtype, tf.int64]
        )
        return tf.cond(
            of_run == run,
            lambda: received,
            lambda: _aborted(received, queue),
        )

    def _run(self, own: np.ndarray, *_: Any) -> tuple[np.int64, np.ndarray]:
        run = next(self._runs)
        empty = np.empty(0, self._dtype.as_numpy_dtype)

        def deliver(received: np.ndarray | None) -> None:
            if received is None:
                self._deliver(tf.constant(empty), _FAILED)
            else:
                self._deliver(_as_tensor(received), run)

        received = self._engine.run(
            Submission(self._name, self._collective, own, deliver)
        )
        if received is None:
            return np.int64(run), empty
        return np.int64(_DONE), received

    def _deliver(self, tensor: tf.Tensor, run: int) -> None:
        # Runs on the device of the queue.
        tf.raw_ops.QueueEnqueueV2(
            handle=self._queue.queue_ref,
            components=[tensor, tf.constant(run, tf.int64)],
        )


class MpiCollectives:
    """Collectives of the logical CPU devices of all workers, over MPI.

    They wait for the others without a limit; the health monitor ends them.

    Attributes:
        medium: Transport between workers, for the plan line.

    Args:
        engine: Runs them.
        group: The logical CPU devices.
        in_flight: Counts the collectives for the health monitor.
    """

    medium = "MPI"

    def __init__(
        self, engine: Engine, group: CollectiveGroup, in_flight: InFlight
    ):
        self._engine = engine
        self._group = group
        self._in_flight = in_flight
        self._names = CollectiveNames()

    @property
    def device(self) -> str:
        """Host device of this worker, where the results are."""
        return self._group.device

    def sums(self, tensor: tf.Tensor) -> bool:
        """Whether `all_reduce` is the way to sum `tensor`."""
        return tensor.dtype in _SUMMED

    def all_reduce(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sums `tensor` over the workers: see `workers/collectives.py`."""
        with tf.device(self.device):
            if self._group.size > 2:
                total = self._run(messages.all_reduce, tensor, purpose)
            else:
                total = tensor + self._run(messages.swap, tensor, purpose)
            total.set_shape(tensor.shape)
            return total

    def all_gather(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates `tensor`, of one shape on all workers, along axis 0."""
        rows = self._run(messages.all_gather, tensor, purpose)
        length, *row = tensor.shape
        all_rows = None if length is None else length * self._group.size
        rows.set_shape([all_rows, *row])
        return rows

    def all_to_all(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sends row w of `tensor` to worker w, and returns one row of each."""
        rows = self._run(messages.all_to_all, tensor, purpose)
        rows.set_shape(tensor.shape)
        return rows

    def all_gather_rows(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates tensors that may differ in length along axis 0."""
        rows = self._run(messages.all_gather_rows, tensor, purpose)
        rows.set_shape([None, *tensor.shape[1:]])
        return rows

    def _run(
        self, collective: Collective, tensor: tf.Tensor, purpose: str
    ) -> tf.Tensor:
        if tf.executing_eagerly():
            self._in_flight.count_eager()
            with self._in_flight.during():
                return self._run_now(collective, tensor)
        with tf.device(self.device):
            name = f"{self._group.key} {self._names.name(tensor, purpose)}"
            site = _Site(
                self._engine, name, collective, tensor.dtype, self.device
            )
            keep_with_graph(site)
            with self._in_flight.watched(name, [tensor]) as (results, _):
                results.append(site.trace(tensor))
            return results[0]

    def _run_now(self, collective: Collective, tensor: tf.Tensor) -> tf.Tensor:
        # One after the other, in one order on all workers: one name for all.
        done = threading.Event()
        results: list[np.ndarray | None] = []

        def deliver(received: np.ndarray | None) -> None:
            results.append(received)
            done.set()

        name = f"{self._group.key} eager"
        received = self._engine.run(
            Submission(name, collective, tensor.numpy(), deliver)
        )
        if received is None:
            done.wait()
            (received,) = results
        if received is None:
            return _aborted(tensor)
        return _as_tensor(received)


def _aborted(tensor: tf.Tensor, *tokens: tf.Tensor) -> tf.Tensor:
    """Ends in the error with which TensorFlow's collectives were aborted."""
    end = tf.raw_ops.CollectiveReduceV2(
        input=0.0,
        group_size=2,
        group_key=_ABORTED_GROUP,
        instance_key=0,
        ordering_token=list(tokens),
        merge_op="Add",
        final_op="Id",
    )
    with tf.control_dependencies([end]):
        return tf.identity(tensor)


def _as_tensor(array: np.ndarray) -> tf.Tensor:
    """A tensor with the memory of the array."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
