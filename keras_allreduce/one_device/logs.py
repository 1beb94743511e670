"""Logs of a step as one device would have them."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device.reduction import Reductions
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.one_device.shares import shares_of
from keras_allreduce.reduce.scaling import scale


def are_metric_results(model: keras.Model, step: str) -> bool:
    """Whether the logs of a step are the results of the metrics.

    As Keras has it. They can be taken again without the sample that an empty
    replica has borrowed.
    """
    return all(
        keras_compat.is_keras_method(model, method)
        for method in (step, "compute_metrics")
    )


def samples_seen(model: keras.Model) -> Any:
    """Samples of this replica that the logs are means over, if known."""
    tracker = keras_compat.loss_tracker(model)
    if tracker is None:
        return None
    return tf.convert_to_tensor(tracker.count.value)


def as_of_one_device(
    outputs: Any,
    seen: Any,
    shares: Any,
    reductions: Reductions,
    replicas: Replicas,
) -> Any:
    """Scales logs so that Keras's mean over replicas is that of one device.

    Args:
        outputs: Distributed logs of the replicas.
        seen: Distributed number of samples that each has seen, if the logs
            are means over them.
        shares: Distributed share of each replica in the batch, times the
            number of replicas; `None`: 1. Used if `seen` is `None`.
        reductions: Which of the logs are sums over samples.
        replicas: The replicas of this worker.
    """
    amounts = shares if seen is None else seen
    weights: Sequence[Any] = [None] * len(replicas.devices)
    if amounts is not None:
        with tf.device("/cpu:0"):
            weights = shares_of(replicas.local_values(amounts))

    def scaled(path: tuple[Any, ...], value: Any) -> Any:
        is_sum = reductions.is_sum("log", *path)
        # Before Keras 3.14 the results of eager metrics are Python floats.
        parts = [tf.convert_to_tensor(v) for v in replicas.local_values(value)]
        if not parts or not parts[0].dtype.is_floating:
            return value
        if amounts is None and not is_sum:
            return value
        by = weights
        if is_sum:
            by = [count_of_sum(weight, len(parts)) for weight in weights]
        return scaled_where_they_are(parts, by, replicas.devices)

    leaves = keras.tree.flatten_with_path(outputs)
    flat = [scaled(*leaf) for leaf in leaves]
    return keras.tree.pack_sequence_as(outputs, flat)


def count_of_sum(weight: Any, num_replicas: int) -> Any:
    """What a sum is scaled by, so that the mean over replicas is the sum.

    Nothing counts on an empty replica.
    """
    if weight is None:
        return float(num_replicas)
    return tf.where(weight > 0, float(num_replicas), 0.0)


def scaled_where_they_are(
    parts: Sequence[Any], weights: Sequence[Any], devices: Sequence[str]
) -> Any:
    """A distributed value with each part scaled where it is."""
    scaled = []
    for device, part, weight in zip(devices, parts, weights, strict=True):
        with tf.device(device):
            scaled.append(scale(part, weight))
    return distribute.PerReplica(tuple(scaled))
