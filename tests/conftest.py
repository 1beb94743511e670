"""Five host devices for every test, so that no test needs a GPU."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

import keras_allreduce

DEVICES = keras_allreduce.host_devices(5)


@pytest.fixture(autouse=True)
def _same_start():
    keras.utils.set_random_seed(7)
    yield
    keras.utils.clear_session(free_memory=False)
