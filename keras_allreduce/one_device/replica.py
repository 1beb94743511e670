"""The state of one replica while its thread runs a step."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replica:
    """One replica in a step of Keras.

    Attributes:
        share: float32 scalar; its share of the batch, times the number of
            replicas. `None`: 1.
        correction: float32 scalar; what its loss is scaled by beside the
            share. `None`: 1.
        has_samples: bool scalar; false on an empty replica. `None`: true.
        scaled: `"loss"` or `"gradients"`: which of them the share scales.
            `None` until Keras scales the loss.
    """

    share: Any = None
    correction: Any = None
    has_samples: Any = None
    scaled: str | None = None


_thread = threading.local()
_NO_REPLICA = Replica()


def current() -> Replica:
    """The replica of this thread; outside of a step one without a share."""
    return getattr(_thread, "replica", _NO_REPLICA)


@contextlib.contextmanager
def running(replica: Replica) -> Iterator[None]:
    """This thread runs a step of `replica` inside the block."""
    before = current()
    _thread.replica = replica
    try:
        yield
    finally:
        _thread.replica = before


def become(replica: Replica) -> None:
    """Replaces the replica of this thread until its step ends."""
    _thread.replica = replica
