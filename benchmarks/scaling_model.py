"""What an all-reduce costs, from the latency and the bandwidth of a link.

The model is the usual one for collectives: a message of n bytes takes
alpha + n / B, and adding it up takes n gamma. Sources:

- Thakur, Rabenseifner and Gropp, "Optimization of collective communication
  operations in MPICH", 2005: the model, and steps and bytes per algorithm.
- Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
  workstations", 2009: the ring sends the least bytes that are possible.

S: bytes of one all-reduce. N: number of workers. D: devices of each.

    exchange (small)   (N - 1) (alpha + S / B)                + (N - 1) S gamma
    ring               2 (N - 1) (alpha + S / (N B))      + (N - 1) / N S gamma
    inside a worker    fixed                                  + (D - 1) S gamma
    hierarchical       inside a worker, then ring between the workers

No TensorFlow in here: everything is arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from keras_allreduce.reduce.pack_sizes import small_bytes

BACKWARD_SHARE = 2 / 3
"""Backprop does two matrix products for each one of the forward pass."""

BUSY_SHARE = 0.3
"""Part of the latency in which no other pack gets on.

Measured: what one more pack costs where many cross at once, as a part of what
a step of one alone takes ("What a message costs" in RESULTS.md).
"""


@dataclass(frozen=True)
class Link:
    """How workers reach each other.

    Attributes:
        alpha: Latency of a step in seconds.
        bandwidth: Bytes per second in each direction.
        gamma: Seconds to add up a byte.
    """

    alpha: float
    bandwidth: float
    gamma: float = 0.0

    def crowded(self, factor: float, *, by_cores: bool) -> "Link":
        """The link when `factor` times as many processes share the cores.

        Args:
            factor: What `crowding` gave.
            by_cores: Whether cores move the bytes, as on loopback, or a wire
                of its own rate does.
        """
        slower = self.bandwidth / factor if by_cores else self.bandwidth
        return replace(
            self,
            alpha=self.alpha * factor,
            bandwidth=slower,
            gamma=self.gamma * factor,
        )

    def busy(self) -> "Link":
        """The link as it costs a pack among others that cross at once."""
        return replace(self, alpha=self.alpha * BUSY_SHARE)


@dataclass(frozen=True)
class Inside:
    """What a sum over the devices of one process costs.

    The result is handed out by reference, which costs nothing.

    Attributes:
        fixed: Seconds whatever the size.
        gamma: Seconds to add up a byte.
    """

    fixed: float
    gamma: float


@dataclass(frozen=True)
class Point:
    """A measurement: `ranks` are workers, or devices of one process."""

    nbytes: int
    ranks: int
    seconds: float


def ring_seconds(nbytes: float, workers: int, link: Link) -> float:
    """Cost of an all-reduce of `nbytes` in a ring."""
    steps = 2 * (workers - 1)
    sums = (workers - 1) / workers * nbytes * link.gamma
    return steps * (link.alpha + nbytes / workers / link.bandwidth) + sums


def exchange_seconds(nbytes: float, workers: int, link: Link) -> float:
    """Cost when each worker gets what all have, in a ring, and sums it."""
    steps = workers - 1
    sums = steps * nbytes * link.gamma
    return steps * (link.alpha + nbytes / link.bandwidth) + sums


def workers_seconds(nbytes: float, workers: int, link: Link) -> float:
    """Cost of what keras_allreduce does between workers at this size."""
    small = nbytes <= small_bytes(workers)
    return (exchange_seconds if small else ring_seconds)(nbytes, workers, link)


def inside_seconds(nbytes: float, devices: int, inside: Inside) -> float:
    """Cost of a sum over devices of one process; nothing for one device."""
    if devices == 1:
        return 0.0
    return inside.fixed + (devices - 1) * nbytes * inside.gamma


def hierarchical_seconds(
    nbytes: float, machines: int, devices: int, link: Link, inside: Inside
) -> float:
    """Cost of a sum inside each machine, then between machines."""
    between = workers_seconds(nbytes, machines, link)
    return inside_seconds(nbytes, devices, inside) + between


def crowding(processes: int, cores: int) -> float:
    """How much slower cores are for each process when they must share."""
    return max(1.0, processes / cores)


def exposed_seconds(
    nbytes: int,
    compute: float,
    pack_bytes: int,
    cost: Callable[[float], float],
    busy: Callable[[float], float] | None = None,
) -> float:
    """Time that the all-reduce adds to a step.

        forward | backprop        |
                |   g0   g1   g2  |          packs, as they become ready
                     [b0]...]                b: what it keeps others from
                          [b1]...]           all: until it is there
                                  [b2]...]
                                  |------|   exposed

    Gradients become ready evenly over backprop. The last pack is ready when
    backprop ends, so that its cost is never hidden.

    Args:
        nbytes: Bytes of all gradients.
        compute: Seconds of a step without all-reduce.
        pack_bytes: Capacity of a pack.
        cost: Seconds of the all-reduce of a pack of so many bytes.
        busy: Seconds of these in which the next one cannot begin; `None`: all.
    """
    backward = compute * BACKWARD_SHARE
    busy = busy or cost
    free = end = 0.0
    for start in range(0, nbytes, pack_bytes):
        stop = min(start + pack_bytes, nbytes)
        ready = compute - backward * (1 - stop / nbytes)
        begin = max(free, ready)
        free = begin + busy(stop - start)
        end = max(end, begin + cost(stop - start))
    return max(0.0, end - compute)


def best_pack(
    nbytes: int,
    compute: float,
    cost: Callable[[float], float],
    busy: Callable[[float], float] | None = None,
) -> int:
    """The capacity of a pack, 1 MiB or a power of two of it, exposed least."""
    powers = range(math.ceil(math.log2(max(2.0, nbytes / 2**20))) + 1)
    return min(
        (2**20 * 2**power for power in powers),
        key=lambda pack: exposed_seconds(nbytes, compute, pack, cost, busy),
    )


def efficiency(compute: float, exposed: float) -> float:
    """Of weak scaling: share of a step that is not spent waiting."""
    return compute / (compute + exposed)


def fit_link(points: Sequence[Point], gamma: float = 0.0) -> Link:
    """Finds alpha and the bandwidth by least squares of relative errors.

    Args:
        points: Measured between workers.
        gamma: Seconds to add up a byte, which one number of workers does not
            tell from seconds to send it.

    Raises:
        ValueError: If the points give no latency or no bandwidth.
    """
    # With these links each cost is one coefficient of the unknown.
    step, byte = Link(1.0, math.inf), Link(0.0, 1.0)
    known = Link(0.0, math.inf, gamma)
    alpha, per_byte = _least_squares(points, workers_seconds, step, byte, known)
    return Link(alpha, 1 / per_byte, gamma)


def fit_inside(points: Sequence[Point]) -> Inside:
    """Finds what a sum inside a process costs, as `fit_link` does.

    Raises:
        ValueError: If the points give no fixed cost or none per byte.
    """
    once, byte, known = Inside(1.0, 0.0), Inside(0.0, 1.0), Inside(0.0, 0.0)
    return Inside(*_least_squares(points, inside_seconds, once, byte, known))


def _least_squares(points, cost, first, second, known) -> tuple[float, float]:
    rows, right = [], []
    for point in points:
        columns = [
            cost(point.nbytes, point.ranks, unit) for unit in (first, second)
        ]
        rest = point.seconds - cost(point.nbytes, point.ranks, known)
        rows.append([column / point.seconds for column in columns])
        right.append(rest / point.seconds)
    found, _, rank, _ = np.linalg.lstsq(
        np.array(rows).reshape(-1, 2), np.array(right), rcond=None
    )
    if rank < 2 or min(found) <= 0:
        raise ValueError(
            "The points must give a positive cost per step and per byte. "
            f"Received: {found.tolist()} from {len(points)} points. Measure "
            "more sizes, or on a machine that is less busy."
        )
    return float(found[0]), float(found[1])
