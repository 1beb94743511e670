"""One worker process: its start, its output, its end."""

import contextlib
import io
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from keras_allreduce.launch.guard import Guard, signal_group
from keras_allreduce.launch.output import (
    LineReader,
    Screen,
    tag,
    visible,
    visible_without_bar,
)

LAST_LINES = 20
"""How much of what a worker wrote is told again when it fails."""

MOST_BYTES = 65536
"""Read from a pipe at once, and kept of an unfinished line."""


@dataclass(frozen=True)
class Ended:
    """A worker has ended.

    Attributes:
        index: Which one.
        code: Its exit code; -n if signal n ended it.
    """

    index: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"worker {self.index} was ended by {signal_name(-self.code)}"
        return f"worker {self.index} ended with exit code {self.code}"


# What happens: a worker ends, or a signal with this number arrives.
Events: TypeAlias = "queue.SimpleQueue[Ended | int]"


class Worker:
    """One running worker and the threads that follow it.

    Args:
        index: Its index in the cluster.
        command: Script and arguments.
        environment: Additions to the environment.
        guard: Starts it.
        screen: Shows its output.
        events: Hears of its end.
        output_dir: Folder of the file that gets all of its output, or `None`.
    """

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        environment: dict[str, str],
        guard: Guard,
        screen: Screen,
        events: Events,
        output_dir: Path | None = None,
    ):
        self.index = index
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._guard = guard
        self._screen = screen
        self._events = events
        self._log = output_dir and output_dir / f"worker-{index}.log"
        self._threads: list[threading.Thread] = []
        self._process = guard.start(command, {**os.environ, **environment})
        self._follow(self._pump, self._process.stdout, screen.out)
        self._follow(self._pump, self._process.stderr, screen.err)
        self._follow(self._wait)

    def send(self, number: int) -> None:
        """Sends a signal to the worker and its children."""
        if self._process.returncode is None:
            signal_group(self._process.pid, number)

    def finish(self, seconds: float) -> None:
        """Waits until all of its output is shown, at most `seconds`."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _follow(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait(self) -> None:
        code = self._process.wait()
        # Its children must not outlive it, nor hold its pipes open.
        signal_group(self._process.pid, signal.SIGKILL)
        self._guard.forget(self._process.pid)
        self._events.put(Ended(self.index, code))

    def _pump(self, pipe: IO[bytes], stream: io.RawIOBase) -> None:
        is_chief_out = self.index == 0 and stream is self._screen.out
        reader = LineReader(visible if self.index == 0 else visible_without_bar)
        unwritten = b""
        while data := pipe.read(MOST_BYTES):
            unwritten = self._append(unwritten + data)
            lines = self._tagged(reader.feed(data))
            status = None
            if is_chief_out:
                unfinished = [reader.unfinished] if reader.unfinished else []
                status = "".join(self._tagged(unfinished))
            self._screen.write(stream, lines, status)
            self.last_lines.extend(lines)
        if unwritten:
            self._append(unwritten + b"\n")
        lines = self._tagged(reader.close())
        self._screen.write(stream, lines, "" if is_chief_out else None)
        self.last_lines.extend(lines)

    def _append(self, data: bytes) -> bytes:
        """Adds to the file of this worker; a full disk must not end the job.

        Both pipes write to it, so a line is written when it is complete, or
        as long as can be. The last one of a pipe ends, too.

        Returns:
            The bytes of an unfinished line.
        """
        if self._log is None:
            return b""
        end = data.rfind(b"\n") + 1
        if len(data) - end > MOST_BYTES:
            end = len(data)
        if end:
            with (
                contextlib.suppress(OSError),
                open(self._log, "ab", buffering=0) as log,
            ):
                log.write(data[:end])
        return data[end:]

    def _tagged(self, lines: Sequence[str]) -> list[str]:
        return [f"{tag(self.index)}{line}" for line in lines]


def signal_name(number: int) -> str:
    """Returns `"SIGTERM"` for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
