"""Plans which gradients travel in which pack; no TensorFlow.

A plan is made once, while the train step is traced, from the order,
dtype and size of the gradients. It never looks at a clock, so every
worker and every run makes the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_PARTS = 8
"""Most programs of XLA: see "The all-reduce stays hidden" in docs/xla.md."""


@dataclass(frozen=True)
class GradientSpec:
    """Dtype and size of one gradient, for the plan.

    Attributes:
        dtype: Name of its dtype, such as `"float32"`.
        nbytes: Its size in bytes, or `None` if its shape is known only while
            the step runs.
    """

    dtype: str
    nbytes: int | None


@dataclass(frozen=True)
class Bucket:
    """A planned group of gradients that travels as one tensor, the pack.

    Attributes:
        indices: Which gradients, as positions in the list that was planned;
            the one that backprop finishes first comes first.
        dtype: Name of their common dtype.
        nbytes: Size of the pack in bytes, `None` if not known.
    """

    indices: tuple[int, ...]
    dtype: str
    nbytes: int | None


def plan_buckets(
    gradients: Sequence[GradientSpec],
    bytes_per_pack: int,
    first_bytes_per_pack: int | None = None,
    alone_above: int | None = None,
) -> list[Bucket]:
    """Groups gradients so that each bucket travels as one tensor.

    Backprop finishes the last layer first, so buckets are filled from the end
    of the list. A bucket takes no more when the next gradient of its kind no
    longer fits; buckets whose last gradient exists first come first in the
    result, whatever dtype opened first.

    Args:
        gradients: One `GradientSpec` per gradient, in variable order.
        bytes_per_pack: Capacity of a bucket in bytes. A larger gradient
            travels alone, and so does one of unknown size.
        first_bytes_per_pack: Capacity of the first bucket in bytes, smaller
            so that communication starts early. `None`: as the others.
        alone_above: Gradients above this size in bytes travel alone even if
            they would fit. `None`: only those above the capacity.

    Returns:
        List of `Bucket` in the order backprop completes them (last layer
        first). Each is of one dtype; every index appears in exactly one.

    Raises:
        ValueError: If a capacity is not positive.
    """
    first = first_bytes_per_pack
    first = bytes_per_pack if first is None else first
    _check_capacities(bytes_per_pack, first)
    alone = bytes_per_pack if alone_above is None else alone_above
    buckets = _fill(gradients, bytes_per_pack, first, alone)
    return sorted(buckets, key=lambda bucket: -bucket.indices[-1])


def _check_capacities(bytes_per_pack: int, first_bytes_per_pack: int) -> None:
    if bytes_per_pack <= 0 or first_bytes_per_pack <= 0:
        raise ValueError(
            "The capacity of a bucket must be positive. Received: "
            f"bytes_per_pack={bytes_per_pack}, "
            f"first_bytes_per_pack={first_bytes_per_pack}"
        )


def _fill(
    gradients: Sequence[GradientSpec],
    bytes_per_pack: int,
    first_bytes_per_pack: int,
    alone_above: int,
) -> list[Bucket]:
    """Buckets in the order in which they are full."""
    filling: dict[str, list[int]] = {}
    filled: dict[str, int] = {}
    buckets: list[Bucket] = []

    def close(dtype: str) -> None:
        buckets.append(
            Bucket(tuple(filling.pop(dtype)), dtype, filled.pop(dtype))
        )

    for index in reversed(range(len(gradients))):
        dtype, nbytes = gradients[index].dtype, gradients[index].nbytes
        if nbytes is None or nbytes > min(alone_above, bytes_per_pack):
            buckets.append(Bucket((index,), dtype, nbytes))
            continue
        capacity = bytes_per_pack if buckets else first_bytes_per_pack
        if filling.get(dtype) and filled[dtype] + nbytes > capacity:
            close(dtype)
        filling.setdefault(dtype, []).append(index)
        filled[dtype] = filled.get(dtype, 0) + nbytes
    for dtype in list(filling):
        close(dtype)
    return buckets


def parts_of(packs: Sequence[Bucket]) -> list[tuple[int, ...]]:
    """Groups packs whose gradients are to come out of one program of XLA.

    Gradients leave when the program ends that they are in. With more programs
    more of the all-reduce is hidden behind the next one; with fewer XLA can
    fuse more.

    Args:
        packs: The packs of a plan.

    Returns:
        Indices of gradients, part by part in the order of backprop, of about
        the same bytes: at most `MOST_PARTS`, each of whole packs. A pack of
        unknown size counts as the mean of the others.
    """
    known = [pack.nbytes for pack in packs if pack.nbytes is not None]
    mean = sum(known) / len(known) if known else 1.0
    sizes = [mean if pack.nbytes is None else pack.nbytes for pack in packs]
    order = sorted(range(len(packs)), key=lambda at: -packs[at].indices[-1])
    capacity = max(sum(sizes), 1) / MOST_PARTS
    parts: list[tuple[int, ...]] = []
    before = 0.0
    last = -1
    for at in order:
        # The part in which the middle of the pack lies.
        part = int((before + sizes[at] / 2) / capacity)
        before += sizes[at]
        if part == last:
            parts[-1] += packs[at].indices
        else:
            parts.append(packs[at].indices)
            last = part
    return parts


def balance(nbytes: Sequence[int | None], num_owners: int) -> list[int]:
    """Shares out packs so that no owner has much more to sum than another.

    Args:
        nbytes: Size of each pack in bytes; `None` counts as nothing.
        num_owners: Number of devices that can do the sum.

    Returns:
        The owner of each pack, from 0 to `num_owners - 1`: the largest pack
        first, each to the owner with the least so far.
    """
    load = [0] * num_owners
    owners = [0] * len(nbytes)
    sizes = [size or 0 for size in nbytes]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = load.index(min(load))
        # A pack without bytes still costs its owner a few ops.
        load[owner] += max(sizes[index], 1)
        owners[index] = owner
    return owners
