"""The size of a pack for every algorithm, and between workers. No TensorFlow.

Where a transfer has a price of its own, packs are as large as still leaves
early. In shared memory only the copy into the pack has a price, so only
gradients whose ops cost more than their bytes travel together: see "Pack
sizes" in benchmarks/RESULTS.md. The table in docs/algorithms.md says the same,
which a test checks.
"""

import math
from dataclasses import dataclass

_KIB, _MIB = 2**10, 2**20


@dataclass(frozen=True)
class PackSize:
    """Sizes of packs in bytes; see `buckets.plan_buckets`."""

    bytes_per_pack: int
    first_bytes_per_pack: int | None = None
    alone_above: int | None = None


# PyTorch DistributedDataParallel's.
_LARGE = 25 * _MIB

# By the name of the algorithm.
DEFAULTS = {
    "nccl": PackSize(_LARGE, 1 * _MIB),
    "ring": PackSize(4 * _MIB, 1 * _MIB),
    "shared_memory": PackSize(1 * _MIB, 256 * _KIB, alone_above=16 * _KIB),
}


def algorithm_names() -> tuple[str, ...]:
    """The values that `algorithm` may have: `"auto"` and every algorithm."""
    return ("auto", *DEFAULTS)


def between_workers(num_workers: int, nbytes: int) -> PackSize:
    """Sizes of the packs that cross between workers without GPUs.

    The last pack cannot be hidden behind backprop, so packs are small, and a
    gradient above half of one (256 KiB at least) waits for no other. But each
    pack has a latency, so that a pack is a sixteenth of all gradients, or
    512 KiB, or a little more than half of all if that is less (two packs that
    leave no rest for a third); and latency grows with the workers, so that the
    best pack grows about as the root of their number, up to 25 MiB, whose bytes
    take longer than its latency.
    See "Pack sizes between workers" and "Scaling" in benchmarks/RESULTS.md.

    Args:
        num_workers: Number of workers.
        nbytes: Size of all gradients in bytes.
    """
    half = max(128 * _KIB, nbytes * 9 // 16)
    capacity = min(half, max(512 * _KIB, nbytes // 16))
    capacity = min(capacity * math.isqrt(num_workers), _LARGE)
    alone_above = max(capacity // 2, min(capacity, 256 * _KIB))
    return PackSize(capacity, alone_above=alone_above)


def small_bytes(num_workers: int) -> int:
    """Up to this size in bytes workers exchange a tensor in one round trip.

    There the latency of a second round trip costs more than the bytes.
    Between 2 workers an exchange sends no more than the ring does, but copies
    more.

    Args:
        num_workers: Number of workers.
    """
    return 256 * _KIB if num_workers == 2 else 16 * _KIB
