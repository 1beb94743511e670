"""When each pack left and came back, measured inside the train step.

Clocks only look. They take the time when tensors that exist anyway become
ready, and nothing in the step waits for them. Each step writes one row of
times per device into a ring of rows, which is read when somebody asks.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.graph_order import (
    free_running_clock,
    keep_with_graph,
    new_counter,
)
from keras_allreduce.reduce.observe import PackTensors

ROWS = 1024
"""Steps that clocks remember; the oldest is overwritten."""

MARKS = ("begun", "input", "ended")
"""Times of a step beside those of its packs, taken only for a timeline."""

# Ops that run branches, which may write their inputs.
_CALLS = ("If", "StatelessIf", "While", "StatefulPartitionedCall")


class Times(NamedTuple):
    """Times in seconds, oldest step first.

    Attributes:
        steps: Number of steps taken so far, also those not remembered.
        ready: `ready[step, pack]`: its last gradient was ready.
        done: `done[step, pack]`: its result was, on every replica.
    """

    steps: int
    ready: np.ndarray
    done: np.ndarray


class ReplicaTimes(NamedTuple):
    """Times in seconds of each replica, oldest step first.

    Attributes:
        ready: `ready[replica, step, pack]`: its last gradient was ready.
        done: `done[replica, step, pack]`: its result was.
        marks: `marks[replica, step, mark]` in the order of `MARKS`: the step
            had begun, its input was there, all that it writes was written.
            `nan` where they were not taken.
    """

    ready: np.ndarray
    done: np.ndarray
    marks: np.ndarray


class GraphClocks:
    """Clocks in the graph of a traced step.

    The first step is not in `read`: it also pays for loading the kernels.

    Args:
        packs: `PackTensors` of each pack, in the current graph.
        devices: Device of each replica. Times are taken on the device itself
            if it is a logical CPU device, so that looking moves no tensor, and
            on the host of a GPU (whose clock the GPU's queue is waited for).
        inputs: `inputs[replica]`, tensors that the step of a replica begins
            with. `None`: no `MARKS` are taken, and nothing is added for them.
    """

    def __init__(
        self,
        packs: Sequence[PackTensors],
        devices: Sequence[str],
        inputs: Sequence[Sequence[tf.Tensor]] | None = None,
    ):
        self._num_packs = len(packs)
        self._rows: list[tf.Variable] = []
        self._counts: list[tf.Variable] = []
        self._nows: list[Any] = []
        # Before any clock, which must not wait for another.
        writes = [] if inputs is None else list(map(_writes, devices))
        for replica, device in enumerate(devices):
            after = [pack.gradients[replica] for pack in packs]
            after += [[pack.results[replica]] for pack in packs]
            if inputs is not None:
                # In the order of MARKS; nothing is waited for to begin.
                after += [[], inputs[replica], writes[replica]]
            with tf.device(_host_of(device)):
                self._take_times(after)
        keep_with_graph(self)

    def _take_times(self, after: Sequence[Sequence[Any]]) -> None:
        with tf.init_scope():
            rows = distribute.ResourceVariable(
                np.zeros([ROWS, len(after)]), trainable=False
            )
            count = new_counter()
            now = free_running_clock(count)
        self._rows.append(rows)
        self._counts.append(count)
        self._nows.append(now)
        times = [_time_after(awaited, now) for awaited in after]
        steps = count.assign_add(1, read_value=True)
        rows.scatter_nd_update(
            tf.reshape((steps - 1) % ROWS, [1, 1]), tf.stack(times)[tf.newaxis]
        )

    @property
    def steps(self) -> int:
        """Number of steps taken so far."""
        return int(self._counts[0].numpy())

    def read(self, since: int = 0) -> Times:
        """Times of the remembered steps after the first `since`."""
        steps = self.steps
        latest = self._read(max(since, 1), steps).max(axis=0)
        packs = self._num_packs
        return Times(steps, latest[:, :packs], latest[:, packs : 2 * packs])

    def read_replicas(self, since: int = 0) -> ReplicaTimes:
        """Times of each replica in the remembered steps after `since`."""
        times = self._read(since, self.steps)
        packs = self._num_packs
        marks = times[:, :, 2 * packs :]
        if not marks.shape[2]:
            marks = np.full([*times.shape[:2], len(MARKS)], np.nan)
        return ReplicaTimes(
            times[:, :, :packs], times[:, :, packs : 2 * packs], marks
        )

    def _read(self, since: int, steps: int) -> np.ndarray:
        """`times[replica, step, column]` of the remembered steps."""
        first = max(since, steps - ROWS)
        kept = np.arange(first, max(first, steps)) % ROWS
        return np.stack([rows.sparse_read(kept).numpy() for rows in self._rows])


class EagerClocks:
    """Clocks of steps that run eagerly, one op after another."""

    def __init__(self, num_packs: int):
        self._num_packs = num_packs
        self.steps = 0
        self._rows: deque[tuple[float, ...]] = deque(maxlen=ROWS)

    def add(self, ready: float, done: float, begun: float = math.nan) -> None:
        """Adds one step: times in seconds, the same for all its packs."""
        self.steps += 1
        self._rows.append((ready, done, begun, time.time()))

    def read(self, since: int = 0) -> Times:
        """Times of the remembered steps after the first `since`."""
        ready, done, _ = self._read(max(since, 1))
        return Times(self.steps, ready, done)

    def read_replicas(self, since: int = 0) -> ReplicaTimes:
        """Times in the remembered steps after `since`, as of one replica."""
        ready, done, rest = self._read(since)
        # A batch that runs eagerly is there before its step begins.
        marks = rest[:, [0, 0, 1]]
        return ReplicaTimes(ready[None], done[None], marks[None])

    def _read(self, since: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        oldest = self.steps - len(self._rows)
        rows = list(self._rows)[max(since - oldest, 0) :]
        times = np.array(rows, dtype=float).reshape([len(rows), 4])
        ready, done = (
            np.repeat(times[:, column, None], self._num_packs, axis=1)
            for column in (0, 1)
        )
        return ready, done, times[:, 2:]


def _host_of(device: str) -> str:
    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type == "CPU":
        return device
    return spec.replace(device_type="CPU", device_index=0).to_string()


def _writes(device: str) -> list[tf.Operation]:
    """All ops of the current graph that write a replica's variables."""
    return [
        op
        for op in tf.compat.v1.get_default_graph().get_operations()
        if (
            (
                op.type.startswith(("Assign", "Resource"))
                and op.type != "ResourceGather"
            )
            or op.type in _CALLS
        )
        and any(tensor.dtype == tf.resource for tensor in op.inputs)
        and _is_on(op, device)
    ]


def _is_on(op: tf.Operation, device: str) -> bool:
    at, spec = map(tf.DeviceSpec.from_string, (op.device, device))
    return (at.device_type, at.device_index) == (
        spec.device_type,
        spec.device_index,
    )


def _time_after(awaited: Sequence[Any], now: Any) -> tf.Tensor:
    """Seconds since the epoch when the last of the tensors or ops is there."""
    flat = tf.nest.flatten(list(awaited), expand_composites=True)
    with tf.control_dependencies(flat):
        return now()
