"""A time limit for calls that do not return to Python, kept by another process.

While TensorFlow connects the workers it holds Python's lock: no thread and no
signal handler of this process runs. If a worker dies just then, the others
would wait for ever.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# Its input ends when the block does, or when the process it watches ends.
_WATCH = """
import os, select, signal, sys
watched = int(sys.argv[1])
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    if os.getppid() == watched:
        print(sys.argv[3], file=sys.stderr, flush=True)
        os.kill(watched, signal.SIGKILL)
"""


@contextlib.contextmanager
def limited(seconds: float, message: str) -> Iterator[None]:
    """Ends this process if the block takes longer.

    Args:
        seconds: How long it may take.
        message: Text for stderr before the process is killed.
    """
    command = [sys.executable, "-S", "-E", "-c", _WATCH]
    command += [str(os.getpid()), str(seconds), message]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield
    finally:
        watch.communicate()
