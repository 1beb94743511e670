"""The share that each replica has of a batch.

With n_r of N samples on replica r of R, its share times R is n_r R / N. The
mean losses of the replicas, each scaled by it and divided by R, add up to the
mean loss of the batch, however it is divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import distribute, graphs, iterators
from keras_allreduce.devices import on_each
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.reduce.packing import scale
from keras_allreduce.reduce.process_group import (
    ProcessGroup,
    all_reduce_max,
)

ROWS = (
    "Every part of a batch has one row for each sample, which are split over "
    "the replicas."
)
ROWS_REMEDY = (
    "Keep a table that all samples share in a variable or a constant of the "
    "model, and pad what has several rows for a sample."
)


@dataclass(frozen=True)
class BatchShares:
    """How a batch is divided over the replicas of this worker.

    The first three are distributed values, each part on its replica's device;
    `None` stands for 1 (or true) on every replica.

    Attributes:
        share: float32; share of the batch, times the number of replicas.
        correction: float32; the scale by which a loss that is divided by the
            sum of the sample weights is scaled by beside the share.
        has_samples: bool; false on an empty replica.
        on_host: `share` again, as one float32 scalar on the host for each
            replica; empty if it is `None`.
    """

    share: Any = None
    correction: Any = None
    has_samples: Any = None
    on_host: Sequence[tf.Tensor] = ()

    def of_replicas(self) -> tuple[Any, Any, Any]:
        """The arguments of `Replica`, distributed."""
        return self.share, self.correction, self.has_samples

    def weights(self, num_replicas: int) -> list[tf.Tensor]:
        """`share` of each of the replicas of this worker, as float64."""
        parts = (
            [1.0] * num_replicas if self.share is None else self.share.values
        )
        return [tf.cast(part, tf.float64) for part in parts]


def shares_of_batch(
    data: Any, replicas: Replicas, *, counts_weights: bool
) -> BatchShares:
    """The shares of `data`, a distributed batch.

    Args:
        data: Nested structure of distributed values, samples first.
        replicas: The replicas of this worker.
        counts_weights: Whether a loss is divided by the sum of the sample
            weights; then `correction` makes that the one of the batch.
    """
    parts = replicas.local_values(_first_part(data))
    if not parts:
        return BatchShares()
    with tf.device("/cpu:0"):
        sizes = _sizes(parts, replicas.group.size)
        has_samples = shares = None
        if sizes is not None:
            # Known without the other workers: no forward pass waits for them.
            has_samples = place([n > 0 for n in sizes], replicas.devices)
            shares = shares_of(sizes, replicas.group)
        corrections = None
        if counts_weights:
            weights = replicas.local_values(_sample_weight(data))
            corrections = _corrections(shares, weights, replicas)
        return BatchShares(
            place(shares, replicas.devices),
            place(corrections, replicas.devices),
            has_samples,
            shares or (),
        )


def replicas_with_samples(data: Any, replicas: Replicas) -> Any:
    """Distributed bool, false on empty replicas; `None`: none is empty."""
    parts = replicas.local_values(_first_part(data))
    if not parts:
        return None
    with tf.device("/cpu:0"):
        sizes = _sizes(parts, replicas.group.size)
        if sizes is None:
            return None
        return place([n > 0 for n in sizes], replicas.devices)


def place(values: Sequence[tf.Tensor] | None, devices: Sequence[str]) -> Any:
    """A distributed value with one of `values` on each device.

    `None` stays `None`.
    """
    if values is None:
        return None
    return distribute.PerReplica(tuple(on_each(devices, tf.identity, values)))


def shares_of(
    amounts: Sequence[tf.Tensor], group: ProcessGroup
) -> list[tf.Tensor]:
    """Share of each replica in the batch, times the number of replicas.

    Args:
        amounts: float32 scalars, one for each replica of this process.
        group: All processes.

    Returns:
        float32 scalars whose mean over all processes is 1, or all 0 if all
        amounts are.
    """
    total = group.all_reduce(tf.add_n(list(amounts)), "batch")
    replicas = float(group.size * len(amounts))
    return [
        tf.math.divide_no_nan(amount * replicas, total) for amount in amounts
    ]


def divided(data: Any, replicas: Replicas) -> Any:
    """A batch that is not distributed yet, divided over the replicas.

    So `train_on_batch` and its like divide the work as `fit` does. The first
    replicas get as many samples each, the last ones the rest.

    Args:
        data: Nested structure of arrays and tensors, samples first.
        replicas: The replicas of this worker.
    """
    devices = replicas.devices
    leaves = keras.tree.flatten(data)
    if len(devices) == 1 or any(
        isinstance(x, tf.distribute.DistributedValues) for x in leaves
    ):
        return data

    shapes = [tf.TensorShape(np.shape(x)) for x in leaves if x is not None]
    sizes = {shape[0] for shape in shapes if shape.rank} - {None}
    if len(sizes) > 1:
        raise ValueError(
            f"{ROWS} Received: parts of {sorted(sizes)} rows. {ROWS_REMEDY}"
        )

    def divide(value: Any) -> Any:
        if value is None or tf.TensorShape(np.shape(value)).rank == 0:
            return value
        value = tf.convert_to_tensor(value)
        size = -(-tf.shape(value)[0] // len(devices))
        parts = []
        for index, device in enumerate(devices):
            with tf.device(device):
                parts.append(value[index * size : (index + 1) * size])
        return distribute.PerReplica(tuple(parts))

    return keras.tree.map_structure(divide, data)


def part_of_sum(value: tf.Tensor, replicas: Replicas) -> tf.Tensor:
    """A scalar of this replica over its sum on all; in a replica's thread."""

    def merge(_strategy: tf.distribute.Strategy, values: Any) -> Any:
        parts = replicas.local_values(values)
        with tf.device("/cpu:0"):
            total = replicas.group.all_reduce(tf.add_n(parts), "counted")
        return place(
            [tf.math.divide_no_nan(part, total) for part in parts],
            replicas.devices,
        )

    return replica.merged(merge, value)


