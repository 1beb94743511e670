"""The frames of the caller, where nothing else tells who it is."""

import sys
from collections.abc import Iterator
from types import FrameType

DEPTH = 12
"""How far a caller may be away."""


def calling_frames(depth: int = DEPTH) -> Iterator[FrameType]:
    """The frames from which the caller of this function was called."""
    # Not its own: a variable with that frame would be in the frame's locals,
    # a cycle that keeps all data of `fit` until it is collected.
    frame = sys._getframe(1).f_back
    for _ in range(depth):
        if frame is not None:
            yield frame
            frame = frame.f_back
