"""Puts back the signals and hooks of the process that TensorFlow changes.

When TensorFlow connects the workers, its preemption notifier catches SIGTERM
in C++ and swallows it: the process no longer ends, a handler that the script
has installed never runs, and processes that it forks inherit both. Python does
not know, so that `signal.getsignal` still returns the old handler. A SIGTERM in
that very moment is sent again by `health.py`, if TensorFlow reports it, which
it does once the workers are connected.

The C library is asked, rather than Python, because Python only sets signals
from its main thread (Ray trains in another), and only knows its own handlers.
"""

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Larger than `struct sigaction` of every platform (152 bytes on Linux); it is
# only handed back, never read.
_BYTES = 1024

_HOOKS = ((sys, "excepthook"), (threading, "excepthook"))


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restores signals and exception hooks after the block.

    Processes forked afterwards inherit them. Changes that the
    script makes after the block count as ever. Without `sigaction` (Windows)
    there is nothing to keep: TensorFlow catches no signal there.
    """
    hooks = [getattr(module, name) for module, name in _HOOKS]
    actions = _actions()
    try:
        yield
    finally:
        for number, now in _actions().items():
            if now != actions[number]:
                _set(number, actions[number])
        for (module, name), hook in zip(_HOOKS, hooks, strict=True):
            setattr(module, name, hook)


def _actions() -> dict[int, bytes]:
    """The action for each signal, as the C library tells it."""
    sigaction = _sigaction()
    actions = {}
    for number in signal.valid_signals() if sigaction else ():
        action = ctypes.create_string_buffer(_BYTES)
        if sigaction(int(number), None, action) == 0:
            actions[int(number)] = action.raw
    return actions


def _set(number: int, action: bytes) -> None:
    _sigaction()(number, ctypes.create_string_buffer(action, _BYTES), None)


def _sigaction() -> Any:
    if not hasattr(signal, "valid_signals") or sys.platform == "win32":
        return None
    return getattr(ctypes.CDLL(None), "sigaction", None)
