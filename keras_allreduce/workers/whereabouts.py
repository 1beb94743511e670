"""Tracks where in its script this worker is, for the others.

Nothing is sent from here: `lookout.py` does, where a worker waits.
"""

import contextlib
import time
import weakref
from collections.abc import Iterator
from typing import Any

from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.place import COMPARISON, OUTSIDE, STEP, Place

# A worker that waits for less is not asked why.
WAITS_SECONDS = 1.0


class Whereabouts:
    """Where in its script this worker is.

    Args:
        in_flight: Tracks the collectives.
    """

    def __init__(self, in_flight: InFlight):
        self._in_flight = in_flight
        self._begun = 0
        # By number, in the order in which they began.
        self._calls: dict[int, str] = {}
        self._compares_since: float | None = None

    def begin_call(self, number: int, name: str, owner: Any) -> None:
        """Notes that a call of Keras begins.

        Args:
            number: The same on all workers, and larger than before.
            name: What messages call it.
            owner: The call has ended when this object is gone.
        """
        self._begun = number
        self._calls[number] = name
        end = weakref.finalize(owner, self._calls.pop, number, None)
        end.atexit = False

    def rename(self, number: int, name: str) -> None:
        """Notes how far a call that runs has come."""
        if self._calls.pop(number, None) is not None:
            # The last is the one that has gone on last.
            self._calls[number] = name

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Notes that this worker compares itself with the others."""
        self._compares_since = time.monotonic()
        try:
            yield
        finally:
            self._compares_since = None

    def place(self) -> Place:
        """Where this worker is now."""
        calls = dict(self._calls)
        return Place(
            call=list(calls.values())[-1] if calls else "",
            calls=tuple(calls),
            begun=self._begun,
            waits_in=self._waits_in(),
        )

    def waits_seconds(self) -> float:
        """How long this worker has waited for the others; 0: it does not."""
        since = self._compares_since
        if since is not None:
            return time.monotonic() - since
        return self._in_flight.waiting_seconds()

    def _waits_in(self) -> str:
        if self.waits_seconds() < WAITS_SECONDS:
            return ""
        if self._compares_since is not None:
            return COMPARISON
        return OUTSIDE if self._in_flight.runs_eagerly else STEP
