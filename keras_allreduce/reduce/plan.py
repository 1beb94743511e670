"""The plan of one batch of all-reduces, as the fit output prints it."""

from collections.abc import Sequence
from dataclasses import dataclass

from keras_allreduce.reduce.buckets import Bucket, GradientSpec


@dataclass(frozen=True)
class GatheredLoss:
    """A loss that every replica computes on the whole batch.

    Attributes:
        name: Its name.
        bytes_of_a_sample: Bytes of one sample of its targets, outputs and
            sample weights; a dimension that is not known counts 1.
    """

    name: str
    bytes_of_a_sample: int

    def __str__(self) -> str:
        size = size_of(self.bytes_of_a_sample)
        return (
            f"loss {self.name!r} is that of the whole batch ({size} of each "
            "sample gathered)"
        )


@dataclass(frozen=True)
class ReducePlan:
    """The plan of one batch of all-reduces; its `str` is the plan line.

    Attributes:
        num_gradients: Number of dense gradients.
        num_sparse: Number of sparse ones.
        algorithm: Name of the algorithm.
        reason: More about it, for the end of the line.
        num_packs: Number of packs of dense gradients.
        nbytes: Bytes of all gradients, `None` if not known.
        dtypes: Dtypes of the dense ones.
        num_replicas: Number of replicas that are summed.
        every: It is sent once in so many steps.
        packs: The packs in the order in which they leave: those of dense
            gradients, then each sparse gradient as one of its own. Indices
            are positions in the batch.
        sent: Bytes of each pack that a worker sends, `None` if not known;
            empty within one process.
        gathered: The losses that are computed on the whole batch.
        parts: Number of programs of XLA that hand out the gradients of a
            replica; 0 if the step is not compiled.
    """

    num_gradients: int
    num_sparse: int
    algorithm: str
    reason: str
    num_packs: int
    nbytes: int | None
    dtypes: tuple[str, ...]
    num_replicas: int
    every: int = 1
    packs: tuple[Bucket, ...] = ()
    sent: tuple[int | None, ...] = ()
    gathered: tuple[GatheredLoss, ...] = ()
    parts: int = 0

    def __str__(self) -> str:
        size = "size not known" if self.nbytes is None else size_of(self.nbytes)
        line = (
            f"batch_all_reduce: {self.num_gradients} all-reduces with "
            f"algorithm = {self.algorithm}, num_packs = {self.num_packs} "
            f"({size} {'+'.join(self.dtypes)}), "
            f"num_replicas = {self.num_replicas}"
        )
        if self.num_sparse:
            line += f", {self.num_sparse} sparse gathered"
        if self.every > 1:
            line += (
                f", sent once in {self.every} steps (gradients accumulate on "
                "their replica in between)"
            )
        if self.parts:
            line += f", compiled by XLA in {self.parts_text}"
        notes = [self.reason] if self.reason else []
        return "; ".join([line, *notes, *map(str, self.gathered)])

    @property
    def parts_text(self) -> str:
        """The number of parts in words: `1 part`, `6 parts`."""
        return f"{self.parts} part{'s' if self.parts > 1 else ''}"


def size_of(nbytes: int) -> str:
    """Bytes in the unit that reads best."""
    mib = nbytes / 2**20
    return f"{mib:.1f} MiB" if mib >= 0.1 else f"{nbytes / 2**10:.1f} KiB"


def bus_share(num_ranks: int) -> float:
    """The least that each rank sends in an all-reduce, as a share of its size.

    That is 2 (n - 1) / n for n ranks: reduce-scatter and all-gather. It is
    also the factor between the algorithm and the bus bandwidth of nccl-tests.

    Args:
        num_ranks: Number of replicas, or of workers.
    """
    return 2 * (num_ranks - 1) / num_ranks


def make_plan(
    specs: Sequence[GradientSpec],
    *,
    packs: Sequence[Bucket],
    num_sparse: int,
    algorithm: str,
    reason: str,
    num_replicas: int,
) -> ReducePlan:
    """Sums up a batch of all-reduces.

    Args:
        specs: The dense gradients.
        packs: See `ReducePlan`.
        num_sparse: Number of sparse ones, whose rows are counted only while
            the step runs: with any the size is not known.
        algorithm: Name of the algorithm.
        reason: See `algorithms.choose`.
        num_replicas: Number of replicas that are summed.
    """
    sizes = [spec.nbytes for spec in specs]
    known = [size for size in sizes if size is not None]
    complete = not num_sparse and len(known) == len(sizes)
    return ReducePlan(
        num_gradients=len(specs),
        num_sparse=num_sparse,
        algorithm=algorithm,
        reason=reason,
        num_packs=len(packs) - num_sparse,
        nbytes=sum(known) if complete else None,
        dtypes=tuple(sorted({spec.dtype for spec in specs})),
        num_replicas=num_replicas,
        packs=tuple(packs),
    )
