"""Starts the workers of a job: `python -m keras_allreduce.launch --help`.

One thread per pipe shows a worker's output; one per worker waits for its
end. The main thread takes what happens, in the order in which it happens:

    signals ──┐
    worker 0 ─┼──> events ──> main thread ──> signals to the workers
    worker 1 ─┘

It runs where process groups exist: Linux and macOS.
"""

import queue
import signal
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from keras_allreduce.launch.guard import Guard
from keras_allreduce.launch.options import LaunchOptions, environments
from keras_allreduce.launch.output import Screen
from keras_allreduce.launch.worker import Ended, Events, Worker, signal_name


@dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        exit_code: 0 if all is well.
        report: Lines for the user.
        is_final: Whether it must not start again.
    """

    exit_code: int
    report: tuple[str, ...]
    is_final: bool


class Job:
    """All workers of this host, from their start until none is left.

    Args:
        options: Options of the command line.
        addresses: `host:port` of all workers.
        screen: Shows their output.
        events: What happens.
    """

    def __init__(
        self,
        options: LaunchOptions,
        addresses: Sequence[str],
        screen: Screen,
        events: Events,
    ):
        self._options = options
        self._environments = environments(options, addresses, screen.columns)
        self._screen = screen
        self._events = events
        self._workers: dict[int, Worker] = {}
        self._ended: list[Ended] = []
        self._received: list[int] = []
        # The event that ends the job early, and the deadline after it.
        self._cause: Ended | int | None = None
        self._deadline: float | None = None

    def run(self) -> Outcome:
        """Runs the job to its end, which leaves no process behind."""
        guard = Guard()
        try:
            for index, environment in self._environments.items():
                self._workers[index] = Worker(
                    index,
                    self._options.command,
                    environment,
                    guard,
                    self._screen,
                    self._events,
                    self._options.output_dir,
                )
            while len(self._ended) < len(self._workers):
                self._take(self._next())
            for worker in self._workers.values():
                worker.finish(self._options.grace_seconds)
            return self._outcome()
        finally:
            guard.close()

    def _take(self, event: Ended | int | None) -> None:
        if event is None:
            self._deadline = None
            self._send(signal.SIGKILL)
            return
        if isinstance(event, Ended):
            self._ended.append(event)
            if event.code == 0 or self._cause is not None:
                return
            self._send(signal.SIGTERM)
        else:
            self._received.append(event)
            self._send(event)
        if self._cause is None:
            self._cause = event
            self._deadline = time.monotonic() + self._options.grace_seconds

    def _next(self) -> Ended | int | None:
        if self._deadline is None:
            return self._events.get()
        left = max(0.0, self._deadline - time.monotonic())
        try:
            return self._events.get(timeout=left)
        except queue.Empty:
            return None

    def _send(self, number: int) -> None:
        for worker in self._workers.values():
            worker.send(number)

    def _outcome(self) -> Outcome:
        if isinstance(self._cause, Ended):
            return self._failure(self._cause)
        # Workers may use a signal to save their state, and end well.
        if self._cause is None or not any(one.code for one in self._ended):
            return Outcome(0, (), is_final=True)
        report = f"ended by {signal_name(self._cause)}"
        return Outcome(128 + self._cause, (report,), is_final=True)

    def _failure(self, failed: Ended) -> Outcome:
        code = failed.code if failed.code > 0 else 128 - failed.code
        lines = self._workers[failed.index].last_lines
        said = "; the last lines of its output:" if lines else " without output"
        return Outcome(
            code, (f"{failed}{said}", *lines), is_final=bool(self._received)
        )


def free_ports(count: int, avoid: Collection[int] = ()) -> list[int]:
    """Returns different ports of this host that nothing is bound to.

    Args:
        count: How many.
        avoid: Ports not to take.
    """
    bound: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            # All stay bound until the last is found, so that they differ.
            bound.append(socket.create_server(("127.0.0.1", 0)))
            port = bound[-1].getsockname()[1]
            if port not in avoid:
                ports.append(port)
    finally:
        for one in bound:
            one.close()
    return ports


def launch(options: LaunchOptions, screen: Screen, events: Events) -> int:
    """Runs the job, again after a failure as often as is asked for.

    Args:
        options: Options of the command line.
        screen: Shows the output.
        events: What happens.

    Returns:
        The exit code.
    """
    used: set[int] = set()
    for restart in range(options.restarts + 1):
        addresses = options.hosts
        if not addresses:
            ports = free_ports(options.num_workers, used)
            used.update(ports)
            addresses = tuple(f"127.0.0.1:{port}" for port in ports)
        if restart:
            again = f"restart {restart} of {options.restarts}"
            _tell(screen, [f"the job starts again ({again})"])
        outcome = Job(options, addresses, screen, events).run()
        _tell(screen, outcome.report)
        if outcome.is_final:
            break
    return outcome.exit_code


def _tell(screen: Screen, report: Sequence[str]) -> None:
    first, rest = report[:1], report[1:]
    lines = [f"keras_allreduce.launch: {line}" for line in first]
    screen.write(screen.err, [*lines, *rest], None)
