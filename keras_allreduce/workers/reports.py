"""Gathers reports of all workers at the chief, on a port that anyone can reach.

Before TensorFlow starts, workers tell the chief in Python that they are there,
and wait for its answer. The chief answers all at once, when all have reported
or one cannot. Whatever else connects (a port scan, a browser, a worker of
another job) is turned away and costs the chief no time:

    worker                    chief                     somebody else
       |--- report ------------>|                             |
       |<-- received -----------|<------ any other bytes -----|
       |        ...             |------- closed ------------->|
       |<-- answer to all ------|

A message is one line: `keras_allreduce` and a JSON object. It is parsed only
if it begins so, ends within `limit_bytes` and came within
`TIMING.report`; a worker whose message is late tries again.
The job token keeps jobs apart; it is sent as it is and authenticates nobody.
"""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_allreduce.addresses import Address
from keras_allreduce.workers.timing import TIMING

_BEGIN = b"keras_allreduce "
_RECEIVED = {"received": True}
_NO_WORKER = "what listens there is no worker of this job"

# Connections without a report yet; the oldest gives way to a new one.
_MAX_UNKNOWN = 256

Verdict = Callable[[Mapping[str, Any]], int | str | None]
"""Rank of a message, the problem with it, or `None`: it is ignored."""


@dataclass
class Report:
    """The report of a worker, and the connection on which it waits."""

    connection: socket.socket
    content: dict[str, Any]

    def answer(self, message: Mapping[str, Any]) -> None:
        """Answers, as far as the worker is still there."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(TIMING.connect)
            self.connection.sendall(_encode(message))

    @property
    def has_ended(self) -> bool:
        """Whether the worker, which only waits now, has closed it."""
        try:
            self.connection.setblocking(False)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


@dataclass(frozen=True)
class Gathering:
    """Facts that all processes of one job agree on before they talk.

    Attributes:
        size: Number of processes.
        timeout_seconds: How long to wait for the others.
        token: Job token, the same on all.
        limit_bytes: Largest message and answer.
        check: Judges a message at rank 0.
        never_came: Describes the ranks that were never reached, and what was
            there instead.
        came_twice: Describes a rank that two processes have.
    """

    size: int
    timeout_seconds: float
    token: str
    limit_bytes: int
    check: Verdict
    never_came: Callable[[list[int], str], str]
    came_twice: Callable[[int], str]

    def collect(
        self,
        server: socket.socket,
        answer: Callable[[Mapping[int, Report]], Mapping[str, Any]] = (
            lambda reports: {}
        ),
    ) -> str | None:
        """Gathers at rank 0. Returns the problem, if any, which all are told.

        Args:
            server: Listens; is closed.
            answer: Makes the answer from the reports of the others, by rank.
        """
        end = time.monotonic() + self.timeout_seconds
        here: dict[int, Report] = {}
        with GatherServer(server, self.token, self.limit_bytes) as reception:
            problem = None
            while problem is None and len(here) < self.size - 1:
                for report in reception.wait(TIMING.retry):
                    problem = self._admit(report, here) or problem
                here = {r: c for r, c in here.items() if not c.has_ended}
                missing = [r for r in range(1, self.size) if r not in here]
                if problem is None and missing and time.monotonic() > end:
                    problem = self.never_came(missing, reception.turned_away)
            for report in here.values():
                report.answer({"problem": problem, **answer(here)})
        return problem

    def _admit(self, report: Report, here: dict[int, Report]) -> str | None:
        verdict = self.check(report.content)
        if isinstance(verdict, int):
            if verdict not in here or here[verdict].has_ended:
                here[verdict] = report
                return None
            verdict = self.came_twice(verdict)
        if verdict is not None:
            # The others are told when the gathering ends.
            report.answer({"problem": verdict})
        return verdict

    def report(
        self, leader: Sequence[Address], message: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Reports to rank 0 and returns its answer, with the problem if any."""
        try:
            answer = deliver(
                leader,
                message,
                self.token,
                self.timeout_seconds,
                TIMING.late_chief,
                self.limit_bytes,
            )
        except NoAnswer as reason:
            return {"problem": self.never_came([0], str(reason))}
        problem = answer.get("problem")
        return {**answer, "problem": problem and str(problem)}


def listen(port: int, backlog: int = 128) -> socket.socket:
    """A socket that listens where TensorFlow's server on this port will.

    Raises:
        OSError: If the port is not free.
    """
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if dual else socket.AF_INET,
        dualstack_ipv6=dual,
        backlog=backlog,
    )


def first_free(ports: Sequence[int], backlog: int) -> socket.socket | None:
    """A socket that listens on the first port that is free, if one is."""
    for port in ports:
        with contextlib.suppress(OSError):
            return listen(port, max(128, backlog))
    return None


