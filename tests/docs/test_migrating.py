"""The scripts of docs/migrating.md, clusters.md and kubernetes.yaml run."""

import ast
import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from scripts_of_docs import (
    PRELUDE,
    REPORT,
    assert_two_the_same,
    run_workers,
    weights_in,
)

import keras_allreduce
from keras_allreduce.launch.options import environments, parse

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
MIGRATING = (DOCS / "migrating.md").read_text(encoding="utf-8")
CLUSTERS = (DOCS / "clusters.md").read_text(encoding="utf-8")

BLOCKS = dict(
    re.findall(
        r"<!-- runs: ([a-z ]+) -->\n```\w+\n(.*?)```", MIGRATING, re.DOTALL
    )
)
DIFFS = ["one machine", "several machines", "horovod"]


def side(block, without):
    """One side of a diff: without the lines that begin with `without`."""
    lines = block.splitlines()
    return "\n".join(line[1:] for line in lines if line[:1] != without)


def fenced(text, heading, language):
    """The first block of a language below a heading."""
    _, section = text.split(f"## {heading}\n", 1)
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.parametrize("name", DIFFS)
def test_both_sides_of_a_diff_are_whole_scripts(name):
    before, after = side(BLOCKS[name], "+"), side(BLOCKS[name], "-")
    ast.parse(before)
    ast.parse(after)
    assert "tf.distribute" in before or "hvd." in before
    assert "keras_allreduce" in after
    assert "tf." not in after
    assert "hvd" not in after


@pytest.mark.nightly
def test_the_script_of_one_machine_trains_as_one_device():
    code = PRELUDE + side(BLOCKS["one machine"], "-")
    one_device = re.sub(r"(?m)^with .*", "if True:", code)
    found = []
    for each in (code, one_device):
        keras.utils.set_random_seed(7)
        names = {}
        exec(compile(each, "migrating.md", "exec"), names)
        found.append(names["model"].get_weights())
    for got, expected in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_the_script_of_several_machines_also_trains_alone(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    names = {}
    code = PRELUDE + side(BLOCKS["several machines"], "-")
    exec(compile(code, "migrating.md", "exec"), names)
    saved = keras.models.load_model("model.keras").get_weights()
    for got, expected in zip(saved, names["model"].get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.nightly
def test_the_script_from_horovod_trains_two_workers(tmp_path):
    code = side(BLOCKS["horovod"], "-")
    values = BLOCKS["values"] + (
        "rank = float(strategy.cluster_resolver.task_id)\n"
        "print('values', [v.numpy().tolist() for v in"
        " over_all(tf.constant(rank + 1))])\n"
    )
    output = run_workers(tmp_path, PRELUDE + code + REPORT + values)
    assert_two_the_same(weights_in(output))
    assert output.count("values [1.5, [1.0, 2.0], 1.0]") == 2
    assert "Epoch 4/4" in output
    assert {path.name for path in tmp_path.glob("model-*")} == {
        f"model-{epoch}.keras" for epoch in (1, 2, 3, 4)
    }


def rates_of(batches, epochs=5, more=(), steps_per_execution=1, **warm_up):
    """Rate of each execution: 3 epochs of warm-up to 4 times the rate."""
    names = {"keras": keras}
    code = side(BLOCKS["horovod"], "-")
    exec(re.search(r"class WarmUp.*?(?=\n\n\n)", code, re.DOTALL)[0], names)
    seen = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(self.model.optimizer.learning_rate))

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(
        keras.optimizers.SGD(0.04),
        "mse",
        steps_per_execution=steps_per_execution,
    )
    warm_up = names["WarmUp"](0.04, 4, epochs=3, **warm_up)
    model.fit(
        batches,
        epochs=epochs,
        callbacks=[warm_up, Rates(), *more],
        verbose=0,
    )
    return seen


def batches(steps):
    ones = np.ones([2 * steps, 1], "float32")
    return tf.data.Dataset.from_tensor_slices((ones, ones)).batch(2)


RISING = [0.015, 0.02, 0.025, 0.03, 0.035, 0.04]


def test_the_warm_up_is_horovods_and_leaves_the_rate_to_others_then():
    # The loss never falls by 10, so each epoch after the first is a plateau.
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=2, min_delta=10
    )
    seen = rates_of(batches(2), more=[plateau])
    assert seen[:6] == pytest.approx(RISING)
    assert seen[6:] == pytest.approx([0.02, 0.02, 0.02, 0.02])


def test_the_warm_up_reaches_the_rate_in_executions_of_many_steps():
    seen = rates_of(batches(7), steps_per_execution=8)
    first = 0.01 * (1 + 1 / 7)
    expected = [first, first + 0.01, first + 0.02, 0.04, 0.04]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps_per_epoch", "first_epoch"),
    [(None, [0.01, 0.01]), (2, RISING[:2])],
    ids=["counted", "passed"],
)
def test_the_warm_up_needs_no_known_number_of_steps(
    steps_per_epoch, first_epoch
):
    unknown = batches(2).filter(lambda *batch: True)
    seen = rates_of(unknown, epochs=4, steps_per_epoch=steps_per_epoch)
    expected = [*first_epoch, *RISING[2:], 0.04, 0.04]
    assert seen == pytest.approx(expected)


def test_the_arguments_that_are_named_exist():
    known = set()
    for each in (
        keras_allreduce.AllReduceStrategy,
        keras_allreduce.MultiWorkerAllReduceStrategy,
    ):
        known |= set(inspect.signature(each).parameters)
    for name in (
        "algorithm",
        "bytes_per_pack",
        "cluster_resolver",
        "communication_options",
        "cross_device_ops",
        "devices",
        "sparse_as_dense",
        "timeout_seconds",
        "weigh_samples",
        "wire_dtype",
    ):
        assert f"`{name}" in MIGRATING
        assert name in known


def launched(script, tmp_path, environment):
    """Runs a shell script with a `python` that only notes its arguments."""
    for name, text in {
        "python": 'printf "%s\\n" "$*"',
        # It runs the command on each node, as Slurm does.
        "srun": 'shift 2; SLURM_NODEID=0 "$@"; SLURM_NODEID=1 "$@"',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    result = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
    )
    return result.stdout.splitlines()


def tf_config(line, tmp_path, monkeypatch):
    """What the launcher tells the worker it starts with this command line."""
    module, *arguments = shlex.split(line)[1:]
    assert module == "keras_allreduce.launch"
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    options = parse(arguments)
    (environment,) = environments(options, options.hosts).values()
    return ast.literal_eval(environment["TF_CONFIG"])


def test_the_slurm_script_starts_the_script_on_each_node(tmp_path):
    script = fenced(CLUSTERS, "Slurm", "bash")
    lines = launched(script, tmp_path, {"SLURM_CPUS_PER_TASK": "16"})
    assert lines == ["train.py", "train.py"]


def test_the_kubernetes_job_starts_one_worker_in_each_pod(
    tmp_path, monkeypatch
):
    manifest = (DOCS / "kubernetes.yaml").read_text(encoding="utf-8")
    hosts = re.search(r"name: HOSTS.*\n +value: (.*)", manifest)[1]
    script = " ".join(manifest.split("- >-\n")[1].split())
    for index in range(2):
        (line,) = launched(
            script,
            tmp_path,
            {"HOSTS": hosts, "JOB_COMPLETION_INDEX": str(index)},
        )
        assert tf_config(line, tmp_path, monkeypatch) == {
            "cluster": {
                "worker": ["train-0.train:12345", "train-1.train:12345"]
            },
            "task": {"type": "worker", "index": index},
        }
