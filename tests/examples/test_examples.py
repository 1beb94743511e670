"""Every example runs and prints what it promises."""

import importlib.util
import re
from pathlib import Path

import pytest
import warm_python

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"

# What each must print, in this order.
PRINTS = {
    "digits.py": [
        r"^Epoch 1/15$",
        r"^batch_all_reduce: 8 all-reduces with algorithm = \w+, "
        r"num_packs = \d+ \(\S+ [KM]iB float32\), num_replicas = \d+",
        r"accuracy: \S+ - loss: \S+ - all_reduce: \S+s - overlap: \d+%",
        r"^Epoch 15/15$",
        # At least 0.97, and the weights of one device.
        r"^test accuracy: (0\.9[7-9]|1\.0)",
        r"^largest weight difference from one device after one epoch: "
        r"\S+e-0[6-9]$",
    ],
    "powersgd.py": [
        r"num_replicas = 2; between 2 workers over gRPC, .* as powersgd rank 2",
        r"loss: \S+ - all_reduce: \S+s - overlap: \d+%",
        r"weights (\[\[.*\]\])\n(.*\n)*?.*weights ",
    ],
    "ray_train.py": [
        r"num_replicas = 2; between 2 workers over gRPC",
        r"accuracy: 0\.9\d+ - loss: \S+ - all_reduce: \S+s - overlap: \d+%",
        # The same on both workers.
        r"worker (\d): weights ([0-9a-f]{8})\n(.*\n)*?"
        r".*worker (?!\1)\d: weights \2$",
    ],
    "readme.py": [
        r"^Epoch 1/3$",
        r"^batch_all_reduce: 8 all-reduces with algorithm = shared_memory, "
        r"num_packs = 5 \(2\.2 MiB float32\), num_replicas = 2$",
        r"loss: \S+ - all_reduce: \S+s - overlap: \d+%",
        r"^Epoch 3/3$",
    ],
    "custom_training_loop.py": [
        r"^epoch 1: loss \S+, all_reduce_ms \S+, overlap \S+, \S+ GB/s "
        r"over 29 steps of \d+ packs$",
        r"^epoch 5: .* over 30 steps of \d+ packs$",
        r"^test accuracy: (0\.9\d|1\.0)",
    ],
    "slow_fit.py": [
        r'^Model: "sequential"$',
        r"^ All-reduce: \w+ over \d+ replicas$",
        r"all_reduce: \S+s - overlap: \d+%",
        r"^replica 0, in a step:$",
        r"^ +\S+ ms  forward and backprop$",
        r"^most of its waiting: wait for input$",
    ],
    "two_workers.py": [
        r"^Epoch 1/5$",
        r"num_replicas = 2\b",
        r"accuracy: \S+ - loss: \S+ - all_reduce: \S+s - overlap: \d+%",
        r"^Epoch 5/5$",
        r"^test accuracy: 0\.9\d",
        r"^weights: [0-9a-f]{8}$",
        r"^both workers have the same weights: True$",
    ],
}

# Started by the launcher, with two workers.
LAUNCHED = {"powersgd.py"}

# Packages that the test suite does not install. CI skips these examples.
NEEDS = {"ray_train.py": ("ray", 'pip install "ray[train]"')}


def test_every_example_has_its_check():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name == "readme.py" else pytest.mark.nightly
        )
        for name in PRINTS
    ],
)
def test_an_example_prints_what_it_promises(name, tmp_path):
    if name in NEEDS:
        package, command = NEEDS[name]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name} needs {package}: {command}")
    launcher = ["-m", "keras_allreduce.launch", "--workers", "2"]
    result = warm_python.run(
        [*(launcher if name in LAUNCHED else []), str(EXAMPLES / name)],
        folder=tmp_path,
        forks=True,
    )
    assert result.returncode == 0, result.stderr
    rest = re.sub(r"\x1b\[\d+m", "", result.stdout)
    for expected in PRINTS[name]:
        match = re.search(expected, rest, re.MULTILINE)
        assert match, f"{expected!r} is not in what follows: {rest}"
        rest = rest[match.end() :]


def test_the_example_of_the_readme_is_the_one_that_runs():
    code = (EXAMPLES / "readme.py").read_text().split('"""')[2].strip()
    assert f"```python\n{code}\n```" in (REPOSITORY / "README.md").read_text()
