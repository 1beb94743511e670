"""The exceptions that other workers cause.

    WorkerError (RuntimeError)
    ├── WorkerStartError     the workers could not start together
    ├── WorkersDifferError   they do not do the same
    ├── WorkerTimeoutError   one did not take part in time
    └── WorkerLostError      one has failed or is unreachable; it is a
                             tf.errors.UnavailableError too

A collective that fails in the middle of a step raises TensorFlow's own
`tf.errors.UnavailableError`, so that a script which wants to catch "a worker
failed", whenever that is, catches this:

    except (keras_allreduce.WorkerError, tf.errors.UnavailableError):

Mistakes of the script itself, such as a TF_CONFIG that makes no sense, is
a `ValueError`.
"""

import re
from typing import Any

import tensorflow as tf

RESTART = (
    "start all workers again; keras.callbacks.BackupAndRestore goes on where "
    "they were."
)
"""How to go on after one was lost: the end of a sentence."""

_SHOWN_CHARACTERS = 200
_TAG = "[keras_allreduce"
_TAGGED = re.compile(r'\[keras_allreduce:(\w+)\] ([^\n\\"]*)')
_NO_REASONS = ("Graph execution error", "Detected at ", "<stack", " ", "\t")


class WorkerError(RuntimeError):
    """Another worker failed, or takes other actions than this one."""


class WorkerStartError(WorkerError):
    """The workers could not start together."""


class WorkersDifferError(WorkerError):
    """The workers do not do the same, and would wait for each other."""


class WorkerTimeoutError(WorkerError):
    """A worker did not take part within `timeout_seconds`."""


class WorkerLostError(WorkerError, tf.errors.UnavailableError):
    """A worker has failed or is unreachable.

    Args:
        message: Names the worker.
    """

    def __init__(self, message: str):
        tf.errors.UnavailableError.__init__(self, None, None, message)

    def __reduce__(self) -> tuple[Any, ...]:
        # TensorFlow's would call this class with three arguments.
        return type(self), (self.message,)


def name_and_message(error: WorkerError) -> tuple[str, str]:
    """The published form of an error; `from_name` makes it again."""
    return type(error).__name__, str(error)


def from_name(name: str, message: str) -> WorkerError:
    """The error that another worker has published.

    Args:
        name: Name of its class in this module. That of a script's own class
            stands for a `WorkerError`.
        message: Its text.
    """
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, WorkerError):
        return kind(message)
    return WorkerError(message)


def tagged(error: WorkerError) -> str:
    """The text with which collectives are aborted; `from_tagged` reads it.

    TensorFlow passes it on to the other workers inside of errors of its own,
    some of which put it in quotes.

    Args:
        error: Why they are.
    """
    name, message = name_and_message(error)
    line = message.replace("\n", " ").replace('"', "'").replace("\\", "/")
    return f"{_TAG}:{name}] {line}"


def from_tagged(text: str) -> WorkerError | None:
    """The error that `tagged` has put into a text, if it has.

    Args:
        text: Message of an error of TensorFlow, of this worker or another.
    """
    found = _TAGGED.search(text)
    return None if found is None else from_name(*found.groups())


def shown(error: BaseException) -> str:
    """The name of an error and the first line that says something, for others.

    Args:
        error: Anything that a script raises. TensorFlow's begin with lines on
            where in the graph it was.
    """
    name = type(error).__name__
    try:
        lines = str(error).splitlines()
    except Exception:  # noqa: BLE001 - A user's `__str__` may raise anything.
        return name
    said = [
        line.strip()
        for line in lines
        if line.strip() and not line.startswith(_NO_REASONS)
    ]
    text = ": ".join([name, *said[:1]])[:_SHOWN_CHARACTERS]
    # Characters that TensorFlow passes on without quoting them.
    text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace('"', "'").replace("\\", "/")
