"""Logs decisions of the package to standard error, if the user asks for it."""

import os
import sys
import time

from keras_allreduce import environment


def is_on() -> bool:
    """Whether the environment asks for the log."""
    return os.environ.get(environment.DEBUG, "0") not in ("", "0")


def log(text: str) -> None:
    """Writes one line with the time and the number of the process."""
    if is_on():
        now = time.time()
        clock = time.strftime("%H:%M:%S", time.localtime(now))
        print(
            f"keras_allreduce {clock}.{int(now % 1 * 1e3):03} "
            f"(process {os.getpid()}): {text}",
            file=sys.stderr,
            flush=True,
        )
