"""The launcher with real processes, which need no TensorFlow."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import DEADLINE_SECONDS
from process_lock import is_none_left, wait_until_none_is_left

from keras_allreduce.launch.job import free_ports

PACKAGE = Path(__file__).parents[2] / "keras_allreduce"

# The package without its `__init__`, which takes seconds to import
# TensorFlow. Signals as in a shell's foreground, wherever the tests run.
LAUNCH = """
import runpy, signal, sys, types
package = types.ModuleType("keras_allreduce")
package.__path__ = [sys.argv.pop(1)]
sys.modules["keras_allreduce"] = package
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
runpy.run_module("keras_allreduce.launch", run_name="__main__", alter_sys=True)
"""

# What every script below may use. A process holds its lock on ALIVE for as
# long as it runs.
PRELUDE = """
import fcntl, json, os, signal, subprocess, sys, time
from pathlib import Path

FOLDER = Path(__file__).parent
CONFIG = json.loads(os.environ["TF_CONFIG"])
INDEX = CONFIG["task"]["index"]
ALIVE = open(FOLDER / "alive", "a")
fcntl.flock(ALIVE, fcntl.LOCK_SH)

def forever():
    print("ready")
    while True:
        # Python sees a signal that comes just before a sleep only after it.
        time.sleep(0.05)

def wait_for(path):
    while not path.exists():
        time.sleep(0.01)

def start_a_child():
    # It ignores what can be ignored, and has its own lock.
    ready = FOLDER / f"child{INDEX}"
    code = (
        "import fcntl, signal, time\\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\\n"
        f"alive = open({str(FOLDER / 'alive')!r}, 'a')\\n"
        "fcntl.flock(alive, fcntl.LOCK_SH)\\n"
        f"open({str(ready)!r}, 'w')\\n"
        "time.sleep(600)\\n"
    )
    subprocess.Popen([sys.executable, "-c", code])
    wait_for(ready)
"""


@pytest.fixture
def write_script(tmp_path):
    def write(text):
        path = tmp_path / "train.py"
        path.write_text(f"{PRELUDE}\n{text}")
        return str(path)

    return write


def command(*words):
    return [sys.executable, "-c", LAUNCH, str(PACKAGE), *words]


def run(*words):
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


@contextlib.contextmanager
def running(*words):
    """A launcher to send signals to; ended in any case."""
    with subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process, *expected):
    """Reads standard output until all of these lines were there."""
    missing = set(expected)
    for line in process.stdout:
        missing.discard(line.rstrip("\n"))
        if not missing:
            return
    raise AssertionError(f"Never written: {missing}\n{process.stderr.read()}")


@pytest.mark.slow
def test_every_worker_knows_the_cluster_and_its_place(write_script, tmp_path):
    script = write_script("""
(FOLDER / f"config{INDEX}").write_text(os.environ["TF_CONFIG"])
(FOLDER / f"words{INDEX}").write_text(json.dumps(sys.argv[1:]))
(FOLDER / f"devices{INDEX}").write_text(
    os.environ["KERAS_ALLREDUCE_HOST_DEVICES"]
)
""")
    options = ["--workers", "2", "--devices-per-worker", "3"]
    done = run(*options, script, "--epochs", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    first, second = (
        json.loads((tmp_path / f"config{index}").read_text())
        for index in range(2)
    )
    assert first["task"] == {"type": "worker", "index": 0}
    assert second["task"] == {"type": "worker", "index": 1}
    assert first["cluster"] == second["cluster"]
    addresses = first["cluster"]["worker"]
    assert len(set(addresses)) == 2
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert json.loads((tmp_path / "words1").read_text()) == ["--epochs", "3"]
    assert (tmp_path / "devices1").read_text() == "3"


@pytest.mark.slow
def test_with_hosts_one_worker_starts_with_the_list_as_it_is(write_script):
    script = write_script("print(json.dumps(CONFIG['cluster']), INDEX)")
    done = run("--hosts", "a:12345,b:12345", "--host-index", "1", script)
    assert done.stdout == ('[worker 1] {"worker": ["a:12345", "b:12345"]} 1\n')


@pytest.mark.slow
def test_free_ports_differ_and_are_new():
    ports = free_ports(5)
    more = free_ports(5, avoid=ports)
    assert len({*ports, *more}) == 10


@pytest.mark.slow
def test_output_and_errors_stay_apart_and_name_their_worker(write_script):
    script = write_script("""
print("out", INDEX)
print("err", INDEX, file=sys.stderr)
""")
    done = run("--workers", "2", script)
    assert sorted(done.stdout.splitlines()) == [
        "[worker 0] out 0",
        "[worker 1] out 1",
    ]
    assert sorted(done.stderr.splitlines()) == [
        "[worker 0] err 0",
        "[worker 1] err 1",
    ]


@pytest.mark.slow
def test_the_bar_comes_once_from_the_chief(write_script):
    script = write_script(r"""
