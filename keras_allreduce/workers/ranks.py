"""Rank and size that mpirun, srun or Kubernetes give a process. No TensorFlow.

They say which process of how many this is, but not the addresses of the
others, which `resolvers.py` collects. For that, one address is enough:

| started by | variables | host of rank 0 |
|---|---|---|
| Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_SIZE` | this, or Slurm's |
| MPICH, Intel MPI | `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALNRANKS` | the same |
| srun | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` | first of the step's nodes |
| Kubernetes, Indexed Job | `JOB_COMPLETION_INDEX`, `WORLD_SIZE` | pod 0 |
| by hand, torchrun | `RANK`, `WORLD_SIZE`, `LOCAL_WORLD_SIZE` | `MASTER_ADDR` |

`MASTER_ADDR` and `MASTER_PORT` override the address of rank 0 in each row.
"""

import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

LOOPBACK = "127.0.0.1"

# Below the ports that Linux hands out by itself, from 32768 on.
_FIRST_PORT = 20000
_NUM_PORTS = 12000
_NUM_CANDIDATES = 4


@dataclass(frozen=True)
class Placement:
    """Rank and size of this process, as its launcher gives them.

    Attributes:
        rank: From 0.
        size: Number of processes, at least 2.
        source: The launcher and its variable, for messages.
        leader: Host of rank 0; empty if nothing says so.
        job: Text that only the processes of this job share; empty if not known.
        port: Port of rank 0 for the exchange of addresses; `None`: by `job`.
    """

    rank: int
    size: int
    source: str
    leader: str
    job: str
    port: int | None = None

    @property
    def ports(self) -> tuple[int, ...]:
        """Ports at which rank 0 may be, the same on all ranks."""
        if self.port is not None:
            return (self.port,)
        return tuple(
            _FIRST_PORT + zlib.crc32(f"{self.job}/{n}".encode()) % _NUM_PORTS
            for n in range(_NUM_CANDIDATES)
        )


def placement_of(
    environment: Mapping[str, str],
    full_host_name: Callable[[], str] = socket.getfqdn,
) -> Placement | None:
    """Returns the place of this process among those started together.

    Args:
        environment: Environment variables.
        full_host_name: Returns the name of this host with its domain.

    Returns:
        The place; `None` if the process was started alone.

    Raises:
        ValueError: If a variable is not the number that it should be.
    """
    found = (
        _of_open_mpi(environment)
        or _of_pmi(environment)
        or _of_slurm(environment)
        or _of_kubernetes(environment, full_host_name)
        or _of_rank(environment)
    )
    if found is None:
        return None
    found = replace(
        found,
        leader=environment.get("MASTER_ADDR") or found.leader,
        port=_port(environment),
    )
    if found.size < 2:
        return None
    if not 0 <= found.rank < found.size:
        raise ValueError(
            "A rank is counted from 0 to the size of its job. Received: "
            f"rank {found.rank} of {found.size} from {found.source}"
        )
    return found


def hint_of(environment: Mapping[str, str]) -> str | None:
    """What hints at several processes, without saying that this is one.

    Returns:
        The variable and its possible meaning, for a warning; else `None`.
    """
    if "SLURM_NTASKS" in environment and _int(environment, "SLURM_NTASKS") > 1:
        return (
            f"SLURM_NTASKS={environment['SLURM_NTASKS']}, but srun did not "
            "start this process. `srun python train.py` starts all of them"
        )
    if "JOB_COMPLETION_INDEX" in environment:
        return (
            "JOB_COMPLETION_INDEX="
            f"{environment['JOB_COMPLETION_INDEX']}, but not how many pods "
            "there are. Set WORLD_SIZE to the `completions` of the Job to "
            "train with all of them"
        )
    return None


def _of_open_mpi(environment: Mapping[str, str]) -> Placement | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    size = _int(environment, "OMPI_COMM_WORLD_SIZE")
    local = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    job = environment.get("PMIX_NAMESPACE") or environment.get(
        "OMPI_MCA_ess_base_jobid", ""
    )
    return _mpi(environment, "Open MPI", "OMPI_COMM_WORLD", size, local, job)


