"""Data-parallel Keras training that shows what its all-reduce costs."""

from keras_allreduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.checks import host_devices
from keras_allreduce.fit_log import AllReduceLogger
from keras_allreduce.multi_worker import MultiWorkerAllReduceStrategy
from keras_allreduce.stats import ReduceStats
from keras_allreduce.strategy import AllReduceStrategy
from keras_allreduce.version import __version__ as __version__

__all__ = [
    "AllReduceLogger",
    "AllReduceStrategy",
    "BatchAllReduce",
    "MultiWorkerAllReduceStrategy",
    "ReduceStats",
    "host_devices",
]
