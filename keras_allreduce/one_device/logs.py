"""Logs of a step as one device would have them, on every worker.

    the result of a metric       computed from the state of all replicas
    a number                     a mean over samples, or measured to be a sum
    one row for each sample      the rows of all replicas
    another tensor               a mean over samples

Callbacks decide on the logs of a step, `TerminateOnNaN` for one, so those of a
training step are the same on all workers: all cross in one small collective,
which needs the forward pass alone and is in flight while backprop goes on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device.empty_replica import rows_if
from keras_allreduce.one_device.metrics import (
    GatheredStates,
    MetricResult,
    Path,
)
from keras_allreduce.one_device.reduction import Reductions, log_key
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shares import BatchShares
from keras_allreduce.reduce import packing
from keras_allreduce.reduce.packing import scale
from keras_allreduce.reduce.process_group import ProcessGroup


def are_metric_results(model: keras.Model, step: str) -> bool:
    """Whether the logs of a step are the results of the metrics.

    As Keras has it. They can be taken again without the sample that an empty
    replica has borrowed, and Keras takes those of an epoch from the metrics.
    """
    return all(
        keras_compat.is_keras_method(model, method)
        for method in (step, "compute_metrics")
    )


def of_one_device(
    outputs: Any,
    results: Mapping[Path, MetricResult],
    shares: BatchShares,
    reductions: Reductions,
    replicas: Replicas,
    group: ProcessGroup,
    samples: Sequence[int | None],
) -> Any:
    """The logs of the batch, which are not distributed.

    Args:
        outputs: Distributed logs of the replicas.
        results: The results of metrics among them.
        shares: How the batch is divided.
        reductions: Which logs are sums over samples.
        replicas: The replicas of this worker.
        group: The workers whose samples the logs are of: all, or this one.
        samples: Number of samples of each replica; `None` where it is known
            only when the step runs.
    """
    found = dict(keras.tree.flatten_with_path(outputs))
    parts = {
        path: _numbers(replicas.local_values(value))
        for path, value in found.items()
        if path not in results
    }
    rows = [path for path, each in parts.items() if _are_rows(each, samples)]
    numbers = [path for path in parts if parts[path] and path not in rows]
    for path in rows:
        if replicas.group.size == 1:  # Those of several workers stay apart.
            found[path] = _rows(parts[path], shares.has_samples)
    are_sums = [
        reductions.is_sum(*log_key(path, parts[path][0].dtype))
        for path in numbers
    ]
    states = GatheredStates(results)
    with tf.device("/cpu:0"):
        weights = shares.weights(len(replicas.devices))
        # Nothing counts on an empty replica.
        counts = [tf.cast(weight > 0, tf.float64) for weight in weights]
        local = [
            _weighted_sum(parts[path], counts if is_sum else weights)
            for path, is_sum in zip(numbers, are_sums, strict=True)
        ]
        *totals, weight = _all_reduce(
            [*states.local_sums(), *local, tf.add_n(weights)], group
        )
        count = len(totals) - len(numbers)
        found |= states.results(totals[:count])
        for path, is_sum, total in zip(
            numbers, are_sums, totals[count:], strict=True
        ):
            found[path] = _cast(
                total if is_sum else total / weight, parts[path][0].dtype
            )
    return keras.tree.pack_sequence_as(outputs, list(found.values()))


def _numbers(parts: Sequence[Any]) -> list[tf.Tensor]:
    """The parts of a log; nothing if they are no numbers."""
    # Before Keras 3.14 the results of eager metrics are Python floats.
    tensors = [
        tf.convert_to_tensor(part) if isinstance(part, float) else part
        for part in parts
    ]
    if all(
        isinstance(each, tf.Tensor)
        and (each.dtype.is_floating or each.dtype.is_integer)
        for each in tensors
    ):
        return tensors
    return []


def _are_rows(
    parts: Sequence[tf.Tensor], samples: Sequence[int | None]
) -> bool:
    """Whether a log has one row for each sample of the replica."""
    if not parts or not all(part.shape.rank for part in parts):
        return False
    lengths = [part.shape[0] for part in parts]
    return None in lengths or lengths == list(samples)


def _rows(parts: list[tf.Tensor], has_samples: Any) -> tf.Tensor:
    """The rows of all replicas."""
    if has_samples is not None:
        parts = [
            rows_if(each, part)
            for each, part in zip(has_samples.values, parts, strict=True)
        ]
    with tf.device("/cpu:0"):
        return tf.concat(parts, axis=0)


def _weighted_sum(
    parts: Sequence[tf.Tensor], weights: Sequence[tf.Tensor]
) -> tf.Tensor:
    """The contributions of this worker's replicas to a log."""
    return tf.add_n(
        [
            scale(tf.cast(part, tf.float64), weight)
            for part, weight in zip(parts, weights, strict=True)
        ]
    )


def _cast(total: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A log in its own dtype."""
    return tf.cast(tf.round(total) if dtype.is_integer else total, dtype)


def _all_reduce(
    local: Sequence[tf.Tensor], group: ProcessGroup
) -> list[tf.Tensor]:
    """The sums over the workers, in the dtypes of the values."""
    if group.size == 1:
        return list(local)
    wide = [tf.cast(each, tf.float64) for each in local]
    total = group.all_reduce(packing.pack(wide), "logs")
    return [
        tf.cast(each, part.dtype)
        for each, part in zip(packing.unpack(total, wide), local, strict=True)
    ]
