"""The workers meet before TensorFlow starts, so that none waits for ever.

TensorFlow waits for a missing worker in C++, without an end and deaf to
Ctrl+C. So each worker first reports to the chief, in Python, on the port that
TensorFlow's server listens on afterwards, and waits there for the word to go.

    worker 1                chief                 worker 2
       |--- here I am ------->|                       |
       |                      |<------- here I am ----|
       |<-- all are there ----|--- all are there ---->|

`reports.py` has the messages.
"""

import os
import socket
import time
from typing import Any

from keras_allreduce.addresses import parse_address
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.reports import (
    NoAnswer,
    Reception,
    Report,
    deliver,
)

_PATIENCE_SECONDS = 5.0
_MAX_BYTES_OF_A_PROBLEM = 2**16


def meet(
    cluster: Cluster, timeout_seconds: float, token: str = ""
) -> str | None:
    """Returns when all workers are there, or when that cannot be.

    Args:
        cluster: The workers.
        timeout_seconds: How long to wait for the others.
        token: Keeps workers of other jobs apart; the same on all.

    Returns:
        `None` if all are there. Otherwise the problem, for an error on all
        workers that are: one does not come, its port is not free, or it has
        other addresses.
    """
    if cluster.rank == 0:
        return _expect_all(cluster, timeout_seconds, token)
    return _report_to_chief(cluster, timeout_seconds, token)


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


def _expect_all(
    cluster: Cluster, timeout_seconds: float, token: str
) -> str | None:
    """The chief's side. Returns the problem, if any, which all are told."""
    end = time.monotonic() + timeout_seconds
    here: dict[int, Report] = {}
    try:
        server = listen(_own_port(cluster), max(128, len(cluster.tasks)))
    except OSError as error:
        return _port_in_use(cluster, error)
    with Reception(server, token, _limit_bytes(cluster)) as reception:
        problem = None
        while problem is None and len(here) < len(cluster.others):
            for report in reception.wait(0.1):
                found = _take(cluster, here, report)
                problem = problem or found
            here = {r: c for r, c in here.items() if not c.has_ended}
            missing = [rank for rank in cluster.others if rank not in here]
            if problem is None and missing and time.monotonic() > end:
                problem = _never_came(
                    cluster,
                    missing,
                    timeout_seconds,
                    f"{reception.strangers} other connections were turned away"
                    if reception.strangers
                    else None,
                )
        for report in here.values():
            report.answer({"problem": problem})
    return problem


def _take(
    cluster: Cluster, here: dict[int, Report], report: Report
) -> str | None:
    """Notes who is here. Returns the problem, if any."""
    rank = report.content.get("rank")
    addresses = report.content.get("addresses")
    if not isinstance(rank, int) or not isinstance(addresses, list):
        return None
    problem = report.content.get("problem")
    if problem is not None:
        problem = str(problem)[:_MAX_BYTES_OF_A_PROBLEM]
    elif addresses != list(cluster.addresses):
        problem = _other_addresses(cluster, rank, addresses)
    elif rank not in cluster.others:
        return None
    elif rank in here and not here[rank].has_ended:
        problem = (
            "Every worker must have its own index. Received: two processes "
            f"are {cluster.name(rank)}. Only the task in TF_CONFIG differs "
            "between workers."
        )
    else:
        here[rank] = report
        return None
    # The others are told when this returns.
    report.answer({"problem": problem})
    return problem


def _report_to_chief(
    cluster: Cluster, timeout_seconds: float, token: str
) -> str | None:
    """The side of another worker. Returns the problem, if any."""
    own, patience = None, timeout_seconds
    try:
        listen(_own_port(cluster)).close()
    except OSError as error:
        own = _port_in_use(cluster, error)
        patience = min(timeout_seconds, _PATIENCE_SECONDS)
    report: dict[str, Any] = {
        "rank": cluster.rank,
        "addresses": cluster.addresses,
        "problem": own,
    }
    try:
        answer = deliver(
            [parse_address(cluster.addresses[0])],
            report,
            token,
            patience,
            # The chief's time may have begun a little later.
            _PATIENCE_SECONDS,
            _MAX_BYTES_OF_A_PROBLEM + _limit_bytes(cluster),
        )
    except NoAnswer as reason:
        return own or _never_came(cluster, [0], timeout_seconds, str(reason))
    problem = answer.get("problem")
    return None if problem is None else str(problem)


def _own_port(cluster: Cluster) -> int:
    return parse_address(cluster.addresses[cluster.rank]).port


def _limit_bytes(cluster: Cluster) -> int:
    """Bytes of the largest report: other addresses may be longer than ours."""
    own = sum(len(each) + 4 for each in cluster.addresses)
    return _MAX_BYTES_OF_A_PROBLEM + 2 * own


def _never_came(
    cluster: Cluster,
    missing: list[int],
    timeout_seconds: float,
    found: str | None,
) -> str:
    return (
        "All workers must start within "
        f"timeout_seconds={timeout_seconds:g} of each other. Never reached: "
        f"{cluster.names(missing)}{f' ({found})' if found else ''}. Look at "
        "their logs, check that the addresses are right and the ports open, "
        "and start all workers again."
    )


def _other_addresses(cluster: Cluster, rank: int, addresses: list[Any]) -> str:
    other = cluster.name(rank) if rank in cluster.others else "another"
    return (
        "All workers must have the same cluster, in the same order. Received: "
        f"{cluster.name(0)} has {list(cluster.addresses)}, "
        f"{other} has {addresses}. Only the task in "
        "TF_CONFIG differs between workers."
    )


def _port_in_use(cluster: Cluster, error: OSError) -> str:
    return (
        "The port of a worker must be free. Received: "
        f"{cluster.name(cluster.rank)}, where this worker cannot listen "
        f"({os.strerror(error.errno or 0)}). End what listens there, such "
        "as an earlier run of this worker, or give it another port on all "
        "workers."
    )
