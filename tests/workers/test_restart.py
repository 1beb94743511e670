"""A job that is started again goes on from its backup as if nothing was."""

import numpy as np
import pytest
import warm_python

pytestmark = pytest.mark.nightly

# Every worker of the job. Without the file "died", worker 1 dies in the middle
# of the third epoch.
TRAIN = """
import os, signal, sys
from pathlib import Path

import keras
import numpy as np

import keras_allreduce

strategy = keras_allreduce.MultiWorkerAllReduceStrategy(timeout_seconds=600)
folder = Path(sys.argv[1])
died = folder / "died"
index = strategy.cluster_resolver.task_id

class Die(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        with open(folder / f"epochs{index}", "a") as file:
            file.write(f"{epoch} ")
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch, index) == (2, 1, 1) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

keras.utils.set_random_seed(1)
rng = np.random.default_rng(0)
x = rng.normal(size=(50, 6)).astype("float32")
y = rng.normal(size=(50, 1)).astype("float32")
with strategy.scope():
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input([6]), *layers])
    model.compile(keras.optimizers.Adam(0.01), "mse")
backup = keras.callbacks.BackupAndRestore(folder / f"backup{index}")
model.fit(
    x, y, batch_size=16, epochs=4, shuffle=False, verbose=0,
    callbacks=[backup, Die()],
)
np.savez(folder / f"weights{index}.npz", *model.get_weights())
"""


def train(folder):
    script = folder / "train.py"
    script.write_text(TRAIN)
    command = ["-m", "keras_allreduce.launch", "--workers", "2"]
    command += ["--restarts", "1", str(script), str(folder)]
    done = warm_python.run(command, forks=True)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = []
    for index in range(2):
        with np.load(folder / f"weights{index}.npz") as file:
            weights.append([file[name] for name in file.files])
    return weights, (folder / "epochs0").read_text().split()


def test_a_killed_job_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    interrupted, other = tmp_path / "interrupted", tmp_path / "uninterrupted"
    interrupted.mkdir()
    other.mkdir()
    (other / "died").touch()
    after_a_restart, epochs = train(interrupted)
    assert epochs == ["0", "1", "2", "2", "3"]
    uninterrupted, epochs = train(other)
    assert epochs == ["0", "1", "2", "3"]
    for got, expected in zip(after_a_restart, uninterrupted, strict=True):
        for one, wanted in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, wanted)
