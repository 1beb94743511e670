"""The frames of the caller, where nothing else tells who it is."""

import sys
from collections.abc import Iterator
from types import FrameType

DEPTH = 12
"""How far a caller may be away."""


def calling_frames() -> Iterator[FrameType]:
    """The frames from which the caller of this function was called."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(DEPTH):
        if frame is not None:
            yield frame
            frame = frame.f_back
