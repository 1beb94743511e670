"""Runs a replica without samples on one sample borrowed from the batch.

Some kernels of TensorFlow end the process on an empty batch, and some layers
make NaNs of it. The loss of the borrowed sample counts 0, and the replica
forgets it. Layers such as `BatchNormalization(synchronized=True)` sum over the
replicas in the forward pass, and their gradients do in backprop: an empty
replica counts 0 there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat.datasets import sparse_rows
from keras_allreduce.devices import on_each
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shared_state import synchronized_variables
from keras_allreduce.reduce import packing


def spare_sample(data: Any, replicas: Replicas) -> Any:
    """One sample of a distributed batch, in the same structure.

    Values that are not distributed stay as they are.
    """

    def first(value: Any) -> Any:
        parts = replicas.local_values(value)
        if not parts or parts[0] is None:  # A batch may have None as targets.
            return value
        return first_sample(parts[0])

    return keras.tree.map_structure(first, data)


def first_sample(value: Any) -> Any:
    """The first sample of a batch, as a batch of one; zeros if there is none.

    On a worker of several the whole part of the worker may be empty.
    """
    if isinstance(value, tf.SparseTensor):
        first = sparse_rows(value, 0, 1)
        shape = tf.concat([[1], value.dense_shape[1:]], axis=0)
        return tf.SparseTensor(first.indices, first.values, shape)
    if isinstance(value, tf.RaggedTensor):
        return value[:1]
    shape = tf.concat([[1], tf.shape(value)[1:]], axis=0)
    zeros = tf.zeros(shape, value.dtype)
    first = tf.concat([value[:1], zeros], axis=0)[:1]
    first.set_shape([1, *value.shape[1:]])
    return first


def with_a_sample(data: Any, has_samples: tf.Tensor, spare: Any) -> Any:
    """The replica's part of the batch, or `spare` if it is empty.

    Args:
        data: Nested structure of tensors, batch first.
        has_samples: bool scalar; false if the part is empty.
        spare: One sample in the same structure.
    """
    leaves = keras.tree.flatten(data)
    places = [place for place, leaf in enumerate(leaves) if leaf is not None]
    filled = [leaves[place] for place in places]
    borrowed = [keras.tree.flatten(spare)[place] for place in places]
    chosen = tf.cond(has_samples, lambda: filled, lambda: borrowed)
    for place, leaf in zip(places, chosen, strict=True):
        leaves[place] = leaf
    return keras.tree.pack_sequence_as(data, leaves)


def state(model: keras.Model) -> list[tuple[Any, tf.Tensor]]:
    """Variables that the replica updates on its own, and their values.

    Metrics and moving statistics; not the seeds, which all replicas draw.
    """
    results = [
        variable
        for variable in model.metrics_variables
        if _is_replicas_own(variable.value)
    ]
    return [
        (variable.value, tf.identity(variable.value))
        for variable in (*_moving_statistics(model), *results)
    ]


def _moving_statistics(model: keras.Model) -> list[Any]:
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
        and _is_replicas_own(variable.value)
    ]


def _is_replicas_own(variable: Any) -> bool:
    """Whether a replica updates its part of `variable` on its own."""
    return isinstance(variable, tf.distribute.DistributedValues) and (
        variable.synchronization == tf.VariableSynchronization.ON_READ
        or variable.aggregation == tf.VariableAggregation.NONE
    )


def restore(
    has_samples: tf.Tensor, before: Sequence[tuple[Any, tf.Tensor]]
) -> None:
    """Puts back the state from before the step if the replica was empty."""

    def put_back() -> None:
        for variable, value in before:
            variable.assign(value)

    tf.cond(has_samples, lambda: None, put_back)


def rows_if(has_samples: tf.Tensor, value: Any) -> Any:
    """`value`, or none of its rows if the replica has no samples."""
    if isinstance(value, tf.SparseTensor):
        size = value.dense_shape[0] * tf.cast(has_samples, tf.int64)
        return sparse_rows(value, 0, size)
    if not tf.TensorShape(value.shape).rank:
        return value
    every = value.nrows() if isinstance(value, tf.RaggedTensor) else None
    count = tf.shape(value)[0] if every is None else every
    return value[: tf.where(has_samples, count, tf.zeros_like(count))]


class SynchronizedSums:
    """Sums over the replicas in which an empty replica counts 0.

    Args:
        replicas: The replicas of this worker.
        has_samples: Distributed bool, false on empty replicas. `None`: none
            is left out.

    Attributes:
        in_backprop: Whether a sum may now be that of a gradient.
        used: Whether a layer has summed over the replicas.
    """

    def __init__(self, replicas: Replicas, has_samples: Any):
        self._replicas = replicas
        self._has_samples = has_samples
        self.in_backprop = False
        self.used = False

    def sum(
        self,
        sum_over_replicas: Callable[[list[tuple[Any, Any]]], list[Any]],
        value_destination_pairs: Sequence[tuple[Any, Any]],
    ) -> list[Any]:
        """The sums of the values, without those of empty replicas.

        In the forward pass all replicas get the sum: a synchronized layer has
        the same statistics everywhere. In backprop empty replicas get 0, so
        that nothing flows back into them.

        Args:
            sum_over_replicas: Sums all replicas.
            value_destination_pairs: Its argument.
        """
        self.used = True
        sums = sum_over_replicas(
            [
                (self._of_replicas_with_samples(value), destination)
                for value, destination in value_destination_pairs
            ]
        )
        if not self.in_backprop:
            return sums
        return [self._of_replicas_with_samples(total) for total in sums]

    def _of_replicas_with_samples(self, value: Any) -> Any:
        """A distributed value, with 0 in the place of empty replicas."""
        if self._has_samples is None:
            return value
        counts = self._has_samples.values
        parts = on_each(
            [count.device for count in counts],
            packing.scale,
            self._replicas.local_values(value),
            counts,
        )
        return distribute.PerReplica(tuple(parts))
