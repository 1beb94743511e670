"""Every example runs and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# What each must print, in this order.
PRINTS = {
    "digits.py": [
        r"^Epoch 1/15$",
        r"^batch_all_reduce: 8 all-reduces with algorithm = \w+, "
        r"num_packs = \d+ \(\S+ [KM]iB float32\), num_replicas = \d+",
        r"accuracy: \S+ - loss: \S+ - all_reduce_ms: \S+ - overlap: \S+",
        r"^Epoch 15/15$",
        # At least 0.97, and the weights of one device.
        r"^test accuracy: (0\.9[7-9]|1\.0)",
        r"^largest weight difference from one device: \S+e-0[4-9]$",
    ],
}


def test_every_example_has_its_check():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_prints_what_it_promises(name):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert result.returncode == 0, result.stderr
    rest = re.sub(r"\x1b\[\d+m", "", result.stdout)
    for expected in PRINTS[name]:
        match = re.search(expected, rest, re.MULTILINE)
        assert match, f"{expected!r} is not in what follows: {rest}"
        rest = rest[match.end() :]
