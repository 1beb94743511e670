"""Runs the scripts that the documents show, on two workers."""

import ast
import os
import re

import numpy as np
import warm_python

# What the snippets expect of the reader's own script. 84 samples: with 40 in a
# batch the last one has 4, and 5 replicas.
PRELUDE = """
import numpy as np

def load_data():
    x = np.random.default_rng(0).normal(size=(84, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)

def build_model():
    return keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1)])
"""

REPORT = """
print("weights", [w.ravel().tolist() for w in model.get_weights()], flush=True)
"""


def run_workers(tmp_path, code, *, per_worker=None):
    """Output of two workers with the code, each its own lines."""
    script = tmp_path / "train.py"
    script.write_text(code)
    command = [str(script)]
    each = per_worker or [{}]
    if per_worker is None:
        command[:0] = ["-m", "keras_allreduce.launch", "--workers", "2"]
    outputs = [tmp_path / f"output{index}" for index in range(len(each))]
    processes = [
        warm_python.Process(
            command,
            folder=tmp_path,
            environment={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", **added},
            stdout=output,
            stderr=output,
            forks=True,
        )
        for added, output in zip(each, outputs, strict=True)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [output.read_text() for output in outputs]
    assert not any(codes), said
    return "\n".join(said)


def weights_in(output):
    return [
        ast.literal_eval(text)
        for text in re.findall(r"weights (\[\[.*\]\])", output)
    ]


def assert_two_the_same(weights):
    assert len(weights) == 2
    assert weights[0] == weights[1]
    assert all(np.all(np.isfinite(each)) for each in weights[0])
