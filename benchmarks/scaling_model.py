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
from dataclasses import dataclass

import numpy as np

from keras_allreduce.reduce import cost_model
from keras_allreduce.reduce.cost_model import (
    Link,
    efficiency,
    exchange_seconds,
    ring_seconds,
    workers_seconds,
)

__all__ = ["efficiency", "exchange_seconds", "ring_seconds", "Link"]


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


def crowded(link: Link, factor: float, *, by_cores: bool) -> Link:
    """The link when `factor` times as many processes share the cores.

    Args:
        link: The link of two processes.
        factor: What `crowding` gave.
        by_cores: Whether cores move the bytes, as on loopback, or a wire of
            its own rate does.
    """
    return Link(
        alpha=link.alpha * factor,
        bandwidth=link.bandwidth / factor if by_cores else link.bandwidth,
        gamma=link.gamma * factor,
    )


def exposed_seconds(
    nbytes: int,
    compute: float,
    pack_bytes: int,
    cost: Callable[[float], float],
    busy: Callable[[float], float] | None = None,
) -> float:
    """Time that the all-reduce of equal packs adds to a step.

    Args:
        nbytes: Bytes of all gradients.
        compute: Seconds of a step without all-reduce.
        pack_bytes: Capacity of a pack.
        cost: See `cost_model.exposed_seconds`.
        busy: See there.
    """
    whole, rest = divmod(nbytes, pack_bytes)
    packs = [pack_bytes] * whole + [rest] * bool(rest)
    return cost_model.exposed_seconds(packs, compute, cost, busy)


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
