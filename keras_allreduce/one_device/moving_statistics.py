"""Statistics and other state of a model that all replicas share.

A layer that gathers statistics, such as BatchNormalization, updates them on
each replica from its own samples, and a custom step may keep an average or a
counter. Then each replica would go on with its own, and the saved model would
be that of replica 0. So after each step every replica gets the mean of all,
weighted by samples.
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
        count = self._replicas.num_workers * len(devices)
        with tf.device("/cpu:0"):
            weights: Sequence[Any] = [1 / count] * len(devices)
            if shares is not None:
                weights = [share / count for share in shares.values]
            packs = [
                packing.pack(_parts(values, index))
                for index in range(len(devices))
            ]
            mean = self._mean_of(packs, weights)
            means = packing.unpack(mean, _parts(values, 0))
        for index, device in enumerate(devices):
            with tf.device(device):
                for part, mean in zip(
                    _parts(values, index), means, strict=True
                ):
                    part.assign(mean)

    def _mean_of(self, packs: list[Any], weights: Sequence[Any]) -> Any:
        """The weighted mean over the replicas of all workers."""
        if self._replicas.num_workers > 1:
            total = tf.add_n(list(map(scaling.scale, packs, weights)))
            return self._replicas.sum_over_workers(total, "statistics")
        # What is the same everywhere, such as a counter, stays exact.
        first, *others = packs
        gaps = [
            scaling.scale(pack - first, weight)
            for pack, weight in zip(others, weights[1:], strict=True)
        ]
        return tf.add_n([first, *gaps])


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
