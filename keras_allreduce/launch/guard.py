"""Ends the workers should the launcher die without a chance to do so.

The launcher holds one end of a pipe, and a small process, the guard, reads
the other: when the launcher dies, however it does, the guard reads the end of
the pipe and kills all process groups that it knows. A worker tells its own
process group before it becomes the script, so that there is no moment without
a guard:

    launcher ──starts──> worker: "+group", then becomes the script
        └───── "-group" when it has ended ─────> guard

Linux also kills the worker by itself (not its children).

This file is run by its path: it needs only the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence


class Guard:
    """Starts processes that do not outlive this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*_this_file(), "watch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Signals to the launcher's group spare it.
        )
        if self._process.stdin is None:
            raise RuntimeError("The guard has no pipe to read from.")
        self._pipe = self._process.stdin

    def start(
        self, command: Sequence[str], environment: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Starts a Python script in a process group of its own.

        Call it from the main thread: on Linux a worker dies with the thread
        that started it.

        Args:
            command: Script and arguments.
            environment: All of its environment.

        Returns:
            The process, its output in two pipes.
        """
        fd = self._pipe.fileno()
        return subprocess.Popen(
            [*_this_file(), "become", str(fd), sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
            pass_fds=[fd],
            start_new_session=True,
        )

    def forget(self, group: int) -> None:
        """Says that a process group has ended: its number is free again."""
        # It may be closed already, or killed.
        with contextlib.suppress(OSError, ValueError):
            os.write(self._pipe.fileno(), b"-%d\n" % group)

    def close(self) -> None:
        """Kills what still runs, and the guard itself ends."""
        self._pipe.close()
        self._process.wait()


def signal_group(group: int, number: int) -> None:
    """Sends a signal to a process group, if there is still one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def watch(lines: Iterable[str]) -> None:
    """Kills the process groups that are left when `lines` end.

    Args:
        lines: `"+group"` for one that started, `"-group"` for one that ended.
    """
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line.startswith("+"):
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        signal_group(group, signal.SIGKILL)


def become(fd: int, command: Sequence[str]) -> None:
    """Tells the guard about this process, then becomes `command`."""
    os.write(fd, b"+%d\n" % os.getpid())
    os.close(fd)
    _die_with_parent()
    os.execv(command[0], list(command))


def _die_with_parent() -> None:
    # A second guard, should the first be killed too. The setting survives
    # exec. Only Linux has it.
    if sys.platform != "linux":
        return
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


def _this_file() -> list[str]:
    # Isolated: nothing of the environment may keep it from starting.
    return [sys.executable, "-I", "-S", os.path.abspath(__file__)]


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(sys.stdin)
    else:
        become(int(sys.argv[2]), sys.argv[3:])
