"""Logs of a step as one device would have them."""

from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
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


def mean_over_samples(outputs: Any, seen: Any, replicas: Replicas) -> Any:
    """Scales logs so that Keras's mean over replicas is one over samples.

    Args:
        outputs: Distributed logs of the replicas, means over their samples.
        seen: Distributed number of samples that each has seen; `None` leaves
            `outputs` as they are.
        replicas: The replicas of this worker.
    """
    if seen is None:
        return outputs
    with tf.device("/cpu:0"):
        shares = shares_of(replicas.local_values(seen))

    def scaled(value: Any) -> Any:
        # Before Keras 3.14 the results of eager metrics are Python floats.
        parts = [tf.convert_to_tensor(v) for v in replicas.local_values(value)]
        if not parts or not parts[0].dtype.is_floating:
            return value
        scaled_parts = []
        for device, part, share in zip(
            replicas.devices, parts, shares, strict=True
        ):
            with tf.device(device):
                scaled_parts.append(scale(part, share))
        return distribute.PerReplica(tuple(scaled_parts))

    return keras.tree.map_structure(scaled, outputs)
