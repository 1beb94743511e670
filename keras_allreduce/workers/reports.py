"""Reports from each worker to the chief, on a port that anyone can reach.

Before TensorFlow starts, workers tell the chief in Python that they are there,
and wait for its answer. Whatever else connects (a port scan, a browser, a
worker of another job) is turned away and costs the chief no time:

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keras_allreduce.addresses import Address
from keras_allreduce.workers.timing import TIMING

_BEGIN = b"keras_allreduce "
_RECEIVED = {"received": True}
_NO_WORKER = "what listens there is no worker of this job"

# Connections without a report yet; the oldest gives way to a new one.
_MAX_UNKNOWN = 256


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


@dataclass
class _Unknown:
    """A connection that has not reported yet."""

    end: float
    received: bytearray = field(default_factory=bytearray)


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
        self._unknown: dict[socket.socket, _Unknown] = {}
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
        for late in [c for c, u in self._unknown.items() if u.end < now]:
            self._turn_away(late)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            # Out of file descriptors, or already closed by the other side.
            time.sleep(TIMING.retry)
            return
        connection.setblocking(False)
        self._unknown[connection] = _Unknown(time.monotonic() + TIMING.report)
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._unknown) > _MAX_UNKNOWN:
            self._turn_away(next(iter(self._unknown)))

    def _read(self, connection: socket.socket) -> Report | None:
        received = self._unknown.get(connection)
        if received is None:  # Turned away a moment ago.
            return None
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        so_far = received.received
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
