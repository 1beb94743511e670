"""What the benchmarks share as commands that start others."""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence


def environment(*packages: str) -> str:
    """Versions of `packages` and Python, and the machine, for a table."""
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in packages
    ]
    return (
        f"{', '.join(versions)}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores ({platform.machine()})"
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
