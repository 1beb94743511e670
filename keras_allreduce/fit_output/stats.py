"""The cost of the all-reduce, computed from the times of its packs.

one step   ready[0]      done[0]
           |---- pack 0 ----|
                  ready[1]        done[1]
                  |----- pack 1 ------|
all_reduce |==========================|    some pack is under way
exposed           |===================|    ... and backprop is over
"""

from dataclasses import dataclass, replace

import numpy as np

from keras_allreduce.reduce.plan import bus_share


@dataclass(frozen=True)
class ReduceStats:
    """Cost of the all-reduce, averaged over steps.

    Definitions in `docs/fit_output.md`; they follow the logging data of
    PyTorch DistributedDataParallel and the PERFORMANCE.md of nccl-tests.

    Attributes:
        steps: Number of measured steps. If 0, every mean is `nan`.
        all_reduce_ms: Milliseconds per step with at least one pack in flight.
        exposed_ms: The part of `all_reduce_ms` after the last gradient was
            ready, which does not overlap with backprop.
        num_packs: Packs per step.
        nbytes: Bytes reduced per step, `None` if not known.
        num_replicas: Number of replicas.
    """

    steps: int
    all_reduce_ms: float
    exposed_ms: float
    num_packs: int
    nbytes: int | None
    num_replicas: int

    @property
    def overlap(self) -> float:
        """Share of `all_reduce_ms` that is hidden behind backprop, 0 to 1."""
        if not self.all_reduce_ms:
            return float("nan")
        return 1 - self.exposed_ms / self.all_reduce_ms

    @property
    def all_reduce_gbps(self) -> float:
        """Bus bandwidth in 10^9 bytes per second, `nan` if not known.

        Bytes per step / `all_reduce_ms` * 2 (n - 1) / n, for n replicas.
        """
        if not self.all_reduce_ms or self.nbytes is None:
            return float("nan")
        sent = self.nbytes * bus_share(self.num_replicas)
        return sent / (self.all_reduce_ms * 1e6)


def measure(
    ready: np.ndarray,
    done: np.ndarray,
    nbytes: int | None,
    num_replicas: int,
) -> ReduceStats:
    """Computes `ReduceStats` from the times of the packs.

    Args:
        ready: `ready[step, pack]`, time in seconds when the last gradient of
            the pack was ready on the last replica.
        done: `done[step, pack]`, time in seconds when the last replica had
            the result of the pack.
        nbytes: Bytes reduced per step, `None` if not known.
        num_replicas: Number of replicas.

    Returns:
        The means over all steps.
    """
    steps, num_packs = ready.shape
    under_way = exposed = float("nan")
    if ready.size:
        last_ready = ready.max(axis=1, keepdims=True)
        under_way = float(_union(ready, done).mean())
        exposed = float(_union(np.maximum(ready, last_ready), done).mean())
    return ReduceStats(
        steps=steps,
        all_reduce_ms=under_way * 1e3,
        exposed_ms=exposed * 1e3,
        num_packs=num_packs,
        nbytes=nbytes,
        num_replicas=num_replicas,
    )


def merge(earlier: ReduceStats | None, later: ReduceStats) -> ReduceStats:
    """Means over the steps of both, with the plan of the later one."""
    if earlier is None or not earlier.steps:
        return later
    if not later.steps:
        return earlier
    steps = earlier.steps + later.steps
    weight = later.steps / steps
    return replace(
        later,
        steps=steps,
        all_reduce_ms=_mix(earlier.all_reduce_ms, later.all_reduce_ms, weight),
        exposed_ms=_mix(earlier.exposed_ms, later.exposed_ms, weight),
    )


def _mix(earlier: float, later: float, weight: float) -> float:
    return earlier * (1 - weight) + later * weight


def _union(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Length of the union of the intervals `[start, end]` of each row."""
    order = np.argsort(start, axis=1)
    start = np.take_along_axis(start, order, axis=1)
    end = np.take_along_axis(end, order, axis=1)
    covered = np.maximum.accumulate(end, axis=1)
    before = np.concatenate([start[:, :1], covered[:, :-1]], axis=1)
    return np.maximum(end - np.maximum(start, before), 0).sum(axis=1)
