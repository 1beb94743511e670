"""What the benchmarks share as commands that start others."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = str(Path(__file__).resolve().parent.parent)
"""The checkout of this file."""

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


def tf_config(addresses: Sequence[str], index: int) -> dict[str, str]:
    """The variable that tells one worker of its cluster."""
    config = {
        "cluster": {"worker": list(addresses)},
        "task": {"type": "worker", "index": index},
    }
    return {"TF_CONFIG": json.dumps(config)}


def devices(replicas: int, on_gpus: bool = False) -> list[str]:
    """Names of logical CPU devices or of GPUs, one for each replica.

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


def add_optimizer(parser: argparse.ArgumentParser) -> None:
    """Adds `--optimizer`, a key of `models.OPTIMIZERS`."""
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")


def add_against(parser: argparse.ArgumentParser) -> None:
    """Adds `--against`, another checkout whose package is one more rival."""
    parser.add_argument(
        "--against",
        type=checkout,
        metavar="CHECKOUT",
        help="folder of another commit, whose package takes part as well "
        "(git worktree add --detach CHECKOUT COMMIT)",
    )


def checkout(path: str) -> str:
    """The absolute path of a folder that holds the package."""
    folder = Path(path).resolve()
    if not (folder / "keras_allreduce" / "__init__.py").exists():
        raise argparse.ArgumentTypeError(
            f"holds no package keras_allreduce: {folder}"
        )
    return str(folder)


def package_of(folder: str) -> dict[str, str]:
    """Environment in which a process imports the package of a checkout."""
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [folder, inherited]))}


def check_package(folder: str) -> None:
    """Ends the process unless its package is that of a checkout."""
    import keras_allreduce

    if not Path(keras_allreduce.__file__).is_relative_to(folder):
        raise SystemExit(
            f"keras_allreduce was to come from {folder}, but came from "
            f"{keras_allreduce.__file__}."
        )


def commits(against: str | None) -> str:
    """Of this checkout and another, for a table, or "" if there is no other."""
    if not against:
        return ""

    def commit(folder: str) -> str:
        command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    return f", here {commit(HERE)}, other checkout {commit(against)}"


def spread_of_ratio(values: Sequence[float], others: Sequence[float]) -> str:
    """Median and quartiles of the ratios within a round."""
    ratios = np.divide(values, others)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


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
