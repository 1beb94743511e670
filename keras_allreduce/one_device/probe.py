"""Runs the user's code aside, on a few samples and on their two halves.

A judge compares the three results: `measurement`
whether a step's loss is a mean or a sum, `metric_state` how the state of a
metric is reduced.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from keras_allreduce.one_device import first_batch


@dataclass(frozen=True)
class Probe:
    """The results for a few samples, and for each half of them."""

    whole: Any
    first: Any
    second: Any


@dataclass(frozen=True)
class Failure:
    """The user's code failed on input that it may not expect.

    Attributes:
        reason: The kind and the first line of the error.
    """

    reason: str


def probe(run: Callable[[Any, slice], Any], example: Any) -> Probe | Failure:
    """Calls `run` on samples and on their halves.

    Args:
        run: Gets a structure like `example`, and which of the samples it has.
            Called in a thread of its own, where no replica, graph or tape
            takes part.
        example: Nested structure of tensors, samples first.
    """

    def in_thread() -> Probe:
        return Probe(*(run(*part) for part in first_batch.parts(example)))

    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(in_thread).result()
    except Exception as error:  # noqa: BLE001 - The user's code runs here.
        return Failure(f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The first line of an error that gives its reason."""
    lines = map(str.strip, str(error).splitlines())
    return next((line for line in lines if not _NOTHING.match(line)), "")


# What TensorFlow puts before an error of a graph.
_NOTHING = re.compile(
    r"$|Graph execution error|Detected at node|<stack traces|File |"
    r"\d+ root error"
)