class GatherServer:
    """Takes the reports of workers at a port, and turns away the rest.

    Never blocks on one connection.

    Args:
        server: A listening socket, which this closes.
        token: Job token that a report must have; empty: it must have none.
        limit_bytes: Largest report.
    """

    def __init__(self, server: socket.socket, token: str, limit_bytes: int):
        self._server = server
        self._token = token
        self._limit_bytes = limit_bytes
        # Until when each has to report, and the bytes so far.
        self._unknown: dict[socket.socket, tuple[float, bytearray]] = {}
        self._taken: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self.strangers = 0
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> "GatherServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._selector.close()
        for each in [self._server, *self._unknown, *self._taken]:
            each.close()

    @property
    def turned_away(self) -> str:
        """How many others connected, for a message; empty without any."""
        return (
            f"{self.strangers} other connections were turned away"
            if self.strangers
            else ""
        )

    def wait(self, seconds: float) -> Iterator[Report]:
        """Yields the reports that arrive now; waits if there is none yet."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
                continue
            report = self._read(key.fileobj)  # type: ignore[arg-type]
            if report is not None:
                yield report
        now = time.monotonic()
        for late in [c for c, (end, _) in self._unknown.items() if end < now]:
            self._turn_away(late)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            # Out of file descriptors, or already closed by the other side.
            time.sleep(TIMING.retry)
            return
        connection.setblocking(False)
        end = time.monotonic() + TIMING.report
        self._unknown[connection] = (end, bytearray())
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._unknown) > _MAX_UNKNOWN:
            self._turn_away(next(iter(self._unknown)))

    def _read(self, connection: socket.socket) -> Report | None:
        if connection not in self._unknown:  # Turned away a moment ago.
            return None
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        _, so_far = self._unknown[connection]
        so_far += data
        begins_well = so_far[: len(_BEGIN)] == _BEGIN[: len(so_far)]
        too_long = len(so_far) > self._limit_bytes
        if not data or not begins_well or too_long:
            self._turn_away(connection)
        elif so_far.endswith(b"\n"):
            return self._report(connection, bytes(so_far))
        return None

    def _report(self, connection: socket.socket, line: bytes) -> Report | None:
        content = _decode(line)
        if content is None:
            self._turn_away(connection)
            return None
        report = Report(connection, content)
        if content.get("token") != self._token:
            report.answer({"refused": "it expects another job token"})
            self._turn_away(connection)
            return None
        self._selector.unregister(connection)
        del self._unknown[connection]
        self._taken.append(connection)
        report.answer(_RECEIVED)
        return report

    def _turn_away(self, connection: socket.socket) -> None:
        self.strangers += 1
        self._selector.unregister(connection)
        del self._unknown[connection]
        connection.close()


class NoAnswer(Exception):  # noqa: N818 (never leaves the package)
    """The chief has not answered in time; names the process found there."""


def deliver(
    chief: Sequence[Address],
    content: Mapping[str, Any],
    token: str,
    timeout_seconds: float,
    longer_seconds: float,
    limit_bytes: int,
) -> dict[str, Any]:
    """Reports to the chief and returns its answer.

    Args:
        chief: Where it may listen; tried in turn until one receives it.
        content: Content that JSON can hold.
        token: Job token.
        timeout_seconds: How long to try.
        longer_seconds: How much longer to wait for the answer.
        limit_bytes: Largest answer.

    Raises:
        NoAnswer: If there is none.
    """
    line = _encode({**content, "token": token})
    end = time.monotonic() + timeout_seconds
    # The answer of the chief, or the state of the last try.
    found = "no time to ask"
    while time.monotonic() < end:
        for address in chief:
            try:
                return _deliver(
                    address, line, end + longer_seconds, limit_bytes
                )
            except NoAnswer as reason:
                found = str(reason)
            except OSError as error:
                found = (error.strerror or "no answer in time").lower()
        time.sleep(min(TIMING.retry, max(0.0, end - time.monotonic())))
    raise NoAnswer(found)


def _deliver(
    address: Address, line: bytes, end: float, limit_bytes: int
) -> dict[str, Any]:
    begin = time.monotonic()
    with socket.create_connection(
        (address.host, address.port),
        min(TIMING.connect, max(0.1, end - begin)),
    ) as connection:
        connection.sendall(line)
        lines = _lines(connection, limit_bytes)
        first = _next(lines, connection, min(end, begin + TIMING.report))
        if "refused" in first:
            raise NoAnswer(str(first["refused"])[:200])
        if first != _RECEIVED:
            raise NoAnswer(_NO_WORKER)
        return _next(lines, connection, end)


def _lines(
    connection: socket.socket, limit_bytes: int
) -> Iterator[bytes | None]:
    """Yields each line that arrives, and `None` after other reads."""
    received = b""
    while len(received) <= limit_bytes:
        data = connection.recv(65536)
        if not data:
            raise NoAnswer("it closed the connection")
        *lines, received = (received + data).split(b"\n")
        yield from lines
        yield None
    raise NoAnswer(_NO_WORKER)


def _next(
    lines: Iterator[bytes | None], connection: socket.socket, end: float
) -> dict[str, Any]:
    # Each read has its own time, so that slow bytes do not add up.
    while (left := end - time.monotonic()) > 0:
        connection.settimeout(left)
        line = next(lines)
        if line is None:
            continue
        content = _decode(line)
        if content is None:
            break
        return content
    raise NoAnswer(_NO_WORKER)


def _encode(message: Mapping[str, Any]) -> bytes:
    return _BEGIN + json.dumps(message).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    """The object of a message, or `None` if it is none."""
    if not line.startswith(_BEGIN):
        return None
    try:
        content = json.loads(line[len(_BEGIN) :])
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
