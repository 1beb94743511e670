"""What is compiled of the steps of Keras, and what is said about it."""

import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from clusters import Clustered, trained
from five_devices import DEVICES

import keras_allreduce

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=[24, 6]).astype("float32")


def layers(count):
    """A model of layers whose gradients travel alone."""
    return keras.Sequential(
        [
            keras.Input([6]),
            *[keras.layers.Dense(64, "relu") for _ in range(count)],
            keras.layers.Dense(1),
        ]
    )


def compiled(make, optimizer="adam", **options):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2], **options)
    with strategy.scope():
        model = make()
        model.compile(optimizer, "mse", jit_compile=True)
    return strategy, model


class TestPrograms:
    def test_all_matmuls_of_fit_are_in_programs(self):
        clustered = Clustered.of(lambda: trained(jit_compile=True))
        assert clustered.share == 1
        assert 2 <= clustered.programs <= 12

    def test_of_evaluate_and_predict_too(self):
        model = trained(jit_compile=True)

        def run():
            model.evaluate(X, X[:, :1], verbose=0)
            model.predict(X, verbose=0)

        assert Clustered.of(run).share == 1

    def test_none_are_without(self):
        clustered = Clustered.of(lambda: trained(jit_compile=False))
        assert clustered.programs == 0
        assert clustered.share == 0

    def test_the_update_of_a_replica_is_one_program(self):
        """Adam's square roots, of which there would be one per variable."""
        clustered = Clustered.of(lambda: trained(jit_compile=True))
        assert clustered.traced["Sqrt"]
        assert not clustered.outside["Sqrt"]


class TestFitOutput:
    def test_the_plan_says_in_how_many_parts(self, capsys):
        _, model = compiled(lambda: layers(4), bytes_per_pack=2**12)
        model.fit(X, X[:, :1], batch_size=8, verbose=2)
        assert ", compiled by XLA in 4 parts" in capsys.readouterr().out

    def test_explain_says_the_same(self):
        strategy, model = compiled(lambda: layers(4), bytes_per_pack=2**12)
        shown = []
        strategy.explain(model, print_fn=shown.append)
        assert "Compiled by XLA: in 4 parts" in shown[0]
        assert ", compiled by XLA in 4 parts" in str(strategy.plan(model))

    def test_neither_does_without(self):
        strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
        with strategy.scope():
            model = layers(1)
            model.compile("adam", "mse")
        assert "XLA" not in str(strategy.plan(model))

    def test_the_clocks_see_every_step(self):
        strategy, model = compiled(lambda: layers(2))
        model.fit(X, X[:, :1], batch_size=8, epochs=2, verbose=0)
        stats = strategy.all_reduce_stats()
        assert stats.steps == 5
        assert stats.all_reduce_ms > 0
        assert 0 <= stats.overlap <= 1


def test_replicas_have_the_same_bits():
    model = trained(jit_compile=True, replicas=3, steps=4)
    for weight in (*model.weights, *model.optimizer.variables):
        first, *others = (part.numpy() for part in weight.value.values)
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_a_step_that_xla_can_hardly_compile_is_warned_about():
    class Loop(keras.layers.Layer):
        def call(self, x):
            def body(index, y):
                for _ in range(20):
                    y = keras.ops.tanh(y) * 0.5 + 0.1
                return index + 1, y

            return keras.ops.while_loop(lambda i, y: i < 3, body, (0, x))[1]

    _, model = compiled(
        lambda: keras.Sequential([keras.Input([6]), Loop(), *layers(1).layers])
    )
    with pytest.warns(UserWarning, match="of whose ops XLA compiles") as caught:
        model.fit(X, X[:, :1], batch_size=8, verbose=0)
    (warning,) = (w for w in caught if "XLA compiles" in str(w.message))
    assert "such as" in str(warning.message)


SHAPES = """
import pathlib, sys
import keras, numpy as np
import keras_allreduce

strategy = keras_allreduce.AllReduceStrategy(keras_allreduce.host_devices(2))
with strategy.scope():
    model = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)]
    )
    model.compile("adam", "mse", jit_compile=True)

class Counts(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        programs = pathlib.Path(sys.argv[1]).glob("*before_optimizations.txt")
        print("programs:", len(list(programs)))

x = np.random.default_rng(0).normal(size=[19, 6])
model.fit(x, x[:, :1], batch_size=8, epochs=5, verbose=0, callbacks=[Counts()])
"""


@pytest.mark.nightly
def test_a_smaller_last_batch_is_compiled_once_not_in_every_epoch(tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", SHAPES, str(tmp_path)],
        env=os.environ
        | {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout
    counts = [int(each) for each in re.findall(r"programs: (\d+)", output)]
    assert len(counts) == 5
    assert 0 < counts[0] < counts[2]
    assert counts[2] == counts[-1]
