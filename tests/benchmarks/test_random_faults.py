"""A few rounds of `benchmarks/random_faults.py`, which can run for hours."""

import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import DEADLINE_SECONDS

pytestmark = pytest.mark.nightly

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "random_faults.py"


def test_workers_end_as_they_should_whatever_goes_wrong():
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--faults",
            "3",
            "--kinds",
            "kill",
            "weights",
            "garbage",
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
