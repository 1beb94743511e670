"""Python processes in which TensorFlow and Keras are imported already.

They come from `warm_server.py` and are as good as those that the command
`python` starts, but for these seconds. What a test says of imports, or of how
a process is started, needs the command itself.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from deadlines import DEADLINE_SECONDS, wait_until

SERVER = Path(__file__).parent / "warm_server.py"
FORKED = Path(__file__).parent / "forked_python.py"


class Process:
    """A forked process, with what `subprocess.Popen` has.

    Args:
        argv: What it runs: the arguments behind `python`.
        folder: Where it runs.
        environment: All its environment variables.
        stdout: Path of the file for its output.
        stderr: The same for its errors.
        namespace: Path of its network namespace; `None`: that of the tests.
        forks: Whether the processes that it starts are forked as well.
    """

    def __init__(
        self,
        argv,
        *,
        folder,
        environment,
        stdout,
        stderr,
        namespace=None,
        forks=False,
    ):
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address())
        request = {
            "argv": argv,
            "folder": str(folder),
            "environment": environment,
            "stdout": str(stdout),
            "stderr": str(stderr),
            "namespace": namespace,
            "executable": executable() if forks else None,
        }
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._lines = self._connection.makefile()
        self.pid = int(self._lines.readline())
        self.returncode = None

    def wait(self, timeout=DEADLINE_SECONDS):
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: If it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout)
            self.returncode = int(self._lines.readline())
            self._connection.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(
    argv,
    *,
    folder=".",
    environment=None,
    timeout=DEADLINE_SECONDS,
    forks=False,
):
    """Runs a process to its end, as `subprocess.run` does.

    Args:
        argv: The arguments behind `python`.
        folder: Where it runs.
        environment: Variables besides those of this process.
        timeout: Seconds until it is killed.
        forks: Whether the processes that it starts are forked as well.

    Returns:
        `subprocess.CompletedProcess` with its output.

    Raises:
        subprocess.TimeoutExpired: If it was killed.
    """
    with tempfile.TemporaryDirectory() as outputs:
        stdout, stderr = Path(outputs, "stdout"), Path(outputs, "stderr")
        process = Process(
            argv,
            folder=Path(folder).absolute(),
            environment={**os.environ, **(environment or {})},
            stdout=stdout,
            stderr=stderr,
            forks=forks,
        )
        try:
            process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(
            argv, process.returncode, stdout.read_text(), stderr.read_text()
        )


@functools.cache
def executable():
    """Path of a program to start in place of `python`.

    Where the subject is how a process is started or ended, the child has to be
    the process itself, not `forked_python.py`, which only stands for it.
    """
    path = Path(address()).with_name("python")
    plain = shlex.quote(sys.executable)
    forked = shlex.join([sys.executable, "-S", "-E", str(FORKED), address()])
    # Python's own options are for small processes, which import no TensorFlow.
    path.write_text(
        f"""#!/bin/sh
case "$1" in
-[ESI]) exec {plain} "$@" ;;
*) exec {forked} "$@" ;;
esac
"""
    )
    path.chmod(0o700)
    return str(path)


@functools.cache
def address():
    """Path of the socket of this process's server, which ends with it."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, said = Path(folder, "socket"), Path(folder, "said")
    with said.open("w") as file:
        _keep.append(
            subprocess.Popen(
                [sys.executable, str(SERVER), str(path)],
                # The server ends when this end is closed.
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "-1",
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                },
            )
        )
    wait_until(lambda: path.exists() or _keep[-1].poll() is not None)
    assert path.exists(), said.read_text()
    return str(path)


_keep = []
