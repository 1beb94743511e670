"""Models the cost of an all-reduce between workers, from a link's figures.

The model is the usual one for collectives: a message of n bytes takes
alpha + n / B, and adding it up takes n gamma. Sources:

- Thakur, Rabenseifner and Gropp, "Optimization of collective communication
  operations in MPICH", 2005: the model, and steps and bytes per algorithm.
- Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
  workstations", 2009: the ring sends the least bytes that are possible.

S: bytes of one all-reduce. N: number of workers.

    exchange (small)   (N - 1) (alpha + S / B)                + (N - 1) S gamma
    ring               2 (N - 1) (alpha + S / (N B))      + (N - 1) / N S gamma

"Scaling" in benchmarks/RESULTS.md compares it with measurements. No TensorFlow
in here: everything is arithmetic.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    """Latency and bandwidth between workers, for `strategy.explain`.

    `python -m keras_allreduce.benchmark` measures both: between 2 workers, a
    small all-reduce takes about alpha, and a large one of S bytes about
    alpha + S / bandwidth.

    Attributes:
        alpha: Latency of a message in seconds, such as 50e-6.
        bandwidth: Bytes per second that the transport delivers in each
            direction: over gRPC 0.9 of the 1.25e9 of 10 Gbit/s.
        gamma: Seconds to add up a byte.
    """

    alpha: float
    bandwidth: float
    gamma: float = 0.0

    def busy(self) -> "Link":
        """The link as it costs a pack among others that cross at once."""
        return replace(self, alpha=self.alpha * BUSY_SHARE)


def ring_seconds(nbytes: float, workers: int, link: Link) -> float:
    """Cost of an all-reduce of `nbytes` in a ring."""
    steps = 2 * (workers - 1)
    sums = (workers - 1) / workers * nbytes * link.gamma
    return steps * (link.alpha + nbytes / workers / link.bandwidth) + sums


def exchange_seconds(nbytes: float, workers: int, link: Link) -> float:
    """Cost if each worker gathers all parts in a ring and sums them."""
    steps = workers - 1
    sums = steps * nbytes * link.gamma
    return steps * (link.alpha + nbytes / link.bandwidth) + sums


def workers_seconds(nbytes: float, workers: int, link: Link) -> float:
    """Cost of the collective that keras_allreduce chooses at this size."""
    small = nbytes <= small_bytes(workers)
    return (exchange_seconds if small else ring_seconds)(nbytes, workers, link)


def exposed_seconds(
    packs: Sequence[int],
    compute: float,
    cost: Callable[[float], float],
    busy: Callable[[float], float] | None = None,
    ready: Sequence[float] | None = None,
) -> float:
    """Time that the all-reduce adds to a step.

        forward | backprop        |
                |   g0   g1   g2  |          packs, as they become ready
                     [b0]...]                b: it blocks others
                          [b1]...]           all: until it is there
                                  [b2]...]
                                  |------|   exposed

    The last pack is ready when backprop ends, so that its cost is never hidden.

    Args:
        packs: Bytes of each pack, in the order in which they leave.
        compute: Seconds of a step without all-reduce.
        cost: Seconds of the all-reduce of a pack of so many bytes.
        busy: Seconds of these in which the next one cannot begin; `None`: all.
        ready: Share of backprop after which each pack is ready. `None`: that
            of the bytes, as if gradients became ready evenly.
    """
    backward = compute * BACKWARD_SHARE
    busy = busy or cost
    free = end = 0.0
    if ready is None:
        ready = [sent / sum(packs) for sent in itertools.accumulate(packs)]
    for pack, share in zip(packs, ready, strict=True):
        begin = max(free, compute - backward * (1 - share))
        free = begin + busy(pack)
        end = max(end, begin + cost(pack))
    return max(0.0, end - compute)


def efficiency(compute: float, exposed: float) -> float:
    """Of weak scaling: share of a step that is not spent waiting."""
    return compute / (compute + exposed)
