"""Asks the servers of the other workers whether they are there.

    this worker                     server of TensorFlow, C++ threads
       |--- connect, preface, SETTINGS -->|
       |<-- SETTINGS ---------------------|    it is there

Every server of gRPC answers so, as HTTP/2 has it. C++ threads answer, so a
worker that computes, compiles, saves or stands in a debugger does answer; one
that was killed or frozen, or whose network is cut, does not.

Each question has a connection of its own. On those that carry the gradients it
would wait behind them: 24 MB on a slow link are more than ten seconds. And
whatever else arrives from a worker counts as its answer: so none is silent
because its link is busy.
"""

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import tensorflow as tf

from keras_allreduce.addresses import parse_address
from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import RESTART, WorkerError, WorkerLostError
from keras_allreduce.workers.stall import StallInspector
from keras_allreduce.workers.timing import TIMING

REFUSALS = 3
"""A closed port is asked so often, in case only one connection broke."""

REMEDY = f"Look at its log, then {RESTART}"

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
    """Asks a server once whether it is there. Nothing here blocks.

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


@dataclass
class _Peer:
    """Another worker.

    Attributes:
        asked: When it was asked last.
        answered: Since when nothing was heard of it.
        refusals: How often in a row its port was closed.
        probes: Questions without an answer yet.
        addresses: Its addresses, once its name was resolved.
    """

    asked: float
    answered: float
    refusals: int = 0
    probes: list[HeartbeatProbe] = field(default_factory=list)
    addresses: Addresses = ()


class Heartbeats:
    """Finds a worker that has failed or cannot be reached.

    Args:
        cluster: The workers.
        limit_seconds: A worker that was not heard for so long has failed.
        clock: Tells the seconds; see `health.AwakeClock`.

    Attributes:
        inspector: Knows whether this worker waits for others, and then asks
            more often, and the last messages of workers that ended. `None`
            where workers cannot publish.
        needs_all: Whether a collective has failed, so that this worker cannot
            go on without one whose script has ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        limit_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._cluster = cluster
        self._limit_seconds = limit_seconds
        self._clock = clock
        now = clock()
        self._peers = {rank: _Peer(now, now) for rank in cluster.others}
        self._lock = threading.Lock()
        self.inspector: StallInspector | None = None
        self.needs_all = False

    @property
    def are_unsure(self) -> bool:
        """Whether a worker has refused, but not yet often enough."""
        return any(0 < p.refusals < REFUSALS for p in self._peers.values())

    def heard(self, rank: int) -> None:
        """Notes that something has arrived from a worker."""
        self._peers[rank].answered = self._clock()

    def heard_all(self) -> None:
        """Notes that a collective has ended, to which all have sent."""
        for rank in self._peers:
            self.heard(rank)

    def unanswered(self) -> list[str]:
        """Says which workers have not answered of late, and for how long.

        Returns:
            A clause for each that has been silent for `TIMING.unanswered`, as
            of the last check. One whose script has ended owes no answer.
        """
        silent = {rank: self._silent_seconds(rank) for rank in self._peers}
        return [
            f"{self._cluster.name(rank)} {_silence(seconds)}"
            for rank, seconds in silent.items()
            if seconds >= TIMING.unanswered
            and not (self.inspector and self.inspector.has_ended(rank))
        ]

    def check(self, *, all_now: bool = False) -> WorkerError | None:
        """Asks those that are due; to be called again and again.

        Args:
            all_now: Whether all are due, and are to answer within a moment.

        Returns:
            An error if a worker has failed or cannot be reached.
        """
        with self._lock:
            for rank, peer in self._peers.items():
                if all_now or self._is_due(peer):
                    self._ask(rank, peer)
            self._collect(TIMING.moment if all_now else TIMING.answers)
            for rank in self._peers:
                error = self._judge(rank, all_now)
                if error is not None:
                    return error
        return None

    def answers(self, rank: int) -> bool:
        """Asks a worker once, for a moment; whether it answered."""
        try:
            probe = HeartbeatProbe(self._addresses(rank), self._clock())
        except OSError:
            return False
        with contextlib.closing(probe):
            end = time.monotonic() + TIMING.moment
            while probe.poll() is Answer.NOT_YET and time.monotonic() < end:
                time.sleep(TIMING.pause)
            return probe.poll() is Answer.YES

    def _is_due(self, peer: _Peer) -> bool:
        waits = self.inspector is not None and self.inspector.waits
        interval = TIMING.check_waiting if waits else TIMING.check
        is_unsure = 0 < peer.refusals < REFUSALS
        return is_unsure or self._clock() - peer.asked >= interval

    def _ask(self, rank: int, peer: _Peer) -> None:
        peer.asked = self._clock()
        with contextlib.suppress(OSError):
            peer.probes.append(
                HeartbeatProbe(self._addresses(rank), peer.asked)
            )

    def _addresses(self, rank: int) -> Addresses:
        peer = self._peers[rank]
        if not peer.addresses:
            address = parse_address(self._cluster.addresses[rank])
            peer.addresses = resolve(address.host, address.port)
        return peer.addresses

    def _collect(self, seconds: float) -> None:
        """Takes the answers that arrive in this time."""
        end = time.monotonic() + seconds
        while True:
            newest = [
                peer.probes[-1].started == peer.asked
                for peer in self._peers.values()
                if self._take(peer) and peer.probes
            ]
            if not any(newest) or time.monotonic() >= end:
                return
            time.sleep(TIMING.pause)

    def _take(self, peer: _Peer) -> bool:
        """Takes the answers of a worker; whether questions are left."""
        for probe in list(peer.probes):
            answer = probe.poll()
            if answer is Answer.YES:
                peer.answered = max(peer.answered, probe.started)
                peer.refusals = 0
            elif answer is Answer.CLOSED:
                peer.refusals += 1
            if answer is not Answer.NOT_YET:
                probe.close()
                peer.probes.remove(probe)
        # Questions older than the last answer are answered.
        for probe in list(peer.probes):
            if probe.started <= peer.answered:
                probe.close()
                peer.probes.remove(probe)
        return bool(peer.probes)

    def _judge(self, rank: int, all_now: bool) -> WorkerError | None:
        what = self._wrong(rank, all_now)
        if what is None:
            return None
        if self.inspector is not None:
            failure = self.inspector.failure_of(rank)
            if failure is not None:
                return failure
        if self.inspector is not None and self.inspector.has_ended(rank):
            if not self.needs_all:
                return None
            what = "has ended its script, while this worker still needs it."
        return lost_error(self._cluster, rank, what)

    def _wrong(self, rank: int, all_now: bool) -> str | None:
        peer = self._peers[rank]
        if peer.refusals >= REFUSALS:
            return (
                f"is gone since {time.strftime('%H:%M:%S')}, its port is "
                "closed: it was killed, or failed."
            )
        silent = self._silent_seconds(rank)
        if silent >= self._limit_seconds:
            return f"{_silence(silent)}."
        if all_now and self._is_another(rank):
            return "was started again while this worker was not."
        return None

    def _silent_seconds(self, rank: int) -> float:
        return self._clock() - self._peers[rank].answered

    def _is_another(self, rank: int) -> bool:
        """Whether the worker was started again: TensorFlow knows the first."""
        try:
            runtime.check_peer(self._cluster.tasks[rank], TIMING.moment)
        except tf.errors.FailedPreconditionError:
            return True
        except tf.errors.OpError:
            return False
        return False


def _silence(seconds: float) -> str:
    return (
        f"has not answered for {seconds:.0f} s: it is frozen, or the network "
        "is cut"
    )


def lost_error(cluster: Cluster, rank: int, what: str) -> WorkerLostError:
    """The error that says how a worker was lost.

    Args:
        cluster: The workers.
        rank: Of the worker.
        what: The rest of a sentence that begins with its name.
    """
    return WorkerLostError(
        "All workers must stay until training ends. Received: "
        f"{cluster.name(rank)} {what} {REMEDY}"
    )
