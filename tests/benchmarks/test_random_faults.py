"""What `benchmarks/random_faults.py` finds wrong, and a few rounds of it."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deadlines import DEADLINE_SECONDS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "random_faults.py"

_spec = importlib.util.spec_from_file_location("random_faults", SCRIPT)
random_faults = importlib.util.module_from_spec(_spec)
sys.modules["random_faults"] = random_faults
_spec.loader.exec_module(random_faults)

OPTIONS = argparse.Namespace(timeout=20.0, margin=5.0)
RIGHT = np.arange(6.0).reshape(3, 2)
GONE = "All workers must stay until training ends. Received: worker 1 is gone"


def ended(code, line="", *, seconds=0.0, weights=None, connected=5.0):
    """An end so many seconds after the fault, which is at 10."""
    at = 10 + seconds
    if code == 0 and weights is None:
        weights = RIGHT
    return random_faults.End(code, at, at, line, weights, 1.0, connected)


def found(kind, *ends, happened=10.0, left=()):
    """What is wrong with a round whose victim is worker 1."""
    fault = random_faults.Fault(kind, 1, 0.5, 0.5)
    a_round = random_faults.Round(0.0, happened, list(ends), list(left))
    return list(random_faults.problems(fault, a_round, RIGHT, OPTIONS))


RIGHT_ENDS = {
    "a good round": ("link", ended(0), ended(0)),
    "killed": ("kill", ended(1, GONE, seconds=4), ended(-9)),
    "killed after the end": ("kill", ended(0), ended(0)),
    "frozen": ("freeze", ended(1, GONE, seconds=25), ended(1, GONE)),
    "sys.exit": (
        "exit",
        ended(1, f"{GONE}: SystemExit: 3"),
        ended(3),
    ),
    "killed before the other knew it": (
        "kill",
        ended(1, GONE, seconds=24, connected=None),
        ended(-9),
    ),
    "stopped early": ("early stop", ended(0), ended(0, weights=RIGHT[:2])),
    "rounding": ("threads", ended(0, weights=RIGHT + 1e-6), ended(0)),
}


@pytest.mark.parametrize("name", RIGHT_ENDS)
def test_a_round_that_ended_as_it_should_has_no_problem(name):
    assert found(*RIGHT_ENDS[name]) == []


WRONG_ENDS = {
    "a good job is ended": ("link", ended(0), ended(1, GONE)),
    "a hang": ("kill", ended(None), ended(-9)),
    "wrong weights": ("none", ended(0, weights=RIGHT + 1), ended(0)),
    "fewer epochs": ("none", ended(0, weights=RIGHT[:2]), ended(0)),
    "late, whatever it claims": (
        "kill",
        ended(1, f"{GONE} (has not answered for 20 s)", seconds=20),
        ended(-9),
    ),
    "no reason": ("kill", ended(1, "UnavailableError"), ended(-9)),
    "another is named": (
        "kill",
        ended(1, GONE.replace("worker 1", "worker 0")),
        ended(-9),
    ),
    "another code of the victim": ("exit", ended(1, GONE), ended(1, GONE)),
    "the code is not told": ("exit", ended(1, GONE), ended(3)),
    "the victim says something else": (
        "exception",
        ended(1, f"{GONE}: the fault"),
        ended(1, "KeyError"),
    ),
}


@pytest.mark.parametrize("name", WRONG_ENDS)
def test_a_round_that_ended_otherwise_has_one(name):
    assert len(found(*WRONG_ENDS[name])) >= 1


def test_a_process_that_is_left_is_a_problem():
    assert len(found("none", ended(0), ended(0), left=[0])) == 1


def test_a_third_of_all_rounds_is_good_and_each_kind_is_drawn():
    kinds = list(random_faults.KINDS)
    options = argparse.Namespace(
        seed=1, rounds=60, workers=3, kinds=kinds, slow=22.0
    )
    drawn = list(random_faults.faults(options))
    assert sum(each.how.is_good for each in drawn) == 20
    assert {each.kind for each in drawn} == set(kinds)
    assert {each.rank for each in drawn} == {0, 1, 2}
    assert all(20 <= each.megabits <= 1000 for each in drawn)
    assert drawn == list(random_faults.faults(options))


@pytest.mark.nightly
def test_workers_end_as_they_should_whatever_goes_wrong():
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--rounds",
            "3",
            "--kinds",
            "exit",
            "weights",
            "strategies",
            # How fast they say so is for the benchmark.
            *("--limit", str(DEADLINE_SECONDS)),
            *("--margin", str(DEADLINE_SECONDS)),
            *("--timeout", "60"),
        ],
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 3 rounds did not end as they should" in done.stdout
