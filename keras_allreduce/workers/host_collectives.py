"""Defines `HostCollectives`: the engine between workers, as a wire uses it.

`collectives.py` has them over gRPC, `mpi/collectives.py` over MPI. In all of
them `purpose` names the purpose of a tensor, the same on all workers, and
results are on the logical CPU device of this worker, bit for bit equal on all.
"""

from collections.abc import Sequence
from typing import Protocol

import tensorflow as tf


class HostCollectives(Protocol):
    """Collectives of one logical CPU device of each worker."""

    @property
    def medium(self) -> str:
        """The transport between workers, for the plan line."""

    @property
    def device(self) -> str:
        """Host device of this worker, where the results are."""

    def sums(self, tensor: tf.Tensor) -> bool:
        """Whether `all_reduce` is the way to sum `tensor`; else exchange it."""

    def all_reduce(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sums `tensor`, of one shape and dtype on all workers."""

    def all_gather(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates `tensor`, of one shape on all workers, along axis 0."""

    def all_to_all(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sends row w of `tensor` to worker w, and returns one row of each."""

    def all_gather_rows(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates tensors that may differ in length along axis 0."""


_WORD = tf.int32
"""What every engine can gather."""


def all_gather_tensors(
    tensors: Sequence[tf.Tensor],
    purpose: str,
    collectives: HostCollectives,
    num_workers: int,
) -> list[list[tf.Tensor]]:
    """The tensors of each worker: `[worker][tensor]`, on the CPU.

    Args:
        tensors: Tensors of known rank, of which numbers of rows may differ
            between workers, and dimensions that are not known.
        purpose: Their purpose, the same on all workers.
        collectives: The collectives between the workers.
        num_workers: Number of workers.
    """
    with tf.device(collectives.device):
        tensors = [tf.identity(tensor) for tensor in tensors]
        shapes = [tf.shape(tensor) for tensor in tensors]
        words = [_words(tensor) for tensor in tensors]
        gathered = tf.reshape(
            collectives.all_gather(
                tf.concat(shapes, axis=0), f"shapes of {purpose}"
            ),
            [num_workers, -1],
        )
        shapes_of = [
            tf.split(row, [len(tensor.shape) for tensor in tensors])
            for row in tf.unstack(gathered, num_workers)
        ]
        counts_of = [
            [
                _num_words(shape, tensor.dtype)
                for shape, tensor in zip(shapes, tensors, strict=True)
            ]
            for shapes in shapes_of
        ]
        longest = tf.reduce_max([tf.add_n(counts) for counts in counts_of])
        sent = tf.concat(words, axis=0)
        padded = tf.pad(sent, [[0, longest - tf.size(sent)]])
        padded = tf.ensure_shape(padded, [None])
        rows = tf.reshape(
            collectives.all_gather(padded, purpose), [num_workers, -1]
        )
        return [
            [
                _tensor(part, shape, like)
                for part, shape, like in zip(
                    tf.split(row[: tf.add_n(counts)], counts),
                    shapes,
                    tensors,
                    strict=True,
                )
            ]
            for row, counts, shapes in zip(
                tf.unstack(rows, num_workers),
                counts_of,
                shapes_of,
                strict=True,
            )
        ]


def _words(tensor: tf.Tensor) -> tf.Tensor:
    """The bytes of a tensor as a vector of 32-bit words."""
    if tensor.dtype == tf.bool:
        tensor = tf.cast(tensor, tf.uint8)
    flat = tf.reshape(tensor, [-1])
    if tensor.dtype != tf.uint8:
        flat = tf.reshape(tf.bitcast(flat, tf.uint8), [-1])
    flat = tf.pad(flat, [[0, -tf.size(flat) % _WORD.size]])
    return tf.bitcast(tf.reshape(flat, [-1, _WORD.size]), _WORD)


def _num_words(shape: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return -(-tf.reduce_prod(shape) * dtype.size // _WORD.size)


def _tensor(words: tf.Tensor, shape: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """The tensor of a shape that `_words` has made words of."""
    dtype = tf.uint8 if like.dtype == tf.bool else like.dtype
    flat = tf.reshape(tf.bitcast(words, tf.uint8), [-1])
    flat = flat[: tf.reduce_prod(shape) * dtype.size]
    if dtype.size > 1:
        flat = tf.reshape(flat, [-1, dtype.size])
    if dtype != tf.uint8:
        flat = tf.bitcast(flat, dtype)
    tensor = tf.reshape(flat, shape)
    if like.dtype == tf.bool:
        tensor = tf.cast(tensor, tf.bool)
    return tf.ensure_shape(tensor, [None, *like.shape[1:]])
