"""Moving statistics that all workers share.

A layer that gathers statistics, such as BatchNormalization, updates them on
each replica from its own samples. In one process all see those of replica 0;
workers would each go on with their own, and validate, save and predict with
different models. So after each step every replica gets the mean.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce.reduce import packing, scaling


def share(variables: Sequence[Any], shares: Any, strategy: Any) -> None:
    """Gives every replica of all workers the mean of what each has gathered.

    Args:
        variables: Keras variables of floating dtypes that each replica has
            updated on its own.
        shares: Distributed value with each replica's share of the batch, times
            the number of replicas: its weight in the mean. `None`: all weigh
            the same.
        strategy: Their strategy.
    """
    devices = strategy.extended.worker_devices
    weights = shares.values if shares is not None else [None] * len(devices)
    by_dtype: dict[Any, list[Any]] = {}
    for variable in variables:
        by_dtype.setdefault(variable.value.dtype, []).append(variable.value)
    for dtype, values in by_dtype.items():
        with tf.device("/cpu:0"):
            weighed = [
                scaling.scale(packing.pack(_parts(values, index)), weight)
                for index, weight in enumerate(weights)
            ]
            total = strategy.extended.sum_over_workers(
                tf.add_n(weighed), "statistics"
            )
            count = tf.cast(strategy.num_replicas_in_sync, dtype)
            means = packing.unpack(total / count, _parts(values, 0))
        for index, device in enumerate(devices):
            with tf.device(device):
                for part, mean in zip(
                    _parts(values, index), means, strict=True
                ):
                    part.assign(mean)


def _parts(values: Sequence[Any], index: int) -> list[Any]:
    """Each variable of one local replica."""
    return [value.values[index] for value in values]
