"""Names of the environment variables that the package reads or writes."""

HOST_DEVICES = "KERAS_ALLREDUCE_HOST_DEVICES"
"""Number of logical CPU devices of each worker."""

DOOR = "KERAS_ALLREDUCE_DOOR"
"""Set to 0: no method of Keras is wrapped (see `compat/keras_door.py`)."""

HINT = "KERAS_ALLREDUCE_HINT"
"""Set to 0: no hint after the first epoch of `fit`."""

COLUMNS = "KERAS_ALLREDUCE_COLUMNS"
"""Columns of the terminal in which the launcher shows a worker's output."""

DEBUG = "KERAS_ALLREDUCE_DEBUG"
"""Set to 1: decisions and waits are logged to standard error."""

TF_CONFIG = "TF_CONFIG"
"""JSON with the addresses of all workers and the task of this one."""

JOB_TOKEN = "KERAS_ALLREDUCE_JOB_TOKEN"
"""Any text that the workers of one job share and no other job has."""

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""Tells CUDA which GPUs a process has."""

NCCL_SHARED_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"
"""Set to 1 if NCCL (from 2.30 on) may sum between workers on one GPU."""

LEGACY_KERAS = "TF_USE_LEGACY_KERAS"
"""Makes `tf.keras` Keras 2, the package tf_keras, if it is 1 or true."""
