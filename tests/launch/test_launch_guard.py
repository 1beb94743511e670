"""Two ways in which a worker does not outlive its launcher."""

import os
import subprocess
import sys

import pytest
from deadlines import DEADLINE_SECONDS
from process_lock import wait_until_none_is_left

from keras_allreduce.launch import guard

SLEEPER = """
import fcntl, sys, time
alive = open(sys.argv[1], "a")
fcntl.flock(alive, fcntl.LOCK_SH)
print("ready", flush=True)
time.sleep(3600)
"""

# Its pipe has a reader that kills nothing, in the place of the guard.
PARENT = """
import os, subprocess, sys, time
reader, writer = os.pipe()
subprocess.Popen(
    [sys.executable, sys.argv[1], "become", str(writer), sys.executable,
     *sys.argv[2:]],
    pass_fds=[writer],
    start_new_session=True,
)
time.sleep(3600)
"""


@pytest.fixture
def sleeper(tmp_path):
    path = tmp_path / "sleeper.py"
    path.write_text(SLEEPER)
    return str(path)


def test_a_guard_that_closes_ends_what_it_started(sleeper, tmp_path):
    started = guard.Guard()
    command = [sleeper, str(tmp_path / "alive")]
    with started.start(command, dict(os.environ)) as process:
        assert process.stdout.readline() == b"ready\n"
        started.close()
        assert process.wait(DEADLINE_SECONDS) == -9


def test_what_has_ended_is_not_killed(monkeypatch):
    killed = []
    monkeypatch.setattr(
        guard, "signal_group", lambda group, _: killed.append(group)
    )
    guard.watch(["+11\n", "+12\n", "-11\n"])
    assert killed == [12]


def test_a_group_that_is_gone_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-c", ""], start_new_session=True
    ) as process:
        process.wait()
        guard.signal_group(process.pid, 15)


@pytest.mark.skipif(
    sys.platform != "linux", reason="Only Linux kills with the parent."
)
def test_without_a_guard_linux_ends_the_worker(sleeper, tmp_path):
    alive = tmp_path / "alive"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, guard.__file__, sleeper, alive],
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
    wait_until_none_is_left(alive)