sys.stdout.reconfigure(encoding="utf-8")
print("Epoch 1/1")
for step in (1, 2):
    bar = f"\x1b[1m{step}/2\x1b[0m \x1b[32m━━\x1b[0m 0s 5ms/step - loss: 0.5000"
    print("\b" * 30 + "\r" + bar, end="")
print()
print("trained", INDEX)
""")
    done = run("--workers", "2", script)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("[worker 0]")] == [
        "[worker 0] Epoch 1/1",
        "[worker 0] \x1b[1m2/2\x1b[0m \x1b[32m━━\x1b[0m 0s 5ms/step - "
        "loss: 0.5000",
        "[worker 0] trained 0",
    ]
    assert [line for line in lines if line.startswith("[worker 1]")] == [
        "[worker 1] trained 1"
    ]


@pytest.mark.slow
def test_each_worker_has_a_file_with_all_it_writes(write_script, tmp_path):
    script = write_script(
        """
print("Epoch 1/3")
print("out of", INDEX)
print("err of", INDEX, file=sys.stderr)
"""
    )
    folder = tmp_path / "new" / "logs"
    for _ in range(2):  # It is appended to, as by a restart.
        done = run("--workers", "2", "--output-dir", str(folder), script)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {
        "worker-0.log",
        "worker-1.log",
    }
    for index in range(2):
        written = (folder / f"worker-{index}.log").read_text().splitlines()
        # Of worker 1 too the bar's heading, which the screen leaves out.
        assert sorted(written) == sorted(
            ["Epoch 1/3", f"out of {index}", f"err of {index}"] * 2
        )


@pytest.mark.slow
def test_lines_of_a_file_are_whole(write_script, tmp_path):
    script = write_script("""
for _ in range(300):
    for stream, text in [
        (sys.stdout, "one "), (sys.stderr, "other\\n"), (sys.stdout, "line\\n")
    ]:
        stream.write(text)
        stream.flush()
print("the end", end="")
""")
    done = run("--workers", "1", "--output-dir", str(tmp_path), script)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "worker-0.log").read_text().splitlines()
    assert sorted(written) == sorted(["one line", "other"] * 300 + ["the end"])


@pytest.mark.slow
def test_a_failure_ends_all_and_is_told_last(write_script, tmp_path):
    script = write_script("""
if INDEX == 1:
    wait_for(FOLDER / "started")
    print("a reason")
    sys.stdout.flush()
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
(FOLDER / "started").touch()
forever()
""")
    done = run("--workers", "2", script)
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "[worker 0] told to end",
        "keras_allreduce.launch: worker 1 ended with exit code 3; the last "
        "lines of its output:",
        "[worker 1] a reason",
    ]
    assert is_none_left(tmp_path / "alive")


@pytest.mark.slow
def test_only_the_last_lines_are_told_again(write_script):
    script = write_script("""
for line in range(100):
    print(line)
sys.exit(1)
""")
    done = run("--workers", "1", script)
    first, *lines = done.stderr.splitlines()
    assert first.endswith("the last lines of its output:")
    assert lines == [f"[worker 0] {line}" for line in range(80, 100)]


def test_who_does_not_end_is_killed(write_script, tmp_path):
    script = write_script("""
if INDEX == 1:
    wait_for(FOLDER / "started")
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(FOLDER / "started").touch()
forever()
""")
    done = run("--workers", "2", "--grace-seconds", "0.2", script)
    assert done.returncode == 3
    assert done.stderr == (
        "keras_allreduce.launch: worker 1 ended with exit code 3 without "
        "output\n"
    )
    assert is_none_left(tmp_path / "alive")


@pytest.mark.slow
def test_a_frozen_worker_is_killed(write_script, tmp_path):
    script = write_script("""
if INDEX == 1:
    wait_for(FOLDER / "started")
    sys.exit(3)
(FOLDER / "started").touch()
os.kill(os.getpid(), signal.SIGSTOP)
""")
    done = run("--workers", "2", "--grace-seconds", "0.2", script)
    assert done.returncode == 3
    assert is_none_left(tmp_path / "alive")


@pytest.mark.slow
def test_a_death_by_signal_is_told_by_its_name(write_script):
    script = write_script("os.kill(os.getpid(), signal.SIGKILL)")
    done = run("--workers", "1", script)
    assert done.returncode == 128 + 9
    assert "worker 0 was ended by SIGKILL" in done.stderr


@pytest.mark.slow
def test_what_a_worker_started_ends_with_it(write_script, tmp_path):
    script = write_script("start_a_child()")
    done = run("--workers", "2", script)
    assert done.returncode == 0
    wait_until_none_is_left(tmp_path / "alive")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_reaches_every_worker(name, write_script, tmp_path):
    script = write_script("""
def tell(number, frame):
    print("got", signal.Signals(number).name)
    sys.exit(1)
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), tell)
forever()
""")
    number = getattr(signal, name)
    with running("--workers", "2", "--restarts", "2", script) as launcher:
        read_until(launcher, "[worker 0] ready", "[worker 1] ready")
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=DEADLINE_SECONDS)
        assert sorted(out.splitlines()) == [
            f"[worker 0] got {name}",
            f"[worker 1] got {name}",
        ]
        assert err == f"keras_allreduce.launch: ended by {name}\n"
        assert launcher.returncode == 128 + number
        assert is_none_left(tmp_path / "alive")


@pytest.mark.slow
def test_workers_that_end_well_on_a_signal_are_no_failure(write_script):
    script = write_script("""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
