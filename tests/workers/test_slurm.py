"""`srun` starts the workers, on a Slurm of two nodes that the tests start.

Both nodes are on this machine: two `slurmd`, a `slurmctld` and a `munged`, with
ports, files and logs of their own. Skipped where they are not installed
(`apt-get install slurmd slurmctld slurm-client munge`), or this is not root.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import test_multi_worker
import workers
from deadlines import DEADLINE_SECONDS, wait_until

pytestmark = pytest.mark.nightly

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")

# Debian has daemons where only root looks.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# The first is the host of rank 0, which the workers look up by its name.
HOST = os.uname().nodename.split(".")[0]
NODES = (HOST, f"{HOST}-2")

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={nodes[0]}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/linear
SchedulerType=sched/builtin
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={first}
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={second}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

TRAIN = """
import json
import sys

import programs

import keras_allreduce

strategy = keras_allreduce.MultiWorkerAllReduceStrategy(timeout_seconds={limit})
result = programs.run("even_batches", strategy)[0]
name = f"result{{strategy.cluster_resolver.task_id}}"
with open(name, "w") as file:
    json.dump(result, file)
"""

KILL_ITSELF = """
import os
import signal

import tensorflow as tf

import keras_allreduce

strategy = keras_allreduce.MultiWorkerAllReduceStrategy(timeout_seconds={limit})
if strategy.cluster_resolver.task_id == 1:
    os.kill(os.getpid(), signal.SIGKILL)
with strategy.scope():
    tf.Variable(tf.constant(1.0))
"""


def why_not():
    """Why there can be no Slurm here; empty if there can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "only root starts slurmd"
    try:
        socket.gethostbyname(NODES[0])
    except OSError:
        return "this host cannot look up its own name"
    return ""


class Slurm:
    """Two nodes of Slurm, until `stop`.

    Args:
        folder: For the files of the daemons, and of the jobs.
    """

    def __init__(self, folder):
        self.folder = folder
        self._daemons = []
        controller, first, second = workers.free_ports(3)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=folder,
                nodes=NODES,
                controller=controller,
                first=first,
                second=second,
            )
        )
        self._environment = {
            **{k: v for k, v in os.environ.items() if k != "TF_CONFIG"},
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": f"{workers.SCRIPT.parent}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
        }

    def start(self):
        """Starts the daemons; returns when both nodes are there."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(
                f"--{what}-file={self.folder}/munge.{what}"
                for what in ("pid", "seed", "log")
            ),
            f"--socket={self.folder}/munge.socket",
        )
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-c", "-N", node)
        wait_until(
            lambda: self._states().count("idle") == len(NODES),
            lambda: self.log,
        )

    def stop(self):
        """Ends the daemons, the last first."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(30)
            daemon.kill()
            daemon.wait()

    @property
    def log(self):
        """What the daemons have written."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def run(self, script, *options):
        """Exit code of `srun python`, and its output."""
        path = self.folder / "train.py"
        path.write_text(script.format(limit=DEADLINE_SECONDS))
        self._environment["MASTER_PORT"] = str(workers.free_ports(1)[0])
        done = subprocess.run(
            [
                *("srun", "--ntasks=2", "--wait=0", *options),
                *(sys.executable, str(path)),
            ],
            env=self._environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        return done.returncode, done.stdout

    def _daemon(self, name, *arguments):
        with open(
            self.folder / f"{name}.{len(self._daemons)}.log", "wb"
        ) as log:
            self._daemons.append(
                subprocess.Popen(
                    [shutil.which(name, path=PATH), *arguments],
                    env=self._environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def _states(self):
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.split()


@pytest.fixture(scope="module")
def slurm():
    if why_not():
        pytest.skip(f"Slurm: {why_not()}")
    with tempfile.TemporaryDirectory() as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.mark.parametrize(
    "options",
    [["--nodes=2"], ["--nodes=1", "--overcommit"]],
    ids=["two nodes", "one node"],
)
def test_workers_that_srun_starts_train_as_one_device_does(options, slurm):
    code, output = slurm.run(TRAIN, *options)
    assert code == 0, output + slurm.log
    results = [
        {"even_batches": json.loads((slurm.folder / f"result{n}").read_text())}
        for n in range(2)
    ]
    test_multi_worker.agree("even_batches", results)


def test_a_task_that_is_killed_is_named_by_the_other(slurm):
    code, output = slurm.run(KILL_ITSELF, "--nodes=2")
    assert code != 0
    rule = "All workers must stay until training ends. Received: worker 1 ("
    assert rule in output, output
