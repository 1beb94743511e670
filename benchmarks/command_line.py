"""What the benchmarks share as commands that start others."""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence

# Of a GPU that has to do for several replicas.
GPU_MIB = 10_000


def environment(*packages: str) -> str:
    """Versions of `packages` and Python, and the machine, for a table."""
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in packages
    ]
    return (
        f"{', '.join(versions)}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores ({platform.machine()})"
    )


def devices(replicas: int, on_gpus: bool = False) -> list[str]:
    """Names of host devices or of GPUs, one for each replica.

    With fewer GPUs than replicas, all of them are parts of the first.
    """
    import tensorflow as tf

    import keras_allreduce

    if not on_gpus:
        return keras_allreduce.host_devices(replicas)
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise SystemExit("There is no GPU.")
    if len(gpus) < replicas:
        part = tf.config.LogicalDeviceConfiguration(
            memory_limit=GPU_MIB // replicas
        )
        tf.config.set_visible_devices(gpus[:1], "GPU")
        tf.config.set_logical_device_configuration(gpus[0], [part] * replicas)
    else:
        tf.config.set_visible_devices(gpus[:replicas], "GPU")
        for gpu in gpus[:replicas]:
            tf.config.experimental.set_memory_growth(gpu, True)
    return [f"/gpu:{index}" for index in range(replicas)]


def add_seconds(parser: argparse.ArgumentParser) -> None:
    """Adds `--seconds`, by which a benchmark begins its last round."""
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="after which no further round begins",
    )


def check_steps(
    parser: argparse.ArgumentParser, steps: int, skipped: int
) -> None:
    """Ends with an error if none of `steps` would be timed."""
    if steps <= skipped:
        parser.error(
            f"--steps must be more than the {skipped} that are not timed. "
            f"Received: {steps}"
        )


def wait(
    processes: Sequence[subprocess.Popen], deadline_seconds: float
) -> list[int | None]:
    """Exit codes when all have ended, one has failed, or time is up.

    `None` for a process that is still running.
    """
    end = time.monotonic() + deadline_seconds
    codes: list[int | None] = [None]
    while time.monotonic() < end and None in codes and not any(codes):
        time.sleep(0.05)
        codes = [process.poll() for process in processes]
    return codes
