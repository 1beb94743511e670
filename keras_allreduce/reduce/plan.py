"""The plan of one batch of all-reduces, as the fit output prints it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReducePlan:
    """What one batch of all-reduces sends, as the log line tells it."""

    num_gradients: int
    num_sparse: int
    algorithm: str
    reason: str
    num_packs: int
    nbytes: int | None
    dtypes: tuple[str, ...]
    num_replicas: int
    every: int = 1

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
        return f"{line}; {self.reason}" if self.reason else line


def size_of(nbytes: int) -> str:
    """Bytes in the unit that reads best."""
    mib = nbytes / 2**20
    return f"{mib:.1f} MiB" if mib >= 0.1 else f"{nbytes / 2**10:.1f} KiB"
