"""Makes the failed worker's name the last line of a process that fails.

Where a worker dies in the middle of a collective, TensorFlow's own error of a
closed connection is raised before the health monitor has asked.

Where workers write to the same files, the remedy is printed too: callbacks of
Keras that save, and `Dataset.cache(path)`, take one file or folder for their
own; on a shared file system, and on one machine, each worker needs another.
"""

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import exit_code, keras_calls
from keras_allreduce.workers.errors import (
    RESTART,
    WorkerError,
    WorkerLostError,
    from_tagged,
    shown,
)
from keras_allreduce.workers.health import HealthMonitor
from keras_allreduce.workers.timing import TIMING

_monitors: weakref.WeakSet[HealthMonitor] = weakref.WeakSet()
_state: dict[str, Any] = {"installed": False, "failed": False}


def install(monitor: HealthMonitor) -> None:
    """Lets the explanation be the last line of a process that fails.

    Args:
        monitor: Asked which worker failed; says goodbye to the others if
            the process ends as it should.
    """
    _monitors.add(monitor)
    if _state["installed"]:
        return
    _state["installed"] = True
    exit_code.install()
    show = sys.excepthook

    def show_and_explain(
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
    ) -> None:
        _state["failed"] = True
        show(kind, error, traceback)
        with contextlib.suppress(Exception, KeyboardInterrupt):
            advice = remedy(error)
            if advice is not None:
                print(f"keras_allreduce: {advice}", file=sys.stderr)
            explanation = explain(error)
            if explanation is not None:
                print(f"keras_allreduce: {explanation}", file=sys.stderr)
                _end_within(TIMING.tear_down)
                error = WorkerLostError(explanation)
            if not _is_interactive():
                _tell_of_failure(error)

    sys.excepthook = show_and_explain
    atexit.register(_leave)


def _is_interactive() -> bool:
    """Whether the process goes on after an error."""
    return bool(sys.flags.inspect) or hasattr(sys, "ps1")


def _tell_of_failure(error: BaseException) -> None:
    monitors = list(_monitors)
    _for_each(monitors, lambda w: w.say_failure(error, TIMING.linger_failed))
    if isinstance(error, WorkerError):
        time.sleep(TIMING.after_cause)


def _end_within(seconds: float) -> None:
    """Ends the process, which has failed, in this time at the latest."""
    # The one timer that also runs while the interpreter is torn down.
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    _state["nowhere"] = nowhere


def _leave() -> None:
    """At the end of the process: says goodbye, unless it ends in an error."""
    if _state["failed"]:
        return
    if exit_code.code():
        _tell_of_failure(SystemExit(exit_code.code()))
        return
    monitors = [each for each in _monitors if each.failure() is None]
    _for_each(monitors, lambda w: w.say_goodbye(TIMING.linger))


def _for_each(
    monitors: Sequence[HealthMonitor], tell: Callable[[HealthMonitor], None]
) -> None:
    """Tells the workers of each strategy something, all at once."""

    def tell_quietly(monitor: HealthMonitor) -> None:
        with contextlib.suppress(Exception):
            tell(monitor)

    told = [
        threading.Thread(target=tell_quietly, args=[monitor], daemon=True)
        for monitor in monitors
    ]
    for each in told:
        each.start()
    for each in told:
        each.join(TIMING.linger)


def explain(error: BaseException | None) -> str | None:
    """Why a collective has failed, in words that name the worker.

    Args:
        error: The error that was raised.

    Returns:
        The explanation, or `None` if it is about something else.
    """
    if not isinstance(error, tf.errors.OpError):
        return None
    if "ollective" not in error.message:
        return None
    # Where another worker has noticed it first, its error has come here. That
    # worker may have ended since, which is not the cause.
    told = from_tagged(error.message)
    if told is not None:
        return str(told)
    for monitor in list(_monitors):
        cause = monitor.cause()
        if cause is not None:
            return str(cause)
    if _monitors and isinstance(error, tf.errors.UnavailableError):
        return _DISCONNECTED.format(shown(error))
    return None


_DISCONNECTED = (
    "All workers must stay connected until training ends. Received: a "
    "connection broke, and no worker is gone or silent ({}). Look for a link "
    f"that was down, or a firewall that closes connections, then {RESTART}"
)

_REMEDY = (
    "All workers must write to files of their own. Received: {what}. Pass one "
    'path per worker, such as `f"{{folder}}/{{strategy.cluster_resolver.'
    'task_id}}"`, or, where a file is only written, pass the callback on the '
    "chief alone."
)


def remedy(error: BaseException) -> str | None:
    """The remedy for an error that a path shared by workers may have caused.

    Args:
        error: The error that ended the script.

    Returns:
        The remedy; `None` if the error is about something else.
    """
    if isinstance(error, tf.errors.AlreadyExistsError):
        what = "AlreadyExistsError, as of a `cache` file that another writes"
        return _REMEDY.format(what=what)
    if isinstance(error, OSError) and keras_calls.is_raised_in_callback(error):
        what = f"{type(error).__name__} in a callback of `fit`"
        return _REMEDY.format(what=what)
    return None
