"""Chooses what sums between workers, and connects them over MPI."""

import contextlib
import functools
import os
from collections.abc import Mapping

from absl import logging

from keras_allreduce.compat import runtime
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import WorkerLostError, tagged
from keras_allreduce.workers.mpi import library
from keras_allreduce.workers.mpi.engine import Engine
from keras_allreduce.workers.time_limit import limited
from keras_allreduce.workers.timing import TIMING

GRPC, MPI = "grpc", "mpi"
TRANSPORTS = ("auto", GRPC, MPI)


def choose_transport(asked: str, environment: Mapping[str, str]) -> str:
    """Returns `"grpc"` or `"mpi"`.

    Args:
        asked: One of `TRANSPORTS`.
        environment: Environment variables.
    """
    if asked != "auto":
        return asked
    if not library.started_by_mpi(environment):
        return GRPC
    if not library.is_installed():
        logging.warning(
            "keras_allreduce: MPI has started this process, but gradients "
            "cross over gRPC: mpi4py is not installed. `pip install mpi4py` "
            "lets them cross over MPI."
        )
        return GRPC
    return MPI


# Several strategies of one process share the thread that runs collectives.
@functools.cache
def engine_of(cluster: Cluster, timeout_seconds: float) -> Engine:
    """Connects the workers over MPI.

    Args:
        cluster: The workers, all of which are about to do the same.
        timeout_seconds: How long they may take, before this process ends.

    Raises:
        WorkerStartError: If there is no MPI that connects them.
    """
    with _connecting(cluster.name(cluster.rank), timeout_seconds):
        mpi = library.load()
        library.check_world(mpi, len(cluster.tasks))
        # Ranks as TensorFlow counts them.
        comm = mpi.COMM_WORLD.Split(0, cluster.rank)
    warn_of_binding(os.environ)
    return Engine(
        mpi,
        comm,
        lambda why: runtime.abort_collectives(tagged(WorkerLostError(why))),
    )


def host_of_rank_0(timeout_seconds: float) -> str:
    """Address of the host of rank 0, as the other ranks find it, or empty.

    Args:
        timeout_seconds: As for `engine_of`.

    Raises:
        WorkerStartError: If there is no MPI.
    """
    with _connecting(f"process {os.getpid()}", timeout_seconds):
        return library.address_of_rank_0(library.load())


def _connecting(
    this: str, timeout_seconds: float
) -> contextlib.AbstractContextManager[None]:
    limit_seconds = timeout_seconds + TIMING.late_tensorflow
    return limited(
        limit_seconds,
        "keras_allreduce: All workers must stay while they connect. Received: "
        f"{this} still waits in MPI_Init after {limit_seconds:g} s, for one "
        "that is lost. Look for the worker whose log ends first, and start all "
        "again.",
    )


def warn_of_binding(environment: Mapping[str, str]) -> None:
    """Warns if `mpirun` keeps this process from most of its cores.

    Args:
        environment: Environment variables, which tell how many processes
            share this host.
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    cores, mine = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    sharing = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or (
        environment.get("MPI_LOCALNRANKS") or "1"
    )
    share = cores // int(sharing)
    if mine < share:
        logging.warning(
            "keras_allreduce: TensorFlow computes on %d of %d cores, as "
            "mpirun has bound this process to them. Its share would be %d: "
            "`mpirun --bind-to none`.",
            mine,
            cores,
            share,
        )
