"""Every algorithm by name, and the choice of one for some devices."""

from collections.abc import Sequence

from keras_allreduce.reduce import nccl, ring, shared_memory
from keras_allreduce.reduce.algorithm import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "nccl": nccl.ALGORITHM,
    "ring": ring.ALGORITHM,
    "shared_memory": shared_memory.ALGORITHM,
}


def choose(asked: str, devices: Sequence[str]) -> tuple[Algorithm, str]:
    """Returns the algorithm for these devices, and why it is not the usual.

    Args:
        asked: `"auto"`, or the name of an algorithm, which is not overruled.
        devices: Device of each replica.

    Returns:
        The algorithm, and the reason why `"auto"` avoids NCCL on GPUs, else
        `""`.

    Raises:
        ValueError: If the algorithm asked for cannot run on `devices`.
    """
    if asked == "auto":
        if nccl.ALGORITHM.refuses(devices):
            return shared_memory.ALGORITHM, ""
        reason = nccl.ALGORITHM.discouraged(devices)
        return (shared_memory if reason else nccl).ALGORITHM, reason
    algorithm = ALGORITHMS[asked]
    rule = algorithm.refuses(devices)
    if rule:
        raise ValueError(
            f"algorithm={asked!r} {rule}. Received: "
            f"devices={list(devices)}. Use algorithm='auto'."
        )
    return algorithm, ""


def runnable(devices: Sequence[str]) -> list[str]:
    """Names of all algorithms that these devices can be expected to run."""
    return [
        name
        for name, algorithm in ALGORITHMS.items()
        if not algorithm.refuses(devices) and not algorithm.discouraged(devices)
    ]
