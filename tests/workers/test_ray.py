"""Ray Train starts the workers, and starts them again if one fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray_jobs
from deadlines import DEADLINE_SECONDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_train.py"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(bool(ray_jobs.missing()), reason=ray_jobs.missing()),
]


def run(folder, *options):
    """What the example prints, which runs in a new folder."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def weights(output):
    """Checksums of the final weights, by worker."""
    return dict(re.findall(r"worker (\d): weights ([0-9a-f]{8})", output))


def test_a_worker_that_fails_is_started_again_and_ends_as_undisturbed(
    tmp_path,
):
    disturbed = run(tmp_path / "disturbed", "--fail")
    assert "worker 1 fails once, as asked for" in disturbed
    # Both workers, with the checkpoint that the second epoch has left.
    again = re.findall(r"pid=(\d+).*goes on with epoch 3", disturbed)
    assert len(set(again)) == 2
    undisturbed = weights(run(tmp_path / "undisturbed"))
    assert set(undisturbed) == {"0", "1"}
    assert len(set(undisturbed.values())) == 1
    assert weights(disturbed) == undisturbed
    assert list((tmp_path / "disturbed").rglob("model.keras"))
