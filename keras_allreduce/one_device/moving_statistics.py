"""Variables in which each replica gathers statistics on its own."""

from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat


def moving_statistics(model: keras.Model) -> list[Any]:
    """Variables in which each replica gathers statistics on its own.

    Not those of synchronized layers, which are the statistics of all replicas
    that have samples. Frozen weights are among them: nobody updates those.
    """
    shared = synchronized_variables(model)
    return [
        variable
        for variable in model.non_trainable_variables
        if tf.as_dtype(variable.dtype).is_floating
        and keras_compat.identity_of(variable) not in shared
        and is_replicas_own(variable.value)
    ]


def synchronized_variables(model: keras.Model) -> frozenset[int]:
    """Identities of the statistics that all replicas update alike."""
    return frozenset(
        keras_compat.identity_of(variable)
        for layer in keras_compat.layers(model)
        if keras_compat.is_synchronized(layer)
        for variable in layer.non_trainable_variables
    )


def is_replicas_own(variable: Any) -> bool:
    """Whether a replica updates its part of `variable` on its own."""
    return isinstance(variable, tf.distribute.DistributedValues) and (
        variable.synchronization == tf.VariableSynchronization.ON_READ
        or variable.aggregation == tf.VariableAggregation.NONE
    )