def _of_pmi(environment: Mapping[str, str]) -> Placement | None:
    if "PMI_SIZE" not in environment:
        return None
    size = _int(environment, "PMI_SIZE")
    local = environment.get("MPI_LOCALNRANKS")
    return _mpi(environment, "MPI", "PMI", size, local, "")


def _mpi(
    environment: Mapping[str, str],
    launcher: str,
    prefix: str,
    size: int,
    local_size: str | None,
    job: str,
) -> Placement:
    on_one_host = local_size == str(size)
    job = job or _slurm_job(environment)
    if not job and on_one_host:
        # All are children of one daemon.
        job = f"{os.getppid()}"
    leader = LOOPBACK if on_one_host else _first_slurm_host(environment)
    return Placement(
        _int(environment, f"{prefix}_RANK"),
        size,
        f"{launcher} ({prefix}_SIZE={size})",
        leader,
        job,
    )


def _of_slurm(environment: Mapping[str, str]) -> Placement | None:
    # `SLURM_NTASKS` is also there in a batch script, which runs once.
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    size = _int(environment, "SLURM_STEP_NUM_TASKS")
    on_one_host = environment.get("SLURM_STEP_NUM_NODES") == "1"
    leader = LOOPBACK if on_one_host else _first_slurm_host(environment)
    return Placement(
        _int(environment, "SLURM_PROCID"),
        size,
        f"Slurm (SLURM_STEP_NUM_TASKS={size})",
        leader,
        _slurm_job(environment),
    )


def _of_kubernetes(
    environment: Mapping[str, str], full_host_name: Callable[[], str]
) -> Placement | None:
    if not {"JOB_COMPLETION_INDEX", "WORLD_SIZE"} <= set(environment):
        return None
    rank = _int(environment, "JOB_COMPLETION_INDEX")
    # `train-1.service.namespace.svc.cluster.local`; without a service there
    # is no domain, and no name for the others.
    name, _, domain = full_host_name().partition(".")
    is_pod = domain and name.endswith(f"-{rank}")
    pod_0 = f"{name.removesuffix(f'-{rank}')}-0.{domain}" if is_pod else ""
    size = _int(environment, "WORLD_SIZE")
    return Placement(
        rank,
        size,
        f"Kubernetes (JOB_COMPLETION_INDEX={rank}, WORLD_SIZE={size})",
        pod_0,
        pod_0,
    )


def _of_rank(environment: Mapping[str, str]) -> Placement | None:
    if not {"RANK", "WORLD_SIZE"} <= set(environment):
        return None
    size = _int(environment, "WORLD_SIZE")
    on_one_host = environment.get("LOCAL_WORLD_SIZE") == str(size)
    is_told = bool(environment.get("MASTER_ADDR"))
    return Placement(
        _int(environment, "RANK"),
        size,
        f"RANK and WORLD_SIZE={size}",
        LOOPBACK if on_one_host else "",
        # All are children of one launcher, which knows no address.
        f"{os.getppid()}" if on_one_host and not is_told else "",
    )


def _slurm_job(environment: Mapping[str, str]) -> str:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    return ".".join(environment[name] for name in names if name in environment)


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if environment.get(name):
            return first_host(environment[name])
    return ""


def first_host(node_list: str) -> str:
    """The first of Slurm's list of nodes: `n09` of `n[09-11,14],m5`.

    It has rank 0 in every distribution of tasks that Slurm has.
    """
    found = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list.strip())
    host = found.group() if found else ""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", host)


def _port(environment: Mapping[str, str]) -> int | None:
    if "MASTER_PORT" not in environment:
        return None
    port = _int(environment, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ValueError(
            "MASTER_PORT must be from 1 to 65535. Received: "
            f"MASTER_PORT={environment['MASTER_PORT']!r}"
        )
    return port


def _int(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(
            f"{name} must be a number, as what started this process sets it. "
            f"Received: {name}={text!r}"
        )
    return int(text)
