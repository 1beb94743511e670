"""Five logical CPU devices for every test, so that no test needs a GPU.

Where there are GPUs, those of `test_on_gpus.py` run too, on two of them or on
one that is split in two.
"""

import command_line
import tensorflow as tf

import keras_allreduce

DEVICES = keras_allreduce.host_devices(5)


# Grows on real GPUs: workers of the tests share them.
GPUS = (
    command_line.devices(2, on_gpus=True)
    if tf.config.list_physical_devices("GPU")
    else []
)
