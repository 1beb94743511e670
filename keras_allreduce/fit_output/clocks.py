"""When each pack left and came back, measured inside the train step.

Clocks only look. They take the time when tensors that exist anyway become
ready, and nothing in the step waits for them. Each step writes one row of
times per device into a ring of rows, which is read when somebody asks.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.graph_order import free_running_clock
from keras_allreduce.reduce.observe import PackTensors

ROWS = 1024
"""Steps that clocks remember; the oldest is overwritten."""


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


class GraphClocks:
    """Clocks in the graph of a traced step.

    The first step is not remembered: it also pays for loading the kernels.

    Args:
        packs: `PackTensors` of each pack, in the current graph.
        devices: Device of each replica. Times are taken on the device itself
            if it is a host device, so that looking moves no tensor, and on
            the host of a GPU (whose clock the GPU's queue is waited for).
    """

    def __init__(self, packs: Sequence[PackTensors], devices: Sequence[str]):
        self._num_packs = len(packs)
        self._rows: list[tf.Variable] = []
        self._counts: list[tf.Variable] = []
        self._nows: list[Any] = []
        for replica, device in enumerate(devices):
            with tf.device(_host_of(device)):
                self._take_times(
                    [pack.gradients[replica] for pack in packs],
                    [pack.results[replica] for pack in packs],
                )
        # The step's graph keeps its clocks alive: their variables must be
        # there as long as the step can run.
        tf.compat.v1.get_default_graph().add_to_collection(
            "keras_allreduce_clocks", self
        )

    def _take_times(
        self, gradients: Sequence[Any], results: Sequence[Any]
    ) -> None:
        with tf.init_scope():
            rows = distribute.ResourceVariable(
                np.zeros([ROWS, 2 * self._num_packs]), trainable=False
            )
            count = distribute.ResourceVariable(
                np.int64(0), trainable=False, dtype=tf.int64
            )
            now = free_running_clock(count)
        self._rows.append(rows)
        self._counts.append(count)
        self._nows.append(now)
        times = [_time_after(tensors, now) for tensors in gradients]
        times += [_time_after([result], now) for result in results]
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
        first = max(since, 1, steps - ROWS)
        kept = np.arange(first, max(first, steps)) % ROWS
        times = np.stack(
            [rows.sparse_read(kept).numpy() for rows in self._rows]
        )
        latest = times.max(axis=0)
        return Times(
            steps, latest[:, : self._num_packs], latest[:, self._num_packs :]
        )


class EagerClocks:
    """Clocks of steps that run eagerly, one op after another."""

    def __init__(self, num_packs: int):
        self._num_packs = num_packs
        self.steps = 0
        self._rows: deque[tuple[float, float]] = deque(maxlen=ROWS)

    def add(self, ready: float, done: float) -> None:
        """Adds one step: times in seconds, the same for all its packs."""
        self.steps += 1
        self._rows.append((ready, done))

    def read(self, since: int = 0) -> Times:
        """Times of the remembered steps after the first `since`."""
        oldest = self.steps - len(self._rows)
        first = max(since, 1)
        rows = list(self._rows)[max(first - oldest, 0) :]
        times = np.array(rows, dtype=float).reshape([len(rows), 2, 1])
        times = np.repeat(times, self._num_packs, axis=2)
        return Times(self.steps, times[:, 0], times[:, 1])


def _host_of(device: str) -> str:
    spec = tf.DeviceSpec.from_string(device)
    if spec.device_type == "CPU":
        return device
    return spec.replace(device_type="CPU", device_index=0).to_string()


def _time_after(tensors: Sequence[Any], now: Any) -> tf.Tensor:
    """Seconds since the epoch when the last of `tensors` is ready."""
    flat = tf.nest.flatten(list(tensors), expand_composites=True)
    with tf.control_dependencies(flat):
        return now()
