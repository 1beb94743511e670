"""Starts workers by `fork`, so that TensorFlow is imported once for all.

Not a test. `workers.py` runs one server per process of pytest: importing
TensorFlow takes most of the time of a small worker. A server has imported it
and started nothing: forked, that is as good as new.

Each line on stdin is a JSON object: `argv` of worker_script.py, `environment`,
and the paths of the files for `output` and `exit_code`. The server answers with
the process id on stdout. It ends when stdin does.
"""

import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path

POLL_SECONDS = 0.02
SCRIPT = Path(__file__).parent / "worker_script.py"


def serve():
    """Answers requests; returns in each child, with its request."""
    exit_code_files = {}
    while True:
        patience = POLL_SECONDS if exit_code_files else None
        readable, _, _ = select.select([0], [], [], patience)
        _note_ends(exit_code_files)
        if not readable:
            continue
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        exit_code_files[pid] = Path(request["exit_code"])
        print(pid, flush=True)


def _note_ends(exit_code_files):
    for pid, path in list(exit_code_files.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del exit_code_files[pid]
            # Whoever sees the file sees the number in it.
            new = path.with_suffix(".new")
            new.write_text(str(os.waitstatus_to_exitcode(status)))
            new.rename(path)


def become_worker(request):
    """Makes this process look as if it were started by itself."""
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT, 0o600)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [str(SCRIPT), *request["argv"]]


if __name__ == "__main__":
    import keras  # noqa: F401
    import tensorflow  # noqa: F401

    import keras_allreduce
    from keras_allreduce.compat import runtime

    _ = keras_allreduce.MultiWorkerAllReduceStrategy
    assert not runtime.is_started(), "Threads do not survive a fork."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = serve()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become_worker(request)
    runpy.run_path(str(SCRIPT), run_name="__main__")
