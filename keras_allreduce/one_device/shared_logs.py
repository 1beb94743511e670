"""Logs of a training step that are the same on all workers.

Callbacks decide on the logs of a step, `TerminateOnNaN` for one. On workers
whose logs were their own, one would stop and the others wait for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.one_device import logs
from keras_allreduce.one_device.reduction import Reductions
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.reduce.scaling import scale


def rule(step: str, replicas: Replicas) -> Callable[..., Any]:
    """Returns what makes the logs of a step those of one device.

    Args:
        step: Name of the step. Logs of a test step stay on this worker, and
            those of a training step are shared.
        replicas: The replicas of this worker.
    """
    if step == "train_step" and replicas.group.size > 1:
        return as_of_one_device
    return logs.as_of_one_device


def as_of_one_device(
    outputs: Any,
    seen: Any,
    shares: Any,
    reductions: Reductions,
    replicas: Replicas,
) -> Any:
    """Makes logs those of one device, over the samples of all workers.

    Takes what `logs.as_of_one_device` does, and shares floating scalars. All
    cross in one small collective, which needs the forward pass alone: it is in
    flight while backprop goes on.
    """
    leaves = keras.tree.flatten_with_path(outputs)
    parts = [_numbers(replicas.local_values(value)) for _, value in leaves]
    shared = [index for index, each in enumerate(parts) if each]
    sums = {i for i in shared if reductions.is_sum("log", *leaves[i][0])}
    flat = [value for _, value in leaves]
    amounts = replicas.local_values(shares if seen is None else seen)
    with tf.device("/cpu:0"):
        weights = [
            tf.cast(amount, tf.float64)
            for amount in amounts or [1.0] * len(replicas.devices)
        ]
        counts = [logs.count_of_sum(weight, 1) for weight in weights]
        local = [
            _weighted(parts[index], counts if index in sums else weights)
            for index in shared
        ]
        total = replicas.group.all_reduce(
            tf.stack([*local, tf.add_n(weights)]), "logs"
        )
        for place, index in enumerate(shared):
            value = total[place] / (1.0 if index in sums else total[-1])
            value = tf.cast(value, parts[index][0].dtype)
            flat[index] = logs.scaled_where_they_are(
                [value] * len(weights), [None] * len(weights), replicas.devices
            )
    return keras.tree.pack_sequence_as(outputs, flat)


def _numbers(parts: Sequence[Any]) -> list[tf.Tensor]:
    """The parts of a log if it is a floating scalar; nothing if not."""
    # Before Keras 3.14 the results of eager metrics are Python floats.
    tensors = [
        tf.convert_to_tensor(part) if isinstance(part, float) else part
        for part in parts
    ]
    if all(
        isinstance(each, tf.Tensor)
        and each.dtype.is_floating
        and each.shape.rank == 0
        for each in tensors
    ):
        return tensors
    return []


def _weighted(parts: Sequence[tf.Tensor], weights: Sequence[Any]) -> tf.Tensor:
    """The sum of a log over the replicas, each scaled by its weight."""
    return tf.add_n(
        [
            scale(tf.cast(part, tf.float64), weight)
            for part, weight in zip(parts, weights, strict=True)
        ]
    )
