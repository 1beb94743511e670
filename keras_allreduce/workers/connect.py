"""Before TensorFlow starts: finds the workers, and waits for all of them.

TensorFlow waits for a missing worker in C++, without an end and deaf to
Ctrl+C. So each worker first reports to the chief, in Python, on the port that
TensorFlow's server listens on afterwards, and waits there for the word to go.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import tensorflow as tf
from absl import logging

from keras_allreduce.addresses import parse_address
from keras_allreduce.compat import runtime
from keras_allreduce.environment import JOB_TOKEN, TF_CONFIG
from keras_allreduce.workers import signals
from keras_allreduce.workers.cluster import (
    JOBS,
    Cluster,
    check_cluster,
    read_tf_config,
)
from keras_allreduce.workers.errors import WorkerStartError
from keras_allreduce.workers.reports import Gathering, listen
from keras_allreduce.workers.time_limit import limited
from keras_allreduce.workers.timing import TIMING

# Where gRPC looks for a proxy.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_OF_GRPC, _OF_ALL = "no_grpc_proxy", "no_proxy"

_MAX_BYTES_OF_A_PROBLEM = 2**16


def read_cluster(resolver: Any) -> Cluster | None:
    """The workers that a cluster resolver, or TF_CONFIG, describes.

    Args:
        resolver: A `tf.distribute.cluster_resolver.ClusterResolver`, or
            `None` for TF_CONFIG.

    Returns:
        The cluster; `None` if this process trains alone.

    Raises:
        ValueError: If the description cannot be right.
    """
    reads_environment = resolver is None or isinstance(
        resolver, tf.distribute.cluster_resolver.TFConfigClusterResolver
    )
    if reads_environment:
        described = read_tf_config(os.environ.get(TF_CONFIG, ""))
        if described is None:
            return None
        jobs, job, index = described
        # Arguments of the resolver override TF_CONFIG.
        job = getattr(resolver, "task_type", None) or job
        asked = getattr(resolver, "task_id", None)
        index = index if asked is None else asked
    else:
        jobs = resolver.cluster_spec().as_dict()
        job, index = resolver.task_type, resolver.task_id
        if not jobs:
            return None
    return check_cluster(jobs, job, index)


@contextlib.contextmanager
def starting(resolver: Any, timeout_seconds: float) -> Iterator[Cluster | None]:
    """Checks before TensorFlow's own set-up, which runs in the block.

    The process keeps its signal handlers, although TensorFlow replaces them.

    Args:
        resolver: See `read_cluster`.
        timeout_seconds: How long to wait for the other workers.

    Yields:
        The cluster; `None` if this process trains alone.

    Raises:
        ValueError: If the description of the cluster cannot be right.
        WorkerStartError: If the workers cannot meet.
    """
    cluster = read_cluster(resolver)
    # A second strategy uses the server that is there.
    if cluster is None or runtime.is_started():
        yield cluster
        return
    with waits_for_start(cluster.name(cluster.rank), timeout_seconds):
        problem = meet(cluster, timeout_seconds, os.environ.get(JOB_TOKEN, ""))
    if problem is not None:
        raise WorkerStartError(problem)
    _keep_from_proxy(cluster)
    _configure(cluster, timeout_seconds)
    with signals.kept(), _connecting(cluster, timeout_seconds):
        yield cluster


@contextlib.contextmanager
def waits_for_start(worker: str, timeout_seconds: float) -> Iterator[None]:
    """Says once that the others are not there, if the block takes long.

    Args:
        worker: What messages call this worker.
        timeout_seconds: How long the block may take.
    """
    said = threading.Timer(
        TIMING.quiet_start,
        logging.warning,
        (
            "keras_allreduce: %s waits for the other workers to start, for at "
            "most timeout_seconds=%g.",
            worker,
            timeout_seconds,
        ),
    )
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()


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
        lambda message: _check_report(cluster, message),
        lambda missing, found: _never_came(
            cluster, missing, timeout_seconds, found
        ),
        lambda rank: _came_twice(cluster, rank),
    )


def _check_report(
    cluster: Cluster, message: Mapping[str, Any]
) -> int | str | None:
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


def _keep_from_proxy(cluster: Cluster) -> None:
    """Lets gRPC reach the workers directly, also if a proxy is set.

    It takes a proxy for every address, and looks for exceptions in the first
    of `no_grpc_proxy` and `no_proxy` that is set.
    """
    if not any(os.environ.get(name) for name in _PROXIES):
        return
    exceptions = os.environ.get(_OF_GRPC) or os.environ.get(_OF_ALL)
    hosts = [parse_address(each).host for each in cluster.addresses]
    listed = [exceptions] if exceptions else []
    os.environ[_OF_GRPC] = ",".join(dict.fromkeys([*listed, *hosts]))


def _configure(cluster: Cluster, timeout_seconds: float) -> None:
    jobs = [task.removeprefix("/job:").split("/")[0] for task in cluster.tasks]
    runtime.configure_coordination(
        cluster.tasks[0],
        {job: jobs.count(job) for job in JOBS if job in jobs},
        timeout_seconds,
        # Our own health monitor finds a lost worker long before, and names it.
        TIMING.coordination,
    )


@contextlib.contextmanager
def _connecting(cluster: Cluster, timeout_seconds: float) -> Iterator[None]:
    """Limits the time of the block, and turns TensorFlow's errors into ours."""
    this = cluster.name(cluster.rank)
    remedy = "Look for the worker whose log ends first, and start all again."
    # TensorFlow has the same limit, but not wherever it waits.
    began = time.monotonic()
    limit_seconds = timeout_seconds + TIMING.late_tensorflow
    limit = limited(
        limit_seconds,
        "keras_allreduce: All workers must stay while they connect. Received: "
        f"{this} still waits after {limit_seconds:g} s, for one that is lost. "
        f"{remedy}",
    )
    try:
        with limit:
            yield
    except tf.errors.OpError as error:
        raise WorkerStartError(
            "All workers must stay while they connect. Received: "
            f"{error.message.splitlines()[0]}, in {this}, after "
            f"{time.monotonic() - began:.0f} s. {remedy}"
        ) from error
