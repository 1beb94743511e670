"""Bad input ends at the door: the rule, what was received, what to do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import warm_python
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy, BatchAllReduce, host_devices

DEVICE_LISTS = {
    "mixed": (
        ["/gpu:0", "/cpu:0"],
        r"All devices must be of one kind, GPU or CPU\. Received: "
        r"devices=\['/gpu:0', '/cpu:0'\]\. Pass those of one kind\.",
    ),
    "twice": (
        ["/cpu:0", "/cpu:1", "/cpu:0"],
        r"Every device can hold one replica only\. Received: devices=.*"
        r"which names one twice\.",
    ),
    "twice under two names": (
        ["/cpu:1", "/device:CPU:1"],
        r"Every device can hold one replica only\. Received: devices=.*"
        r"which names one twice\.",
    ),
    "empty": (
        [],
        r"must name at least one device\. Received: devices=\[\]\. Leave it "
        r"out to use all GPUs\.",
    ),
    "a logical CPU device too many": (
        ["/cpu:0", "/cpu:5"],
        r"Every device must be there\. Received: '/cpu:5', but TensorFlow "
        r"sees 5 of kind CPU\. keras_allreduce\.host_devices\(6\) makes",
    ),
    "a GPU too many": (
        ["/gpu:98", "/gpu:99"],
        r"Every device must be there\. Received: '/gpu:98', but TensorFlow "
        r"sees \d+ of kind GPU\. tf\.config\.list_logical_devices\('GPU'\)",
    ),
    "another kind": (
        ["/tpu:0"],
        r"A device name says GPU or CPU and a number, such as '/gpu:0'\. "
        r"Received: '/tpu:0'",
    ),
    "no device name": (
        ["/cpu:0", "the other one"],
        r"A device name says GPU or CPU and a number, such as '/gpu:0'\. "
        r"Received: 'the other one'",
    ),
    "no name at all": (
        [""],
        r"A device name says GPU or CPU and a number, such as '/gpu:0'\. "
        r"Received: ''",
    ),
}


@pytest.mark.parametrize(
    ("devices", "message"), DEVICE_LISTS.values(), ids=DEVICE_LISTS.keys()
)
def test_devices_a_strategy_cannot_train_on(devices, message):
    with pytest.raises(ValueError, match=message):
        AllReduceStrategy(devices)


@pytest.mark.parametrize(
    "devices",
    ["/cpu:0", [0, 1], [None], 2],
    ids=["a string", "numbers", "None", "a number"],
)
def test_devices_must_be_a_list_of_names(devices):
    with pytest.raises(
        TypeError,
        match=r"`devices` must be a list of device names, such as "
        r"\['/gpu:0', '/gpu:1'\], or of what "
        r"tf\.config\.list_logical_devices returns\. Received: devices=",
    ):
        AllReduceStrategy(devices)


@pytest.mark.parametrize(
    "devices",
    [("/cpu:0", "/cpu:1"), ["cpu:0", "/device:CPU:1"], ["/cpu:0"]],
    ids=["a tuple", "other spellings", "one"],
)
def test_devices_a_strategy_can_train_on(devices):
    strategy = AllReduceStrategy(devices)
    assert strategy.num_replicas_in_sync == len(devices)


@pytest.mark.parametrize(
    "kind", [list, tuple, iter], ids=lambda kind: kind.__name__
)
def test_devices_are_also_what_tensorflow_lists(kind):
    listed = tf.config.list_logical_devices("CPU")[:3]
    strategy = AllReduceStrategy(kind(listed))
    assert [
        tf.DeviceSpec.from_string(device).device_index
        for device in strategy.extended.worker_devices
    ] == [0, 1, 2]


def test_no_devices_means_all_gpus_or_else_all_host_devices():
    gpus = tf.config.list_logical_devices("GPU")
    assert AllReduceStrategy().num_replicas_in_sync == len(gpus or DEVICES)


BAD_ARGUMENTS = {
    "algorithm": (
        {"algorithm": "gloo"},
        r"`algorithm` must be one of auto, nccl, ring, shared_memory\. "
        r"Received: algorithm='gloo'",
    ),
    "nccl on logical CPU devices": (
        {"algorithm": "nccl"},
        r"algorithm='nccl' runs between GPUs only\. Received: devices=.*CPU:0"
        r".*\. Use algorithm='auto'\.",
    ),
    "negative size": (
        {"bytes_per_pack": -1},
        r"`bytes_per_pack` must be a number of bytes, 0 or more \(0: chosen "
        r"for you\)\. Received: bytes_per_pack=-1",
    ),
    "fractional size": (
        {"bytes_per_pack": 1e6},
        r"`bytes_per_pack` must be a number of bytes, .* Received: "
        r"bytes_per_pack=1000000\.0",
    ),
    "cross_device_ops and algorithm": (
        {"cross_device_ops": BatchAllReduce(), "algorithm": "ring"},
        r"Pass either `cross_device_ops` or the arguments of the built-in "
        r"one\. Received: cross_device_ops=.*, algorithm='ring', .*Use "
        r"cross_device_ops=BatchAllReduce\(\.\.\.\)",
    ),
    "cross_device_ops and bytes_per_pack": (
        {"cross_device_ops": BatchAllReduce(), "bytes_per_pack": 8},
        r"Pass either `cross_device_ops` or .*bytes_per_pack=8",
    ),
    "cross_device_ops and sparse_as_dense": (
        {"cross_device_ops": BatchAllReduce(), "sparse_as_dense": True},
        r"Pass either `cross_device_ops` or .*sparse_as_dense=True",
    ),
    "cross_device_ops with nccl": (
        {"cross_device_ops": BatchAllReduce("nccl")},
        r"algorithm='nccl' runs between GPUs only\. Received: devices=.*CPU:0",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys()
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        AllReduceStrategy(DEVICES[:2], **arguments)


def test_another_backend_of_keras_is_an_error(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(
        ValueError,
        match=r"needs the TensorFlow backend of Keras\. Received: "
        r"backend='jax'\. Set KERAS_BACKEND=tensorflow\.",
    ):
        AllReduceStrategy(DEVICES[:2])


def make_model():
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])


X, Y = np.ones([4, 3], "float32"), np.ones([4, 1], "float32")

OUTSIDE = (
    r"A model must be made and compiled inside the scope of the strategy that "
    r"trains it\. Received: variable '\S+' of the {what}, made outside\. Put "
    r"`with strategy\.scope\(\):` around both"
)


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_model_made_and_trained_outside_but_compiled_inside(
    replicas, optimizer, is_built
):
    strategy = AllReduceStrategy(DEVICES[:replicas])
    model = make_model()
    what = r"variable '\S+/kernel' of the model"
    if not is_built:
        model = keras.Sequential([keras.layers.Dense(1)], name="mine")
        what = "model 'mine'"
    with strategy.scope():
        model.compile(optimizer, "mse")
    rule = (
        "A model must be made and compiled inside the scope of the strategy "
        rf"that trains it\. Received: {what}, made outside\. Put "
    )
    with pytest.raises(ValueError, match=rule):
        model.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match=rule):
        model.train_on_batch(X, Y)
    # Nothing is updated in it.
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)


def test_a_model_made_in_the_scope_of_another_strategy():
    stock = tf.distribute.MirroredStrategy(
        DEVICES[:2], tf.distribute.ReductionToOneDevice()
    )
    with stock.scope():
        layer = keras.layers.Dense(1)
        layer.build([None, 3])
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = keras.Sequential([keras.Input([3]), layer])
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match=OUTSIDE.format(what="model")):
            model.fit(X, Y, verbose=0)


def test_an_optimizer_built_outside_the_scope():
    optimizer = keras.optimizers.Adam()
    optimizer.build(make_model().trainable_variables)
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = make_model()
        model.compile(optimizer, "mse")
        with pytest.raises(ValueError, match=OUTSIDE.format(what="optimizer")):
            model.fit(X, Y, verbose=0)


def test_xla_compiles_a_step_of_one_replica():
    with AllReduceStrategy(DEVICES[:1]).scope():
        model = make_model()
        model.compile("sgd", "mse", jit_compile=True)
    model.fit(X, Y, verbose=0)


class TestHostDevices:
    def test_it_names_as_many_as_asked_for(self):
        assert host_devices(1) == ["/cpu:0"]
        assert host_devices(3) == ["/cpu:0", "/cpu:1", "/cpu:2"]

    def test_a_second_call_does_not_take_devices_away(self):
        host_devices(2)
        assert len(tf.config.list_logical_devices("CPU")) == len(DEVICES)

    @pytest.mark.parametrize("count", [0, -2, 1.5, "2", None, True])
    def test_the_number_must_be_a_positive_integer(self, count):
        with pytest.raises(
            ValueError,
            match=r"number of logical CPU devices must be a positive integer\. "
            rf"Received: count={count!r}",
        ):
            host_devices(count)

    def test_more_than_tensorflow_has_started_with_is_an_error(self):
        with pytest.raises(
            RuntimeError,
            match=r"Host devices must be made before TensorFlow is first "
            r"used\. Received: host_devices\(6\), but TensorFlow has already "
            r"started with 5\. Call it right after the imports\.",
        ):
            host_devices(6)

    @pytest.mark.slow
    def test_two_calls_before_tensorflow_starts_give_the_larger(self):
        script = (
            "import keras_allreduce, tensorflow as tf\n"
            "keras_allreduce.host_devices(2)\n"
            "keras_allreduce.host_devices(4)\n"
            "keras_allreduce.host_devices(3)\n"
            "print(len(tf.config.list_logical_devices('CPU')))\n"
        )
        result = warm_python.run(["-c", script])
        assert result.stdout.strip() == "4"


@pytest.mark.slow
def test_a_worker_takes_one_cpu_unless_several_are_asked_for():
    script = (
        "import sys\n"
        "import keras_allreduce, tensorflow as tf\n"
        "host = tf.config.list_physical_devices('CPU')[0]\n"
        "cpus = [tf.config.LogicalDeviceConfiguration()] * 3\n"
        "tf.config.set_logical_device_configuration(host, cpus)\n"
        "if 'asked' in sys.argv:\n"
        "    keras_allreduce.host_devices(2)\n"
        "strategy = keras_allreduce.MultiWorkerAllReduceStrategy()\n"
        "print(strategy.num_replicas_in_sync)\n"
    )
    for asked, replicas in ([], "1"), (["asked"], "2"):
        result = warm_python.run(["-c", script, *asked])
        assert result.stdout.strip() == replicas, result.stderr