forever()
""")
    with running("--workers", "2", script) as launcher:
        read_until(launcher, "[worker 0] ready", "[worker 1] ready")
        launcher.terminate()
        _, err = launcher.communicate(timeout=DEADLINE_SECONDS)
        assert (launcher.returncode, err) == (0, "")


@pytest.mark.slow
def test_who_ignores_a_signal_is_killed(write_script, tmp_path):
    script = write_script("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
forever()
""")
    words = ["--workers", "2", "--grace-seconds", "0.2", script]
    with running(*words) as launcher:
        read_until(launcher, "[worker 0] ready", "[worker 1] ready")
        launcher.terminate()
        assert launcher.wait(DEADLINE_SECONDS) == 128 + signal.SIGTERM
        assert is_none_left(tmp_path / "alive")


FAILS_FIRST = """
tries = FOLDER / f"tries{INDEX}"
with open(tries, "a") as file:
    file.write(json.dumps(CONFIG["cluster"]["worker"]) + "\\n")
if len(tries.read_text().splitlines()) <= int(sys.argv[1]) and INDEX == 1:
    wait_for(FOLDER / "tries0")
    sys.exit("not yet")
"""


@pytest.mark.slow
def test_a_job_starts_again_with_new_ports(write_script, tmp_path):
    script = write_script(FAILS_FIRST)
    done = run("--workers", "2", "--restarts", "2", script, "1")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "[worker 1] not yet",
        "keras_allreduce.launch: worker 1 ended with exit code 1; the last "
        "lines of its output:",
        "[worker 1] not yet",
        "keras_allreduce.launch: the job starts again (restart 1 of 2)",
    ]
    tries = (tmp_path / "tries1").read_text().splitlines()
    first, second = (json.loads(one) for one in tries)
    assert len({*first, *second}) == 4


@pytest.mark.slow
def test_after_the_last_restart_the_failure_stays(write_script, tmp_path):
    script = write_script(FAILS_FIRST)
    done = run("--workers", "2", "--restarts", "1", script, "9")
    assert done.returncode == 1
    assert done.stderr.count("the job starts again") == 1
    assert done.stderr.endswith("lines of its output:\n[worker 1] not yet\n")
    assert len((tmp_path / "tries1").read_text().splitlines()) == 2


def test_a_job_that_is_told_to_end_does_not_start_again(write_script, tmp_path):
    script = write_script("""
tries = FOLDER / f"tries{INDEX}"
with open(tries, "a") as file:
    file.write("a try\\n")
if tries.read_text() != "a try\\n":
    sys.exit()  # It should not have started again; let that be seen at once.
if INDEX == 1:
    wait_for(FOLDER / "ready")
    sys.exit(3)
# It goes on after the failure of the other, until Ctrl+C.
signal.signal(signal.SIGTERM, lambda *_: print("told"))
signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
(FOLDER / "ready").touch()
forever()
""")
    words = ["--workers", "2", "--restarts", "2"]
    words += ["--grace-seconds", str(DEADLINE_SECONDS), script]
    with running(*words) as launcher:
        read_until(launcher, "[worker 0] told")
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=DEADLINE_SECONDS)
        assert launcher.returncode == 3
        assert "starts again" not in err
    assert (tmp_path / "tries0").read_text() == "a try\n"


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_nothing(write_script, tmp_path):
    script = write_script("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
start_a_child()
forever()
""")
    with running("--workers", "2", script) as launcher:
        read_until(
            launcher,
            "[worker 0] ready",
            "[worker 1] ready",
        )
        assert not is_none_left(tmp_path / "alive")
        launcher.kill()
        wait_until_none_is_left(tmp_path / "alive")


@pytest.mark.slow
def test_output_that_no_one_reads_does_not_end_the_job(write_script, tmp_path):
    script = write_script("""
print("ready")
wait_for(FOLDER / "closed")
for _ in range(10_000):
    print("a line that goes nowhere")
(FOLDER / "done").touch()
""")
    with running("--workers", "1", script) as launcher:
        read_until(launcher, "[worker 0] ready")
        launcher.stdout.close()
        (tmp_path / "closed").touch()
        assert launcher.wait(DEADLINE_SECONDS) == 0
        assert launcher.stderr.read() == ""
    assert (tmp_path / "done").exists()


@pytest.mark.slow
def test_the_module_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "keras_allreduce.launch", "--help"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 0
    assert "KERAS_ALLREDUCE_HOST_DEVICES=D" in done.stdout


def test_a_log_that_cannot_be_written_does_not_end_the_job(
    write_script, tmp_path
):
    (tmp_path / "logs" / "worker-0.log").mkdir(parents=True)
    script = write_script("print('out')")
    done = run("--workers", "1", "--output-dir", str(tmp_path / "logs"), script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[worker 0] out\n"
