"""Knows at the end of a process that `sys.exit` ends it, and with which code.

Python tells nobody: `sys.excepthook` is not called, and functions of `atexit`
are called without a code. But the exception dies in one of two places: within
the Python code that has caught it, or below all Python code.
"""

import inspect
import sys
import threading
from typing import Any, NoReturn

_state: dict[str, Any] = {"code": None}


class _Exit(SystemExit):
    """Notes its code if it ends the process."""

    def __del__(self) -> None:
        # Python code that has caught it, and lets it go, would be the caller.
        frame = inspect.currentframe()
        if frame is not None and frame.f_back is None:
            _state["code"] = self.code


# As tracebacks show it.
_Exit.__name__ = _Exit.__qualname__ = SystemExit.__name__
_Exit.__module__ = SystemExit.__module__


def install() -> None:
    """Has `sys.exit` noted from now on."""
    sys.exit = _exit


def code() -> int:
    """The exit code with which `sys.exit` ends this process; else 0."""
    found = _state["code"]
    if found is None or isinstance(found, int):
        return found or 0
    return 1  # A text, which Python prints.


def _exit(status: Any = None, /) -> NoReturn:
    """Ends the process as `sys.exit` does, by a `SystemExit`."""
    is_main = threading.current_thread() is threading.main_thread()
    # Another thread ends alone, and its hook knows the class itself.
    raise (_Exit if is_main else SystemExit)(status)
