"""How functions are optimized, and that they can be called anew."""

import os
import re
import subprocess
import sys

import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce.compat import functions, versions

ROUNDS = 1 if versions.optimizes_twice_for_nothing(tf.__version__) else 2
PASSES = ("layout", "memory_optimizer", "remapper")

STEP = """
import contextlib
import numpy as np, keras, keras_allreduce
from keras_allreduce.compat import functions
if "{how}" == "stock":
    functions.brief = contextlib.nullcontext
with keras_allreduce.AllReduceStrategy(keras_allreduce.host_devices(2)).scope():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile("adam", "mse")
model.fit(np.ones([4, 3]), np.ones([4, 1]), batch_size=4, verbose=0)
"""


def passes_over_the_step(how):
    """How often Grappler makes some of its passes over a step of fit."""
    environment = os.environ | {
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "meta_optimizer=1",
        "KERAS_ALLREDUCE_HINT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(how=how)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"] (\w+): Graph size after: (\d+)", done.stderr)
    # Other graphs of a fit have some ten ops.
    large = [name for name, ops in found if int(ops) > 100]
    return [large.count(name) for name in PASSES]


def test_grappler_makes_few_passes_over_a_step():
    assert passes_over_the_step("ours") == [0, 0, ROUNDS]
    assert passes_over_the_step("stock") == [1, 1, 2]


@pytest.mark.parametrize(
    ("devices", "is_brief"),
    [
        (["/device:CPU:0", "/device:CPU:1"], True),
        (["/job:worker/replica:0/task:1/device:CPU:0"], True),
        (["/device:GPU:0", "/device:GPU:1"], False),
    ],
)
def test_on_gpus_grappler_makes_all_passes(devices, is_brief):
    assert functions.is_brief_on(devices) == is_brief


def options():
    config = functions._context.context().function_call_options
    return tf.compat.v1.ConfigProto.FromString(
        config.config_proto_serialized
    ).graph_options.rewrite_options


def test_options_are_put_back_and_those_of_the_user_stay():
    before = tf.config.optimizer.get_experimental_options()
    try:
        tf.config.optimizer.set_experimental_options({"layout_optimizer": True})
        own = options()
        with functions.brief():
            brief = options()
        assert options() == own
        assert brief.layout_optimizer == own.ON
        rounds = own.ONE if ROUNDS == 1 else own.DEFAULT_NUM_ITERS
        assert brief.meta_optimizer_iterations == rounds
        assert brief.memory_optimization == own.NO_MEM_OPT
        assert own.meta_optimizer_iterations == own.DEFAULT_NUM_ITERS
        with functions.brief():
            tf.config.optimizer.set_experimental_options({"remapping": False})
        assert options().remapping == own.OFF
        assert options().meta_optimizer_iterations == own.DEFAULT_NUM_ITERS
    finally:
        tf.config.optimizer.set_experimental_options(before)


def test_a_function_is_called_with_other_variables_on_their_device():
    first, second = [], []
    for device, variables in zip(DEVICES, (first, second), strict=False):
        with tf.device(device):
            variables += [tf.Variable(1.0), tf.Variable(5.0)]

    def add(number):
        with tf.device(first[0].device):
            first[0].assign_add(number * first[1])

    traced = functions.traced_anywhere(add, [tf.constant(2.0)])
    assert [op.device for op in traced.graph.get_operations() if op.device] == (
        []
    )
    others = {
        id(a.handle): b.handle for a, b in zip(first, second, strict=True)
    }

    @tf.function
    def step():
        captures = [others[id(each)] for each in traced.captured_inputs]
        with tf.device(second[0].device):
            functions.call(traced, [tf.constant(3.0)], captures)

    step()
    assert [float(each) for each in (*first, *second)] == [1, 5, 16, 5]
