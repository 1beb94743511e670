"""Five host devices for every test, so that no test needs a GPU.

Where there are GPUs, those of `test_on_gpus.py` run too, on two of them or on
one that is split in two.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
import tensorflow as tf

import keras_allreduce

DEVICES = keras_allreduce.host_devices(5)


def two_gpus():
    """Names of two GPUs, or of none."""
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) == 1:
        half = tf.config.LogicalDeviceConfiguration(memory_limit=4096)
        tf.config.set_logical_device_configuration(gpus[0], [half] * 2)
    return ["/gpu:0", "/gpu:1"] if gpus else []


GPUS = two_gpus()


@pytest.fixture(autouse=True)
def _same_start():
    keras.utils.set_random_seed(7)
    yield
    keras.utils.clear_session(free_memory=False)
