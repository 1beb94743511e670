"""One question to the server of another worker, over a connection of its own.

    this worker                     server of TensorFlow, C++ threads
       |--- connect, preface, SETTINGS -->|
       |<-- SETTINGS ---------------------|    it is there

Every server of gRPC answers so, as HTTP/2 has it. On the connections that carry
the gradients a question would wait behind them: 24 MB on a slow link are more
than ten seconds. Nothing here blocks. No TensorFlow.
"""

import contextlib
import errno
import socket
from collections.abc import Sequence
from enum import Enum
from typing import Any

_SETTINGS = 4
_FRAME_BYTES = 9
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HELLO = _PREFACE + bytes([0, 0, 0, _SETTINGS]) + bytes(5)

_NOT_YET = (
    errno.EINPROGRESS,
    errno.EALREADY,
    errno.EAGAIN,
    errno.EWOULDBLOCK,
    errno.ENOTCONN,
)
_CLOSED = (
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
)

Addresses = Sequence[tuple[int, Any]]
"""Family and address of each interface of a host, for `socket.connect`."""


class Answer(Enum):
    """How a server has answered."""

    YES = "it is there"
    CLOSED = "nobody listens there, or it hung up"
    NOT_YET = "no answer yet"
    NEVER = "it cannot be reached"


def resolve(host: str, port: int) -> Addresses:
    """Addresses of a host.

    Raises:
        OSError: If its name is not known now.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


class HeartbeatProbe:
    """Asks a server whether it is there.

    Args:
        addresses: Where it may listen, tried one after the other.
        started: When this is asked, for the reader.
    """

    def __init__(self, addresses: Addresses, started: float):
        self.started = started
        self._left = list(addresses)
        self._closed = 0
        self._unreachable = 0
        self._received = b""
        self._socket: socket.socket | None = None
        self._has_asked = False
        self._answer = Answer.NOT_YET
        self._next()

    def close(self) -> None:
        """Hangs up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def poll(self) -> Answer:
        """The answer so far; the first that is one stays."""
        if self._answer is Answer.NOT_YET:
            self._answer = self._ask()
        return self._answer

    def _ask(self) -> Answer:
        while self._socket is not None:
            try:
                answer = self._advance(self._socket)
            except OSError as error:
                answer = self._failed(error)
            if answer is not Answer.CLOSED and answer is not Answer.NEVER:
                return answer
            self._closed += answer is Answer.CLOSED
            self._unreachable += answer is Answer.NEVER
            self._next()
        if self._closed and not self._unreachable:
            return Answer.CLOSED
        return Answer.NEVER

    def _next(self) -> None:
        """Connects to the next address; without one there is no socket."""
        self.close()
        self._received, self._has_asked = b"", False
        while self._left and self._socket is None:
            family, address = self._left.pop(0)
            with contextlib.suppress(OSError):
                self._socket = socket.socket(family, socket.SOCK_STREAM)
                self._socket.setblocking(False)
                self._socket.connect_ex(address)

    def _advance(self, connection: socket.socket) -> Answer:
        if not self._has_asked:
            error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                return self._failed(OSError(error, ""))
            connection.getpeername()  # Fails as long as it is not connected.
            connection.sendall(_HELLO)
            self._has_asked = True
        data = connection.recv(_FRAME_BYTES - len(self._received))
        self._received += data
        if not data:
            return Answer.CLOSED
        if len(self._received) < _FRAME_BYTES:
            return Answer.NOT_YET
        # Whoever else listens there is no worker.
        is_settings = self._received[3] == _SETTINGS
        return Answer.YES if is_settings else Answer.CLOSED

    def _failed(self, error: OSError) -> Answer:
        if error.errno in _NOT_YET:
            return Answer.NOT_YET
        return Answer.CLOSED if error.errno in _CLOSED else Answer.NEVER
