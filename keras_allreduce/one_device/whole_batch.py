"""Computes a loss of `compile` on the whole batch, on every replica.

A replica's own rows have a gradient, those of the others have none:

    replica     rows that its loss is computed on
          0     [own 0]  row 1   row 2     d loss / d rows 0
          1      row 0  [own 1]  row 2     d loss / d rows 1
          2      row 0   row 1  [own 2]    d loss / d rows 2

So all replicas have the loss of the batch, backprop needs no communication,
and the sum of the replicas' gradients is that of the batch, for any loss: it
may compare samples, or divide by a count of all of them.

The loss of a replica is scaled by its weight w, its share of the batch. So
variables that the loss itself uses count once in all. The gradient of the
replica's rows is scaled by 1 / w, which leaves it as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute, keras_losses
from keras_allreduce.compat.datasets import first_dimension
from keras_allreduce.devices import on_each
from keras_allreduce.one_device import empty_replica, replica
from keras_allreduce.one_device.replica import Replica, Replicas
from keras_allreduce.reduce.packing import scale

MOST_BYTES_OF_A_SAMPLE = 2**20
"""Largest sample of targets and outputs that is sent to other workers.

A batch of 64 samples of 1 MiB takes half a second over 1 Gbit/s. The loss of
larger ones is computed on each replica's part of the batch, and a warning says
so. A dimension that is not known counts 1.
"""


@dataclass(frozen=True)
class Rows:
    """A tensor with one row per sample, on this replica and on the others.

    Attributes:
        own: The rows of this replica.
        parts: The rows of each replica of all workers, without a gradient.
        position: Which of `parts` are those of this replica.
    """

    own: Any
    parts: Sequence[Any]
    position: int

    def of_batch(self, this: Replica) -> Any:
        """All rows, of which those of this replica have a gradient."""
        parts = list(self.parts)
        parts[self.position] = _with_gradient_over_weight(self.own, this)
        return _concatenated(parts)

    def of_replica(self, value: tf.Tensor) -> tf.Tensor:
        """The part of `value`, one row per sample of the batch."""
        begin = sum(map(first_dimension, self.parts[: self.position]))
        return value[begin : begin + first_dimension(self.own)]


def loss_of_batch(
    loss: Callable[..., Any],
    y_true: Any,
    y_pred: Any,
    sample_weight: Any,
    replicas: Replicas,
) -> tf.Tensor:
    """The loss of the batch of all replicas; in a replica's thread.

    Args:
        loss: A loss of `compile`, called with what follows.
        y_true: Nested structure of tensors of this replica.
        y_pred: Likewise, maybe with Keras's masks.
        sample_weight: Likewise, or `None`.
        replicas: The replicas of this worker.

    Returns:
        The loss. Of one that is not reduced, the values of this replica.
    """
    this = replica.current()
    y_pred_rows = _find_rows(y_pred)
    every = _find_rows((y_pred, y_true, sample_weight))
    masks = [keras_losses.mask_of(leaf) for leaf in every]
    own = [*every, *(mask for mask in masks if mask is not None)]
    if this.has_samples is not None:
        own = [empty_replica.rows_if(this.has_samples, each) for each in own]
    rows = _on_all_replicas(own, replicas)
    of_batch = [each.of_batch(this) for each in rows]
    batch = of_batch[: len(every)]
    rest = iter(of_batch[len(every) :])
    for leaf, mask in zip(batch, masks, strict=True):
        if mask is not None:
            keras_losses.attach_mask(leaf, next(rest))
    found = {id(leaf): each for leaf, each in zip(every, batch, strict=True)}
    value = loss(
        *keras.tree.map_structure(
            lambda leaf: found.get(id(leaf), leaf),
            (y_true, y_pred, sample_weight),
        )
    )
    if not len(value.shape) or not y_pred_rows:
        return value
    return _values_of_replica(value, rows[0], this)


def stand_in(value: tf.Tensor, y_pred: Any) -> tf.Tensor:
    """A mean over samples in the place of a loss, to measure a step with.

    As the loss of the batch is always handled as a mean, a step that uses it
    has to be measured with one.

    Args:
        value: The loss of one part of the batch.
        y_pred: Nested structure of outputs.
    """
    columns = [
        _sums_of_rows(leaf)
        for leaf in _find_rows(y_pred)
        if isinstance(leaf, tf.Tensor) and leaf.dtype.is_floating
    ]
    if not columns:
        return value
    means = [tf.reduce_mean(each) for each in columns]
    mean = tf.cast(tf.add_n(means), value.dtype)
    if not len(value.shape):
        return mean
    rows = tf.cast(columns[0], value.dtype)
    shape = [tf.shape(rows)[0], *[1] * (len(value.shape) - 1)]
    return tf.zeros_like(value) + tf.reshape(rows, shape)


def bytes_of_a_sample(*values: Any) -> int:
    """Bytes of one row of all tensors; dimensions not known count 1."""
    total = 0
    for leaf in _find_rows(values):
        elements = 1
        for dim in tf.TensorShape(leaf.shape)[1:].as_list():
            elements *= dim or 1
        total += elements * leaf.dtype.size
    return total


def may_gather(replicas: Replicas, *values: Any) -> bool:
    """Whether tensors are sent to all workers: large ones and strings not."""
    return replicas.group.size == 1 or (
        bytes_of_a_sample(*values) <= MOST_BYTES_OF_A_SAMPLE
        and all(leaf.dtype.size for leaf in _find_rows(values))
    )


def _find_rows(values: Any) -> list[Any]:
    """The tensors of a structure that have rows."""
    return [
        leaf
        for leaf in keras.tree.flatten(values)
        if isinstance(leaf, tf.Tensor | tf.RaggedTensor | tf.SparseTensor)
        and tf.TensorShape(leaf.shape).rank != 0
    ]


def _on_all_replicas(own: Sequence[Any], replicas: Replicas) -> list[Rows]:
    """Gathers tensors of this replica from all replicas of all workers."""

    def merge(_strategy: Any, values: Sequence[Any]) -> tuple[Any, list[Any]]:
        devices = replicas.devices
        local = [
            list(replicas.local_values(value)) or [value] * len(devices)
            for value in values
        ]
        of_all = replicas.group.all_gather_tensors(
            [
                part
                for parts in local
                for each in parts
                for part in _split(each)
            ],
            "loss",
        )
        rank = replicas.group.rank
        before, after = of_all[:rank], of_all[rank + 1 :]
        first = len(before) * len(devices)
        positions = tuple(range(first, first + len(devices)))
        everyone: list[list[list[Any]]] = [
            *(_like(local, tensors) for tensors in before),
            local,
            *(_like(local, tensors) for tensors in after),
        ]
        return distribute.PerReplica(positions), [
            [
                _without_gradient(part, devices)
                for worker in everyone
                for part in worker[number]
            ]
            for number in range(len(values))
        ]

    position, found = replica.merged(merge, list(own))
    return [
        Rows(each, parts, position)
        for each, parts in zip(own, found, strict=True)
    ]


def _without_gradient(value: Any, devices: Sequence[str]) -> Any:
    """A distributed value that is the same on all devices."""

    def stopped(each: Any) -> Any:
        return tf.nest.map_structure(
            tf.stop_gradient, each, expand_composites=True
        )

    parts = on_each(devices, stopped, [value] * len(devices))
    return distribute.PerReplica(tuple(parts))


def _split(value: Any) -> list[tf.Tensor]:
    """The dense tensors that make a tensor."""
    if isinstance(value, tf.RaggedTensor):
        return [value.flat_values, *value.nested_row_splits]
    if isinstance(value, tf.SparseTensor):
        return [value.indices, value.values, value.dense_shape]
    return [value]


def _like(
    local: list[list[Any]], tensors: Sequence[tf.Tensor]
) -> list[list[Any]]:
    """What `_split` has split on another worker: `[value][replica]`."""
    rest = iter(tensors)

    def made(like: Any) -> Any:
        parts = [next(rest) for _ in _split(like)]
        if isinstance(like, tf.RaggedTensor):
            return tf.RaggedTensor.from_nested_row_splits(
                parts[0], parts[1:], validate=False
            )
        if isinstance(like, tf.SparseTensor):
            return tf.SparseTensor(*parts)
        return parts[0]

    return [[made(like) for like in parts] for parts in local]


def _concatenated(parts: Sequence[Any]) -> Any:
    """All rows; shorter ones are padded with 0, as `to_tensor` does."""
    if isinstance(parts[0], tf.SparseTensor):
        return tf.sparse.concat(0, parts, expand_nonconcat_dims=True)
    if isinstance(parts[0], tf.RaggedTensor):
        return tf.concat(parts, axis=0)
    inner = [part.shape[1:] for part in parts]
    if inner[0].is_fully_defined() and all(each == inner[0] for each in inner):
        return tf.concat(parts, axis=0)
    longest = tf.reduce_max([tf.shape(part)[1:] for part in parts], axis=0)
    padded = []
    for part in parts:
        missing = longest - tf.shape(part)[1:]
        behind = tf.concat([[0], missing], axis=0)
        padded.append(
            tf.pad(part, tf.stack([tf.zeros_like(behind), behind], 1))
        )
    whole = tf.concat(padded, axis=0)
    known = [
        dims[0] if len(set(dims)) == 1 else None
        for dims in zip(*(each.as_list() for each in inner), strict=True)
    ]
    whole.set_shape([None, *known])
    return whole


def _with_gradient_over_weight(value: Any, this: Replica) -> Any:
    """A tensor whose gradient is scaled by 1 / weight of the replica."""
    if isinstance(value, tf.SparseTensor):
        return value
    if isinstance(value, tf.RaggedTensor):
        return value.with_flat_values(
            _with_gradient_over_weight(value.flat_values, this)
        )
    if not value.dtype.is_floating:
        return value
    inverse_weight = this.inverse_weight()

    @tf.custom_gradient
    def scaled(x: tf.Tensor) -> Any:
        return tf.identity(x), lambda dy: scale(dy, inverse_weight)

    return scaled(value)


def _values_of_replica(
    value: tf.Tensor, rows: Rows, this: Replica
) -> tf.Tensor:
    """The values of this replica, with the gradient of those of all.

    Keras adds values up that are not reduced.
    """
    own = rows.of_replica(value)
    total = scale(tf.reduce_sum(value), this.weight)
    part = (total - tf.stop_gradient(total)) / tf.cast(
        tf.maximum(tf.size(own), 1), value.dtype
    )
    return tf.stop_gradient(own) + part


def _sums_of_rows(value: tf.Tensor) -> tf.Tensor:
    """One number for each row, that no output keeps constant."""
    value = tf.cast(value, tf.float32)
    flat = tf.reshape(value, [tf.shape(value)[0], -1])
    return tf.reduce_sum(flat * flat + flat, axis=1)
