"""Worker processes for the tests, none of which outlives its test.

They talk over loopback, or over a network of namespaces (`namespaces.py`). Each
runs `worker_script.py`, which calls one of its functions and leaves what that
returns as JSON.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm_python
from deadlines import DEADLINE_SECONDS, wait_until

SCRIPT = Path(__file__).parent / "worker_script.py"


@dataclass(frozen=True)
class Worker:
    """One process.

    Attributes:
        index: Its number.
        process: Its `subprocess.Popen`, or `warm_python.Process`.
        folder: Where it leaves its result and its output.
        end: `time.monotonic()` at which it has to be gone.
    """

    index: int
    process: Any
    folder: Path
    end: float

    def wait(self):
        """Its exit code, or `None` if it did not end by itself in time."""
        return exit_code(self.process, self.end)

    @property
    def pid(self):
        return self.process.pid

    @property
    def output(self):
        """What it wrote to stdout and stderr so far."""
        return (self.folder / "output").read_text(errors="replace")

    @property
    def result(self):
        """What its function returned, or `None` if it did not."""
        path = self.folder / "result"
        return json.loads(path.read_text()) if path.exists() else None


def exit_code(process, end):
    """Of a process, or `None` if it has not ended at `time.monotonic()` end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0, end - time.monotonic()))
    return process.returncode


def selected(request):
    """The cases for the fixture that this run of pytest has selected.

    A test of a case takes its `name`.
    """
    return [
        item.callspec.params["name"]
        for item in request.session.items
        if request.fixturename in getattr(item, "fixturenames", ())
    ]


def free_ports(count):
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.socket(socket.AF_INET))
            for _ in range(count)
        ]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running(
    function,
    *arguments,
    deadline_seconds=DEADLINE_SECONDS,
    num_workers=2,
    network=None,
    environment=None,
):
    """Starts workers that call a function of `worker_script.py`.

    Args:
        function: Name of the function.
        *arguments: What it is called with; goes through JSON.
        deadline_seconds: When a worker that is still there is killed.
        num_workers: Number of workers.
        network: `namespaces.Network` for the workers, each in its namespace;
            `None`: all on loopback.
        environment: Variables of each worker, besides those of this process.

    Yields:
        List of `Worker`. At the end of the block all are gone.
    """
    addresses = _addresses(num_workers, network)
    end = time.monotonic() + deadline_seconds
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for index in range(num_workers):
                own = Path(folder, str(index))
                own.mkdir()
                workers.append(
                    Worker(
                        index,
                        _start(
                            own,
                            {
                                "cluster": {"worker": addresses},
                                "task": {"type": "worker", "index": index},
                            },
                            [function, *arguments],
                            deadline_seconds,
                            network,
                            environment[index] if environment else {},
                        ),
                        own,
                        end,
                    )
                )
            yield workers
        finally:
            for worker in workers:
                worker.process.kill()  # Also ends one that is stopped.
                worker.process.wait()


def results(function, *arguments, **options):
    """What the function returns on each worker; see `running`.

    Raises:
        RuntimeError: If a worker fails or is too slow, with its output.
    """
    with running(function, *arguments, **options) as workers:
        codes = [worker.wait() for worker in workers]
        if any(codes) or None in codes:
            outputs = "\n".join(
                f"--- worker {worker.index}, exit code {code}\n"
                + worker.output[-6000:]
                for worker, code in zip(workers, codes, strict=True)
            )
            raise RuntimeError(f"Workers failed.\n{outputs}")
        return [worker.result for worker in workers]


def end_of_the_other(signal_name, index, environment=None):
    """Sends one of two workers a signal in the middle of an epoch.

    Prints how long the other takes to end, and what it says.

    Returns:
        Exit code of the other, and its output.
    """
    with running(
        "fit_and_signal",
        signal_name,
        index,
        DEADLINE_SECONDS,
        environment=environment,
    ) as pair:
        other = pair[1 - index]
        wait_until(
            lambda: (
                "is gone" in other.output or other.process.poll() is not None
            )
        )
        return end_of(other, f"{signal_name} to worker {index}")


def end_of(worker, event):
    """Prints how long a worker takes to end after an event.

    Returns:
        Its exit code and its output.
    """
    start = time.monotonic()
    code = worker.wait()
    seconds = time.monotonic() - start
    print(f"{event}: {seconds:.1f} s, exit code {code}")
    print(worker.output[-3000:])
    return code, worker.output


def _addresses(num_workers, network):
    if network is None:
        return [f"127.0.0.1:{port}" for port in free_ports(num_workers)]
    # Every worker has all ports of its namespace for itself.
    return [f"{host}:12345" for host in network.addresses[:num_workers]]


def _start(folder, cluster, call, deadline_seconds, network, environment):
    # There from the start, as a test may look at it any time.
    (folder / "output").touch()
    argv = [
        json.dumps(call),
        str(folder / "result"),
        # It also ends if the tests are killed before they kill it.
        str(int(deadline_seconds) + 1),
    ]
    environment = {
        **os.environ,
        "TF_CONFIG": json.dumps(cluster),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        **environment,
    }
    if environment["CUDA_VISIBLE_DEVICES"] == "-1":
        return warm_python.Process(
            [str(SCRIPT), *argv],
            folder=Path.cwd(),
            environment=environment,
            stdout=folder / "output",
            stderr=folder / "output",
            namespace=network and network.path(cluster["task"]["index"]),
        )
    assert network is None, "Workers with GPUs are on loopback."
    with open(folder / "output", "wb") as output:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
