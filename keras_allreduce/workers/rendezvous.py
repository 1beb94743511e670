"""The workers meet before TensorFlow starts, so that none waits for ever.

TensorFlow waits for a missing worker in C++, without an end and deaf to
Ctrl+C. So each worker first reports to the chief, in Python, on the port that
TensorFlow's server listens on afterwards, and waits there for the word to go.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from keras_allreduce.addresses import parse_address
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.gather import Gathering, listen
from keras_allreduce.workers.timing import TIMING

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
    gathering = _gathering(cluster, timeout_seconds, token)
    own = None
    try:
        port = parse_address(cluster.addresses[cluster.rank]).port
        server = listen(port, max(128, len(cluster.tasks)))
    except OSError as error:
        own = _port_in_use(cluster, error)
    if cluster.rank == 0:
        return own or gathering.collect(server)
    if own is None:
        server.close()
    else:
        patience = min(timeout_seconds, TIMING.late_chief)
        gathering = replace(gathering, timeout_seconds=patience)
    message = {"rank": cluster.rank, "addresses": cluster.addresses}
    leader = [parse_address(cluster.addresses[0])]
    answer = gathering.report(leader, {**message, "problem": own})
    return own or answer["problem"]


def _gathering(
    cluster: Cluster, timeout_seconds: float, token: str
) -> Gathering:
    return Gathering(
        len(cluster.tasks),
        timeout_seconds,
        token,
        # Other addresses may be longer than ours.
        2 * (_MAX_BYTES_OF_A_PROBLEM + sum(map(len, cluster.addresses))),
        lambda message: _check(cluster, message),
        lambda missing, found: _never_came(
            cluster, missing, timeout_seconds, found
        ),
        lambda rank: _came_twice(cluster, rank),
    )


def _check(cluster: Cluster, message: Mapping[str, Any]) -> int | str | None:
    rank, addresses = message.get("rank"), message.get("addresses")
    if not isinstance(rank, int) or not isinstance(addresses, list):
        return None
    if message.get("problem") is not None:
        return str(message["problem"])[:_MAX_BYTES_OF_A_PROBLEM]
    if addresses != list(cluster.addresses):
        other = cluster.name(rank) if rank in cluster.others else "another"
        return (
            "All workers must have the same cluster, in the same order. "
            f"Received: {cluster.name(0)} has {list(cluster.addresses)}, "
            f"{other} has {addresses}. Only the task in TF_CONFIG differs "
            "between workers."
        )
    return rank if rank in cluster.others else None


def _never_came(
    cluster: Cluster, missing: list[int], timeout_seconds: float, found: str
) -> str:
    return (
        "All workers must start within "
        f"timeout_seconds={timeout_seconds:g} of each other. Never reached: "
        f"{cluster.names(missing)}{f' ({found})' if found else ''}. Look at "
        "their logs, check that the addresses are right and the ports open, "
        "and start all workers again."
    )


def _came_twice(cluster: Cluster, rank: int) -> str:
    return (
        "Every worker must have its own index. Received: two processes are "
        f"{cluster.name(rank)}. Only the task in TF_CONFIG differs between "
        "workers."
    )


def _port_in_use(cluster: Cluster, error: OSError) -> str:
    return (
        "The port of a worker must be free. Received: "
        f"{cluster.name(cluster.rank)}, where this worker cannot listen "
        f"({os.strerror(error.errno or 0)}). End what listens there, such "
        "as an earlier run of this worker, or give it another port on all "
        "workers."
    )
