"""The command line: `python -m keras_allreduce.launch --help`."""

import io
import queue
import signal
import sys
from collections.abc import Sequence

from keras_allreduce.launch.job import launch
from keras_allreduce.launch.options import parse
from keras_allreduce.launch.output import Screen
from keras_allreduce.launch.worker import Events

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = parse(arguments)
    events: Events = queue.SimpleQueue()
    for number in PASSED_ON:
        # nohup, and a shell for what runs behind it, have some ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            # `put` may interrupt `get` here, unlike in `queue.Queue`.
            signal.signal(number, lambda received, _: events.put(received))
    return launch(options, Screen(_raw(1), _raw(2)), events)


def _raw(fd: int) -> io.RawIOBase:
    return open(fd, "wb", buffering=0, closefd=False)


if __name__ == "__main__":
    sys.exit(main())
