"""Sums a tensor between workers: which collectives, in which format.

As it is a tensor goes round TensorFlow's ring, and a small one is exchanged at
once, in one round trip instead of two. In another format the workers exchange
their tensors and sum in the tensor's own dtype, which the ring cannot: it
would round after each addition.

2 workers: each sends all it has, both sum          1 rounding of each part
more:      worker w gets chunk w of all and sums    1 rounding of each part,
           it; then all chunks go to all            and 1 of the sum

Both send 2 (W - 1) / W of the bytes, as the ring does, and all workers get the
same bits.
"""

import tensorflow as tf

from keras_allreduce.compat.distribute import ResourceVariable
from keras_allreduce.graph_order import keep_with_graph
from keras_allreduce.reduce.pack_sizes import small_bytes
from keras_allreduce.reduce.packing import nbytes_of
from keras_allreduce.workers.host_collectives import HostCollectives
from keras_allreduce.workers.wire_formats import (
    EXACT,
    WireFormat,
    is_stateful,
)


class Wire:
    """Sums between workers.

    Args:
        collectives: The collectives between the workers.
        num_workers: Number of workers.
        wire_format: Format of the tensors that it carries; others cross as
            they are.
    """

    def __init__(
        self,
        collectives: HostCollectives,
        num_workers: int,
        wire_format: WireFormat = EXACT,
    ):
        self._collectives = collectives
        self._num_workers = num_workers
        self._format = wire_format

    @property
    def device(self) -> str:
        """Host device of this worker, where the results are."""
        return self._collectives.device

    @property
    def medium(self) -> str:
        """The transport between the workers."""
        return self._collectives.medium

    def all_reduce(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sums `tensor`, of one shape and dtype on all workers.

        Args:
            tensor: The part of this worker.
            purpose: Its purpose, the same on all workers.

        Returns:
            The sum in the shape and dtype of `tensor`, bit for bit the same
            on all workers, on the logical CPU device.
        """
        wire_format = self.format_of(tensor.dtype)
        if not is_stateful(wire_format) or tf.executing_eagerly():
            return self._sum(wire_format, tensor, purpose)

        def exchange(part: tf.Tensor) -> tf.Tensor:
            return self._sum(self.format_of(part.dtype), part, purpose)

        with tf.device(self._collectives.device):
            total = wire_format.all_reduce(
                tensor, _new_state(wire_format, tensor), exchange
            )
            return tf.ensure_shape(tf.cast(total, tensor.dtype), tensor.shape)

    def _sum(
        self, wire_format: WireFormat, tensor: tf.Tensor, purpose: str
    ) -> tf.Tensor:
        """The sum of `tensor`, encoded as the format does."""
        nbytes = nbytes_of(tensor)
        small = nbytes is not None and nbytes <= small_bytes(self._num_workers)
        if wire_format is EXACT and self._collectives.sums(tensor):
            return self._collectives.all_reduce(tensor, purpose)
        with tf.device(self._collectives.device):
            if small or self._num_workers == 2:
                rows = tensor[tf.newaxis]
                total = self._exchange(wire_format, rows, purpose)
            else:
                total = self._exchange_chunks(wire_format, tensor, purpose)
            total = tf.cast(total, tensor.dtype)
            total.set_shape(tensor.shape)
            return total

    def all_gather_rows(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates tensors that may differ in length along axis 0."""
        wire_format = self.format_of(tensor.dtype)
        with tf.device(self._collectives.device):
            rows = wire_format.encode(tensor)
            gathered = self._collectives.all_gather_rows(rows, purpose)
            return wire_format.decode(gathered, tensor)

    def format_of(self, dtype: tf.DType) -> WireFormat:
        """The format in which tensors of `dtype` cross."""
        return self._format if self._format.carries(dtype) else EXACT

    def _exchange(
        self, wire_format: WireFormat, rows: tf.Tensor, purpose: str
    ) -> tf.Tensor:
        """The sum of the one row of each worker."""
        encoded = wire_format.encode(rows)
        gathered = self._collectives.all_gather(encoded, purpose)
        return _sum(wire_format.decode(gathered, rows), self._num_workers)

    def _exchange_chunks(
        self, wire_format: WireFormat, tensor: tf.Tensor, purpose: str
    ) -> tf.Tensor:
        """The same, where each worker sums one chunk of all tensors."""
        size = tf.size(tensor)
        flat = tf.pad(
            tf.reshape(tensor, [-1]), [[0, -size % self._num_workers]]
        )
        # chunks[worker] is a row, and its sum one row again.
        chunks = tf.reshape(flat, [self._num_workers, 1, -1])
        crossed = self._collectives.all_to_all(
            wire_format.encode(chunks), f"chunks of {purpose}"
        )
        mine = _sum(wire_format.decode(crossed, chunks), self._num_workers)
        gathered = self._collectives.all_gather(
            wire_format.encode(mine), purpose
        )
        sums = tf.reshape(wire_format.decode(gathered, mine), [-1])
        return tf.reshape(sums[:size], tf.shape(tensor))


def _new_state(
    wire_format: WireFormat, tensor: tf.Tensor
) -> dict[str, tf.Variable]:
    """The variables of one pack, which live as long as its graph.

    So models, and traces of one step for several batch sizes, share nothing.
    """
    spec = tf.TensorSpec(tensor.shape, tensor.dtype)
    with tf.init_scope():
        state = {
            name: ResourceVariable(value, trainable=False)
            for name, value in wire_format.state(spec).items()
        }
    keep_with_graph(state)
    return state


def _sum(rows: tf.Tensor, count: int) -> tf.Tensor:
    """Sums rows in the order of the workers, in 32 bits or more."""
    if rows.dtype.is_floating and rows.dtype.size < 4:
        rows = tf.cast(rows, tf.float32)
    return tf.add_n(tf.unstack(rows, count))
