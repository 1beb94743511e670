"""A run of `benchmarks/start_up.py`."""

import re
import subprocess
import sys

import pytest
import start_up
from deadlines import DEADLINE_SECONDS


@pytest.mark.nightly
def test_the_start_of_two_workers_is_measured_beside_that_of_each_alone():
    table = subprocess.run(
        [sys.executable, start_up.__file__, "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_SECONDS,
        check=True,
    ).stdout
    row = re.search(r"^\| 2 \| ([\d.]+) s .* \| ([\d.]+) s .* \|$", table, re.M)
    assert row is not None, table
    assert all(float(seconds) > 0 for seconds in row.groups())
