"""The share that each replica has of a batch.

With n_r of N samples on replica r of R, its share times R is n_r R / N. The
mean losses of the replicas, each scaled by it and divided by R, add up to the
mean loss of the batch, however it is divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.one_device.rules import Rule


@dataclass(frozen=True)
class BatchShares:
    """How a batch is divided over the replicas of this worker.

    The first three are distributed values, each part on its replica's device;
    `None` stands for 1 (or true) on every replica.

    Attributes:
        share: float32; share of the batch, times the number of replicas.
        correction: float32; what the loss is scaled by beside the share.
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


def shares_of_batch(data: Any, rule: Rule, replicas: Replicas) -> BatchShares:
    """The shares of `data`, a distributed batch.

    Keras weights the loss of each replica by its samples in the mean it
    shows, and `ScaledLoss` does in the gradients. Where the rule counts
    something else, the correction is common to both.
    """
    inputs, sample_weight = _parts(data)
    parts = replicas.local_values(inputs)
    if not parts:
        return BatchShares()
    with tf.device("/cpu:0"):
        sizes = _sizes(parts, replicas.num_workers)
        if sizes is None:
            has_samples = shares = None
        else:
            # Known without the other workers: no forward pass waits for them.
            has_samples = place([n > 0 for n in sizes], replicas.devices)
            shares = replicas.shares_of(sizes)
        weights = replicas.local_values(sample_weight)
        corrections = _corrections(rule, shares, weights, replicas)
        return BatchShares(
            place(shares, replicas.devices),
            place(corrections, replicas.devices),
            has_samples,
            shares or (),
        )


def place(values: Sequence[tf.Tensor] | None, devices: Sequence[str]) -> Any:
    """A distributed value with one of `values` on each device.

    `None` stays `None`.
    """
    if values is None:
        return None
    placed = []
    for value, device in zip(values, devices, strict=True):
        with tf.device(device):
            placed.append(tf.identity(value))
    return distribute.PerReplica(tuple(placed))


def shares_of(
    amounts: Sequence[tf.Tensor],
    total: tf.Tensor | None = None,
    count: int | None = None,
) -> list[tf.Tensor]:
    """Share of each replica in the batch, times the number of replicas.

    Args:
        amounts: float32 scalars, one per replica.
        total: Their sum, if there are more replicas than these.
        count: The number of all replicas, likewise.

    Returns:
        float32 scalars whose mean is 1, or all 0 if all amounts are.
    """
    if total is None:
        total = tf.add_n(list(amounts))
    replicas = float(count or len(amounts))
    return [
        tf.math.divide_no_nan(amount * replicas, total) for amount in amounts
    ]


def _parts(data: Any) -> tuple[Any, Any]:
    """The first input and the sample weights of a batch, or `None`s."""
    x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    weights = keras.tree.flatten(sample_weight)
    return (
        inputs[0] if inputs else None,
        weights[0] if len(weights) == 1 else None,
    )


def _sizes(replicas: Sequence[Any], num_workers: int) -> list[tf.Tensor] | None:
    """Number of samples of each replica, or `None` if all are surely equal.

    Args:
        replicas: The first input of each replica, batch first.
        num_workers: Number of workers; `replicas` are those of this one.
    """
    shapes = [tf.TensorShape(value.shape) for value in replicas]
    static = {shape[0] if shape.rank else None for shape in shapes}
    # A traced shape holds for every batch, on all workers; an eager one only
    # for this batch here.
    known_of_all = num_workers == 1 or not tf.executing_eagerly()
    if len(static) == 1 and static != {None} and known_of_all:
        return None
    return [
        tf.cast(tf.shape(value, out_type=tf.int64)[0], tf.float32)
        for value in replicas
    ]


def _corrections(
    rule: Rule,
    shares: list[tf.Tensor] | None,
    sample_weights: Sequence[Any],
    replicas: Replicas,
) -> list[tf.Tensor] | None:
    """The scale that `rule` wants, divided by the share, of each replica."""
    wanted: list[tf.Tensor] | None = None
    if rule.kind == "sum" and shares is not None:
        wanted = [tf.ones([]) for _ in shares]
    elif rule.kind == "sample_weights" and sample_weights:
        wanted = replicas.shares_of(
            [tf.reduce_sum(tf.cast(w, tf.float32)) for w in sample_weights]
        )
    if wanted is None or shares is None:
        return wanted
    return [
        tf.math.divide_no_nan(scale, share)
        for scale, share in zip(wanted, shares, strict=True)
    ]
