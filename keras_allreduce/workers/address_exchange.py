"""Every process tells rank 0 where it listens, and learns the same of all.

    rank 1                     rank 0                      rank 2
       |--- rank 1, port 5001 --->|                           |
       |                          |<--- rank 2, port 5002 ----|
       |<-- three addresses ------|------ three addresses --->|

Only rank 0 must be found; the host of the others is where they come from.
`reports.py` has the messages.
"""

import contextlib
import ipaddress
import socket
import time
from collections.abc import Mapping

from keras_allreduce.addresses import Address
from keras_allreduce.workers.ranks import Placement
from keras_allreduce.workers.rendezvous import listen
from keras_allreduce.workers.reports import (
    NoAnswer,
    Reception,
    Report,
    deliver,
)

_PATIENCE_SECONDS = 5.0
_NUMBERS = ("rank", "size", "port")
_BYTES_PER_RANK = 300
_MAX_BYTES = 2**16


class NoExchange(Exception):  # noqa: N818 (never leaves the package)
    """The addresses could not be exchanged; says why."""


def exchange_addresses(
    placement: Placement, timeout_seconds: float, token: str
) -> list[str]:
    """Returns `"host:port"` of all processes, by rank.

    Each port was free on its host.

    Args:
        placement: Which process this is, and where rank 0 is.
        timeout_seconds: How long to wait for the others.
        token: Job token, the same on all.

    Raises:
        NoExchange: If a process does not come, or all are not of one job.
    """
    # It stays bound, without listening, until all have another.
    with contextlib.closing(_bound()) as own:
        port = own.getsockname()[1]
        if placement.rank == 0:
            return _collect(placement, port, timeout_seconds, token)
        return _tell(placement, port, timeout_seconds, token)


def _collect(
    placement: Placement, port: int, timeout_seconds: float, token: str
) -> list[str]:
    """The side of rank 0."""
    end = time.monotonic() + timeout_seconds
    ranks = range(1, placement.size)
    here: dict[int, Report] = {}
    server = _first_free(placement)
    with Reception(server, token, _limit_bytes(placement)) as reception:
        problem = None
        while problem is None and len(here) < len(ranks):
            for report in reception.wait(0.1):
                found = _take(placement, here, report)
                problem = problem or found
            here = {r: c for r, c in here.items() if not c.has_ended}
            missing = [rank for rank in ranks if rank not in here]
            if problem is None and missing and time.monotonic() > end:
                problem = _never_came(placement, missing, timeout_seconds)
        addresses = [str(Address(placement.leader, port))]
        addresses += [_address(placement, here[r]) for r in sorted(here)]
        for report in here.values():
            report.answer({"problem": problem, "addresses": addresses})
    if problem is not None:
        raise NoExchange(problem)
    return addresses


def _take(
    placement: Placement, here: dict[int, Report], report: Report
) -> str | None:
    """Notes who is here. Returns the problem, if any."""
    content = report.content
    if not all(type(content.get(key)) is int for key in _NUMBERS):
        return None
    rank, size, port = (int(content[key]) for key in _NUMBERS)
    if size != placement.size:
        problem = (
            "All processes must be of one job. Received: "
            f"{placement.size} processes on rank 0, {size} on rank {rank}."
        )
    elif not 0 < rank < size or not 0 < port < 65536:
        return None
    elif rank in here and not here[rank].has_ended:
        problem = (
            "All processes must be of one job. Received: two that are rank "
            f"{rank}. MASTER_PORT gives each job its own port."
        )
    else:
        here[rank] = report
        return None
    # The others are told when this returns.
    report.answer({"problem": problem})
    return problem


def _tell(
    placement: Placement, port: int, timeout_seconds: float, token: str
) -> list[str]:
    """The side of another rank."""
    chief = [Address(placement.leader, each) for each in placement.ports]
    report = {"rank": placement.rank, "size": placement.size, "port": port}
    try:
        answer = deliver(
            chief,
            report,
            token,
            timeout_seconds,
            # Rank 0 may have begun a little later.
            _PATIENCE_SECONDS,
            _limit_bytes(placement),
        )
    except NoAnswer as reason:
        missing = _never_came(placement, [0], timeout_seconds)
        raise NoExchange(f"{missing} At {chief[0]}: {reason}.") from None
    problem = answer.get("problem")
    if problem is not None:
        raise NoExchange(str(problem))
    return _listed(placement, answer)


def _listed(placement: Placement, answer: Mapping[str, object]) -> list[str]:
    addresses = answer.get("addresses")
    if not isinstance(addresses, list) or len(addresses) != placement.size:
        raise NoExchange(
            "Rank 0 must answer with the address of each rank. Received: "
            f"{str(addresses)[:200]}. Run the same version of keras_allreduce "
            "everywhere."
        )
    return [str(each) for each in addresses]


def _address(placement: Placement, report: Report) -> str:
    """Where the others find the worker that has sent a report."""
    host = report.connection.getpeername()[0].partition("%")[0]
    peer = ipaddress.ip_address(host)
    peer = getattr(peer, "ipv4_mapped", None) or peer
    # Who comes from the host of rank 0 is found where that is.
    host = placement.leader if peer.is_loopback else str(peer)
    return str(Address(host, int(report.content["port"])))


def _first_free(placement: Placement) -> socket.socket:
    for port in placement.ports:
        with contextlib.suppress(OSError):
            return listen(port, max(128, placement.size))
    raise NoExchange(
        "Rank 0 must have a free port to exchange addresses. Received: "
        f"{', '.join(map(str, placement.ports))}, in use. MASTER_PORT gives "
        "another one, on all processes."
    )


def _bound() -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    own = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    if dual:
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    own.bind(("", 0))
    return own


def _limit_bytes(placement: Placement) -> int:
    return _MAX_BYTES + _BYTES_PER_RANK * placement.size


def _never_came(
    placement: Placement, missing: list[int], timeout_seconds: float
) -> str:
    ranks = ", ".join(map(str, missing))
    return (
        f"All {placement.size} processes of {placement.source} must start "
        f"within timeout_seconds={timeout_seconds:g} of each other. Never "
        f"reached: rank {ranks}. All must make the strategy; rank 0 is looked "
        f"for at {placement.leader!r} (MASTER_ADDR), port "
        f"{', '.join(map(str, placement.ports))} (MASTER_PORT)."
    )