def part_of_denominators(value: Any, replicas: Replicas) -> tf.Tensor | None:
    """This replica's part of the denominators of a ratio, in its thread.

    The denominator is seen in the graph of the step.

    Returns:
        A float32 scalar; `None` where there is no graph to see it in.
    """
    count = graphs.denominator(value)
    if count is None:
        return None
    counted = tf.cast(count, tf.float32)
    return part_of_sum(scale(counted, replica.current().has_samples), replicas)


def scaled_ratio(value: Any, replicas: Replicas) -> Any:
    """A ratio, scaled so that its mean by samples is that of the batch.

    With a_r / n_r on replica r, the batch has sum(a) / sum(n): the mean of the
    replicas' values, each with its part n_r / sum(n) of all that is counted,
    such as tokens.
    """
    part = part_of_denominators(value, replicas)
    if part is None:
        return value
    return scale(value, part * replica.current().inverse_weight())


def extreme(value: tf.Tensor, replicas: Replicas, *, is_max: bool) -> Any:
    """The largest or smallest value of all replicas; in a replica's thread."""
    sign = tf.cast(1 if is_max else -1, value.dtype)
    signed = sign * value
    has_samples = replica.current().has_samples
    if has_samples is not None:
        signed = tf.where(has_samples, signed, value.dtype.min)

    def merge(_strategy: tf.distribute.Strategy, values: Any) -> Any:
        return largest(values, replicas)

    return sign * replica.merged(merge, signed)


def largest(value: Any, replicas: Replicas) -> Any:
    """The largest of a distributed value, on each device; in a merge_call."""
    with tf.device("/cpu:0"):
        own = tf.reduce_max(tf.stack(replicas.local_values(value)), axis=0)
        of_all = all_reduce_max(replicas.group, own)
    return place([of_all] * len(replicas.devices), replicas.devices)


def _first_part(data: Any) -> Any:
    """The first tensor of rank 1 or more, which tells the number of samples."""
    for leaf in keras.tree.flatten(data):
        local = getattr(leaf, "values", (leaf,))
        local = local[0] if isinstance(local, tuple) else leaf
        if leaf is not None and tf.TensorShape(local.shape).rank != 0:
            return leaf
    return None


def static_samples(data: Any, replicas: Replicas) -> list[int | None]:
    """Number of samples of each replica's part; `None` if a graph's is open."""
    first = _first_part(data)
    parts = [] if first is None else replicas.local_values(first) or [first]
    counts = [tf.TensorShape(part.shape)[0] for part in parts]
    return counts * (len(replicas.devices) if len(counts) == 1 else 1)


def _sample_weight(data: Any) -> Any:
    """The sample weights of a batch, if Keras would find one such part."""
    try:
        _, _, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    except (TypeError, ValueError):
        return None
    weights = keras.tree.flatten(sample_weight)
    return weights[0] if len(weights) == 1 else None


def _sizes(replicas: Sequence[Any], num_workers: int) -> list[tf.Tensor] | None:
    """Number of samples of each replica, or `None` if all are surely equal.

    Args:
        replicas: The first input of each replica, batch first.
        num_workers: Number of workers; `replicas` are those of this one.
    """
    shapes = [tf.TensorShape(value.shape) for value in replicas]
    static = {shape[0] if shape.rank else None for shape in shapes}
    # Else it may be that of this batch, on this worker.
    known_of_all = num_workers == 1 or iterators.batches_are_read_in_graph()
    if len(static) == 1 and static != {None} and known_of_all:
        return None
    return [
        tf.cast(tf.shape(value, out_type=tf.int64)[0], tf.float32)
        for value in replicas
    ]


def _corrections(
    shares: list[tf.Tensor] | None,
    sample_weights: Sequence[Any],
    replicas: Replicas,
) -> list[tf.Tensor] | None:
    """Share of each replica in the sample weights, over that in samples."""
    if not sample_weights:
        return None
    wanted = shares_of(
        [tf.reduce_sum(tf.cast(w, tf.float32)) for w in sample_weights],
        replicas.group,
    )
    if shares is None:
        return wanted
    return [
        tf.math.divide_no_nan(of_weights, share)
        for of_weights, share in zip(wanted, shares, strict=True)
    ]
