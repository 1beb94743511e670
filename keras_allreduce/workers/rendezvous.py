"""The workers meet before TensorFlow starts, so that none waits for ever.

TensorFlow waits for a missing worker in C++, without an end and deaf to
Ctrl+C. So each worker first reports to the chief, in Python, on the port that
TensorFlow's server listens on afterwards, and waits there for the word to go.

    worker 1                chief                 worker 2
       |--- here I am ------->|                       |
       |                      |<------- here I am ----|
       |<-- all are there ----|--- all are there ---->|
"""

import contextlib
import json
import os
import select
import socket
import time
from typing import Any

from keras_allreduce.workers.cluster import Cluster, host_and_port

_MAX_BYTES = 2**20
_PATIENCE_SECONDS = 5.0


def meet(cluster: Cluster, timeout_seconds: float) -> None:
    """Returns when all workers are there.

    Args:
        cluster: The workers.
        timeout_seconds: How long to wait for the others.

    Raises:
        RuntimeError: On all workers that are there, if one does not come, if
            its port is not free, or if it has other addresses.
    """
    if cluster.rank == 0:
        problem = _expect_all(cluster, timeout_seconds)
    else:
        problem = _report_to_chief(cluster, timeout_seconds)
    if problem is not None:
        raise RuntimeError(problem)


def _expect_all(cluster: Cluster, timeout_seconds: float) -> str | None:
    """The chief's side. Returns the problem, if any, which all are told."""
    end = time.monotonic() + timeout_seconds
    here: dict[int, socket.socket] = {}
    problem = None
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(cluster))
        server.settimeout(0.1)
        while problem is None and len(here) < len(cluster.others):
            with contextlib.suppress(
                OSError, ValueError, LookupError, TypeError
            ):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(_PATIENCE_SECONDS)
                report = _receive(connection)
                rank = cluster.others[cluster.others.index(report["rank"])]
                problem = report["problem"] or _other_addresses(
                    cluster, rank, report["addresses"]
                )
                here[rank] = connection
            here = {r: c for r, c in here.items() if not _has_ended(c)}
            missing = [rank for rank in cluster.others if rank not in here]
            if problem is None and missing and time.monotonic() > end:
                problem = _never_came(cluster, missing, timeout_seconds)
        for connection in here.values():
            with contextlib.suppress(OSError):
                _send(connection, {"problem": problem})
    return problem


def _report_to_chief(cluster: Cluster, timeout_seconds: float) -> str | None:
    """The side of another worker. Returns the problem, if any."""
    own = None
    try:
        _listen(cluster).close()
    except RuntimeError as error:
        own = str(error)
        timeout_seconds = min(timeout_seconds, _PATIENCE_SECONDS)
    report = {
        "rank": cluster.rank,
        "addresses": cluster.addresses,
        "problem": own,
    }
    end = time.monotonic() + timeout_seconds
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            # The chief's time may have begun a little later.
            return _tell_chief(cluster, report, left + _PATIENCE_SECONDS)
        time.sleep(0.1)
    return own or _never_came(cluster, [0], timeout_seconds)


def _tell_chief(
    cluster: Cluster, report: dict[str, Any], timeout_seconds: float
) -> str | None:
    """Reports once. Returns the problem that the chief answers, if any."""
    with socket.create_connection(
        host_and_port(cluster.addresses[0]), 2
    ) as connection:
        _send(connection, report)
        connection.settimeout(timeout_seconds)
        problem = _receive(connection)["problem"]
        return None if problem is None else str(problem)


def _never_came(
    cluster: Cluster, missing: list[int], timeout_seconds: float
) -> str:
    return (
        "All workers must start within "
        f"timeout_seconds={timeout_seconds:g} of each other. Never reached: "
        f"{cluster.names(missing)}. Look at their logs, check that the "
        "addresses are right and the ports open, and start all workers again."
    )


def _other_addresses(
    cluster: Cluster, rank: int, addresses: list[str]
) -> str | None:
    if list(addresses) == list(cluster.addresses):
        return None
    return (
        "All workers must have the same cluster, in the same order. Received: "
        f"{cluster.name(0)} has {list(cluster.addresses)}, "
        f"{cluster.name(rank)} has {list(addresses)}. Only the task in "
        "TF_CONFIG differs between workers."
    )


def _listen(cluster: Cluster) -> socket.socket:
    """A socket that listens where TensorFlow's server will."""
    _, port = host_and_port(cluster.addresses[cluster.rank])
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=len(cluster.tasks),
        )
    except OSError as error:
        raise RuntimeError(
            "The port of a worker must be free. Received: "
            f"{cluster.name(cluster.rank)}, where this worker cannot listen "
            f"({os.strerror(error.errno or 0)}). End what listens there, such "
            "as an earlier run of this worker, or give it another port on all "
            "workers."
        ) from None


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb") as file:
        return dict(json.loads(file.readline(_MAX_BYTES)))


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side, which only waits now, has gone."""
    return bool(select.select([connection], [], [], 0)[0])
