"""Every process tells rank 0 where it listens, and learns the same of all.

Only rank 0 must be found; the host of the others is where they come from.
"""

import contextlib
import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

from keras_allreduce.addresses import Address
from keras_allreduce.workers.gather import Gathering, first_free
from keras_allreduce.workers.ranks import Placement
from keras_allreduce.workers.reports import Report

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
    gathering = _gathering(placement, timeout_seconds, token)
    # It stays bound, without listening, until all have another.
    with contextlib.closing(_bound()) as own:
        port = own.getsockname()[1]
        if placement.rank:
            chief = [Address(placement.leader, p) for p in placement.ports]
            found = gathering.report(
                chief,
                {"rank": placement.rank, "size": placement.size, "port": port},
            )
            return _listed(placement, found)
        return _collect(placement, gathering, port)


def _gathering(
    placement: Placement, timeout_seconds: float, token: str
) -> Gathering:
    return Gathering(
        placement.size,
        timeout_seconds,
        token,
        _MAX_BYTES + _BYTES_PER_RANK * placement.size,
        lambda message: _check(placement, message),
        lambda missing, found: _never_came(
            placement, missing, timeout_seconds, found
        ),
        _came_twice,
    )


def _collect(
    placement: Placement, gathering: Gathering, port: int
) -> list[str]:
    """The side of rank 0."""
    server = first_free(placement.ports, placement.size)
    if server is None:
        raise NoExchange(
            "Rank 0 must have a free port to exchange addresses. Received: "
            f"{', '.join(map(str, placement.ports))}, in use. MASTER_PORT "
            "gives another one, on all processes."
        )
    addresses = [str(Address(placement.leader, port))]

    def answer(reports: Mapping[int, Report]) -> Mapping[str, Any]:
        addresses[1:] = [
            _address(placement, reports[r]) for r in sorted(reports)
        ]
        return {"addresses": addresses}

    problem = gathering.collect(server, answer)
    if problem is not None:
        raise NoExchange(problem)
    return addresses


def _check(
    placement: Placement, message: Mapping[str, Any]
) -> int | str | None:
    values = [message.get(key) for key in ("rank", "size", "port")]
    numbers = [value for value in values if type(value) is int]
    if len(numbers) < len(values):
        return None
    rank, size, port = numbers
    if size != placement.size:
        return (
            "All processes must be of one job. Received: "
            f"{placement.size} processes on rank 0, {size} on rank {rank}."
        )
    return rank if 0 < rank < size and 0 < port < 65536 else None


def _listed(placement: Placement, answer: Mapping[str, Any]) -> list[str]:
    if answer["problem"] is not None:
        raise NoExchange(answer["problem"])
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
    # A rank on the host of rank 0 is found there.
    host = placement.leader if peer.is_loopback else str(peer)
    return str(Address(host, int(report.content["port"])))


def _bound() -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    own = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    if dual:
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    own.bind(("", 0))
    return own


def _came_twice(rank: int) -> str:
    return (
        "All processes must be of one job. Received: two that are rank "
        f"{rank}. MASTER_PORT gives each job its own port."
    )


def _never_came(
    placement: Placement,
    missing: list[int],
    timeout_seconds: float,
    found: str,
) -> str:
    ranks = ", ".join(map(str, missing))
    return (
        f"All {placement.size} processes of {placement.source} must start "
        f"within timeout_seconds={timeout_seconds:g} of each other. Never "
        f"reached: rank {ranks}. All must make the strategy; rank 0 is looked "
        f"for at {placement.leader!r} (MASTER_ADDR), port "
        f"{', '.join(map(str, placement.ports))} (MASTER_PORT)."
        f"{f' {found}.' if found else ''}"
    )
