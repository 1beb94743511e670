"""The frames of the caller, where nothing else identifies it."""

import sys
from collections.abc import Iterator
from types import FrameType, TracebackType

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


def has_caller() -> bool:
    """Whether Python code has called the function that calls this one.

    Nobody has called the `__del__` of what dies after the script has ended.
    """
    return sys._getframe(1).f_back is not None


def is_raised_in_callback(traceback: TracebackType | None) -> bool:
    """Whether an error was raised in `fit`, by no code of the script.

    Data are read in other threads, so that files are those of callbacks. Keras
    takes its own frames out of a traceback, but for the one that does so.
    """
    is_in_fit = False
    while traceback is not None:
        frame = traceback.tb_frame
        module = str(frame.f_globals.get("__name__"))
        if module.split(".")[0] == "keras":
            called = getattr(frame.f_locals.get("fn"), "__name__", "")
            is_in_fit |= "fit" in (called, frame.f_code.co_name)
        elif module == "__main__" and is_in_fit:
            return False
        traceback = traceback.tb_next
    return is_in_fit


_COMMUNICATES = {"all_reduce", "all_gather", "merge_call"}
# Between such a function and the strategy.
_BETWEEN = (
    "keras_allreduce.",
    "tensorflow.python.autograph.",
    "tensorflow.python.distribute.distribute_lib",
)


def caller_communicates() -> bool:
    """Whether the function that asks a strategy sums over replicas itself.

    A layer for `tf.distribute` divides a sum over all replicas by their
    number, or gathers if there are several. Code that only scales its loss has
    neither name.
    """
    for frame in calling_frames():
        module = str(frame.f_globals.get("__name__"))
        if not module.startswith(_BETWEEN):
            return not _COMMUNICATES.isdisjoint(frame.f_code.co_names)
    return False
