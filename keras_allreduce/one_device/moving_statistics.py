"""Moving statistics that all workers share.

A layer that gathers statistics, such as BatchNormalization, updates them on
each replica from its own samples. In one process all see those of replica 0;
workers would each go on with their own, and validate, save and predict with
different models. So after each step every replica gets the mean.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.reduce import packing, scaling


class SharedStatistics:
    """The moving statistics that a step updates.

    Args:
        model: The model.
        replicas: The replicas of this worker.
    """

    def __init__(self, model: keras.Model, replicas: Replicas):
        self._model = model
        self._replicas = replicas
        self._updated: dict[int, Any] = {}

    def shadows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """`assign` of each statistic."""
        for variable in moving_statistics(self._model):
            yield variable, {"assign": partial(self._assign, variable)}

    def _assign(self, variable: Any, value: Any) -> Any:
        self._updated[id(variable)] = variable
        return type(variable).assign(variable, value)

    def take_means(self, shares: Any) -> None:
        """Gives every replica of all workers the mean of what was assigned.

        Args:
            shares: Distributed share of each replica in the batch, times the
                number of replicas: its weight in the mean. `None`: all weigh
                the same.
        """
        by_dtype: dict[Any, list[Any]] = {}
        for variable in self._updated.values():
            by_dtype.setdefault(variable.value.dtype, []).append(variable.value)
        for values in by_dtype.values():
            self._take_means_of(values, shares)

    def _take_means_of(self, values: Sequence[Any], shares: Any) -> None:
        devices = self._replicas.devices
        weights = shares.values if shares is not None else [None] * len(devices)
        with tf.device("/cpu:0"):
            scaled = [
                scaling.scale(packing.pack(_parts(values, index)), weight)
                for index, weight in enumerate(weights)
            ]
            total = self._replicas.sum_over_workers(
                tf.add_n(scaled), "statistics"
            )
            count = tf.cast(
                self._replicas.num_workers * len(devices), total.dtype
            )
            means = packing.unpack(total / count, _parts(values, 0))
        for index, device in enumerate(devices):
            with tf.device(device):
                for part, mean in zip(
                    _parts(values, index), means, strict=True
                ):
                    part.assign(mean)


def moving_statistics(model: keras.Model) -> list[Any]:
    """Variables in which each replica gathers what it sees on its own.

    Not those of synchronized layers, which are the statistics of all replicas
    that have samples. Frozen weights are among them: nobody updates those.
    """
    shared = {
        id(variable)
        for layer in keras_compat.layers(model)
        if keras_compat.is_synchronized(layer)
        for variable in layer.non_trainable_variables
    }
    return [
        variable
        for variable in model.non_trainable_variables
        if tf.as_dtype(variable.dtype).is_floating
        and id(variable) not in shared
        and is_replicas_own(variable.value)
    ]


def is_replicas_own(variable: Any) -> bool:
    """Whether a replica updates its part of `variable` on its own."""
    return isinstance(variable, tf.distribute.DistributedValues) and (
        variable.synchronization == tf.VariableSynchronization.ON_READ
        or variable.aggregation == tf.VariableAggregation.NONE
    )


def _parts(values: Sequence[Any], index: int) -> list[Any]:
    """Each variable of one local replica."""
    return [value.values[index] for value in values]
