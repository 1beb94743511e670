"""A call that does not return to Python has a time limit."""

import signal
import subprocess
import sys

from deadlines import DEADLINE_SECONDS

CALL = """
import select, sys
from keras_allreduce.workers.time_limit import limited

with limited(float(sys.argv[1]), "It takes too long."):
    select.select([], [], [], float(sys.argv[2]))
print("It goes on.")
"""


def call(limit_seconds, seconds):
    return subprocess.run(
        [sys.executable, "-c", CALL, str(limit_seconds), str(seconds)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def test_a_process_whose_call_does_not_return_is_ended():
    ended = call(0.01, 30)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stderr.strip() == "It takes too long."


def test_a_call_that_returns_in_time_has_no_trace():
    ended = call(DEADLINE_SECONDS, 0)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "It goes on.\n"
