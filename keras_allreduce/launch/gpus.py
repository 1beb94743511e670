"""Which GPUs of this machine the launcher gives to each worker."""

import subprocess
from collections.abc import Mapping, Sequence

from keras_allreduce.environment import VISIBLE_GPUS


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that a process with this environment has, as CUDA is told.

    Without the driver's `nvidia-smi` there are none.
    """
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    there = [line for line in listed if line.startswith("GPU ")]
    if not there or VISIBLE_GPUS not in environment:
        return tuple(str(index) for index in range(len(there)))
    visible = []
    for name in environment[VISIBLE_GPUS].split(","):
        # CUDA takes those before the first that makes no sense to it.
        if not name.strip() or name.strip().startswith("-"):
            break
        visible.append(name.strip())
    return tuple(visible)


def deal(
    gpus: Sequence[str],
    num_workers: int,
    devices_per_worker: int | None,
    shared: bool = False,
) -> tuple[tuple[str, ...], ...]:
    """The GPUs of each worker; empty if there are none.

    Args:
        gpus: Those of this machine.
        num_workers: Number of workers on it.
        devices_per_worker: How many a worker gets; `None`: an equal share.
        shared: Whether several workers may be on one GPU.

    Raises:
        ValueError: If there are too few.
    """
    if not gpus:
        return ()
    each = devices_per_worker or max(len(gpus) // num_workers, 1)
    if each * num_workers > len(gpus):
        if shared and each == 1:
            return tuple(
                (gpus[worker % len(gpus)],) for worker in range(num_workers)
            )
        raise ValueError(
            f"{num_workers} workers with {each} each need "
            f"{each * num_workers} GPUs. Received: "
            f"{VISIBLE_GPUS}={','.join(gpus)}. "
            f"{VISIBLE_GPUS}=-1 trains on logical CPU devices."
        )
    return tuple(
        tuple(gpus[worker * each : (worker + 1) * each])
        for worker in range(num_workers)
    )
