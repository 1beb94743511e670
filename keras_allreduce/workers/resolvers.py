"""Cluster resolvers: from the environment to a `tf.train.ClusterSpec`.

`mpirun`, `srun` and Kubernetes tell a process its rank; TF_CONFIG tells it all
addresses. `resolver_for` finds out which of them there is. Processes that know
their rank tell rank 0 where they listen, and learn the same of all. Only rank 0
must be found; the host of the others is where they come from.
"""

import contextlib
import functools
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tensorflow as tf
from absl import logging

from keras_allreduce.addresses import Address
from keras_allreduce.environment import JOB_TOKEN, TF_CONFIG
from keras_allreduce.workers.cluster import read_tf_config
from keras_allreduce.workers.connect import waits_for_start
from keras_allreduce.workers.errors import WorkerStartError
from keras_allreduce.workers.mpi.start import GRPC, MPI, host_of_rank_0
from keras_allreduce.workers.ranks import Placement, hint_of, placement_of
from keras_allreduce.workers.reports import Gathering, Report, first_free

_ALONE = "TF_CONFIG='{}' trains on this process alone."

_BYTES_PER_RANK = 300
_MAX_BYTES = 2**16


class LauncherClusterResolver(tf.distribute.cluster_resolver.ClusterResolver):
    """Cluster resolver for workers started by `mpirun`, `srun` or Kubernetes.

    `MultiWorkerAllReduceStrategy` uses it if TF_CONFIG is not set. Create one
    to change the timeout, or for `tf.distribute.MultiWorkerMirroredStrategy`.
    Rank and size come from the environment. Each process sends its address to
    rank 0 and receives those of all; MASTER_ADDR and MASTER_PORT locate rank
    0 if the launcher does not.

    Args:
        timeout_seconds: Seconds to wait for the other processes.
        leader: Host of rank 0; empty: as above.

    Raises:
        ValueError: If the process was not started as one of several, or the
            host of rank 0 is unknown.
    """

    def __init__(self, timeout_seconds: float = 600.0, leader: str = ""):
        placement = placement_of(os.environ)
        if placement is None:
            raise ValueError(
                "A launcher must have started several processes. Received: "
                "none of the variables of Open MPI, MPICH, srun or a "
                "Kubernetes Indexed Job. Set RANK, WORLD_SIZE and MASTER_ADDR, "
                "or TF_CONFIG, by hand."
            )
        if leader:
            placement = replace(placement, leader=leader)
        if not placement.leader:
            raise ValueError(
                "The host of rank 0 must be known to train on several. "
                f"Received: {placement.source}, and no MASTER_ADDR. Set "
                "MASTER_ADDR to that host on all processes, or TF_CONFIG to "
                f"the addresses of all. {_ALONE}"
            )
        self._placement = placement
        self._timeout_seconds = timeout_seconds
        self.task_type = "worker"
        self.task_id = placement.rank
        self.rpc_layer = "grpc"

    def cluster_spec(self) -> tf.train.ClusterSpec:
        """Addresses of all workers; waits for the others the first time.

        Raises:
            WorkerStartError: If they do not come.
        """
        return tf.train.ClusterSpec(
            {"worker": list(_exchange(self._placement, self._timeout_seconds))}
        )

    def master(
        self,
        task_type: str | None = None,
        task_id: int | None = None,
        rpc_layer: str | None = None,
    ) -> str:
        """URL of a worker: of this one, or of the one that is asked for."""
        address = self.cluster_spec().task_address(
            task_type or self.task_type,
            self.task_id if task_id is None else task_id,
        )
        return f"{rpc_layer or self.rpc_layer}://{address}"

    def num_accelerators(
        self,
        task_type: str | None = None,
        task_id: int | None = None,
        config_proto: Any = None,
    ) -> dict[str, int]:
        """GPUs of this process by kind: those that CUDA shows it."""
        num_gpus = len(tf.config.list_logical_devices("GPU"))
        return {"GPU": num_gpus} if num_gpus else {}


class _Alone(tf.distribute.cluster_resolver.ClusterResolver):
    """An evaluator, which is in no collective and needs no server."""

    def __init__(self, task_type: str, task_id: int):
        self.task_type = task_type
        self.task_id = task_id
        self.rpc_layer = "grpc"

    def cluster_spec(self) -> tf.train.ClusterSpec:
        return tf.train.ClusterSpec({})

    def master(self, *args: Any, **kwargs: Any) -> str:
        return ""


def resolver_for(
    resolver: Any, timeout_seconds: float, transport: str = GRPC
) -> Any:
    """The cluster resolver to start with.

    Args:
        resolver: The one that the script passes, or `None`.
        timeout_seconds: How long ours waits for the other workers.
        transport: `"mpi"`: MPI tells where rank 0 is, if nothing else does.

    Returns:
        The one that was passed; without it and without TF_CONFIG a
        `LauncherClusterResolver`, if a launcher has started several
        processes. An evaluator, whose collectives would wait for nobody, gets
        one of its own.

    Raises:
        ValueError: If TF_CONFIG makes no sense; see `LauncherClusterResolver`.
    """
    text = os.environ.get(TF_CONFIG, "")
    if resolver is None:
        if not text.strip():
            return _of_launcher(timeout_seconds, transport)
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if isinstance(
        resolver, tf.distribute.cluster_resolver.TFConfigClusterResolver
    ):
        read_tf_config(text)  # In words of ours, where it makes no sense.
    if getattr(resolver, "task_type", None) == "evaluator":
        return _Alone("evaluator", resolver.task_id)
    return resolver


def _of_launcher(
    timeout_seconds: float, transport: str
) -> LauncherClusterResolver | None:
    placement = placement_of(os.environ)
    if placement is not None:
        asks_mpi = transport == MPI and not placement.leader
        leader = host_of_rank_0(timeout_seconds) if asks_mpi else ""
        return LauncherClusterResolver(timeout_seconds, leader)
    hint = hint_of(os.environ)
    if hint is not None:
        logging.warning(
            "keras_allreduce: This process trains alone. Received: %s. %s",
            hint,
            _ALONE,
        )
    return None


# A second strategy has the workers and the servers of the first.
@functools.cache
def _exchange(placement: Placement, timeout_seconds: float) -> tuple[str, ...]:
    token = os.environ.get(JOB_TOKEN) or placement.job
    this = f"rank {placement.rank} of {placement.size}"
    with waits_for_start(this, timeout_seconds):
        return tuple(exchange_addresses(placement, timeout_seconds, token))


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
        WorkerStartError: If a process does not come, or all are not of one job.
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
        lambda message: _check_report(placement, message),
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
        raise WorkerStartError(
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
        raise WorkerStartError(problem)
    return addresses


def _check_report(
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
        raise WorkerStartError(answer["problem"])
    addresses = answer.get("addresses")
    if not isinstance(addresses, list) or len(addresses) != placement.size:
        raise WorkerStartError(
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
