"""How a tensor is summed between workers: which collectives, in which dtype.

In its own dtype a tensor goes round TensorFlow's ring, and a small one is
exchanged at once, which takes one trip instead of two. In a narrower dtype the
workers exchange what they have and sum in the tensor's own dtype, which the
ring cannot: it would round after each addition.

2 workers: each sends all it has, both sum          1 rounding of each part
more:      worker w gets chunk w of all and sums    1 rounding of each part,
           it; then all chunks go to all            and 1 of the sum

Both send 2 (W - 1) / W of the bytes, as the ring does, and all workers get the
same bits.
"""

import tensorflow as tf

from keras_allreduce.workers.collectives import Collectives

WIRE_DTYPES = ("bfloat16", "float16")


def small_bytes(num_workers: int) -> int:
    """Up to this size the time of a trip costs more than the bytes.

    Between 2 workers an exchange sends no more than the ring does, in one trip,
    but copies more.
    """
    return 2**18 if num_workers == 2 else 2**14


class Wire:
    """Sums between workers.

    Args:
        collectives: The collectives between the workers.
        num_workers: Number of workers.
        dtype: One of `WIRE_DTYPES` in which wider floats cross, or `None`:
            everything crosses in its own dtype.
    """

    def __init__(
        self,
        collectives: Collectives,
        num_workers: int,
        dtype: str | None = None,
    ):
        self._collectives = collectives
        self._num_workers = num_workers
        self._dtype = None if dtype is None else tf.as_dtype(dtype)

    @property
    def device(self) -> str:
        """Host device of this worker, where the results are."""
        return self._collectives.device

    def all_reduce(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sums `tensor`, of one shape and dtype on all workers.

        Args:
            tensor: The part of this worker.
            purpose: What it is for, the same on all workers.

        Returns:
            The sum in the shape and dtype of `tensor`, bit for bit the same
            on all workers, on the host device.
        """
        wire = self.dtype_of(tensor.dtype)
        small = _nbytes(tensor) <= small_bytes(self._num_workers)
        if wire == tensor.dtype and not small:
            return self._collectives.all_reduce(tensor, purpose)
        with tf.device(self._collectives.device):
            if small or self._num_workers == 2:
                total = self._exchange(tf.cast(tensor, wire), purpose)
            else:
                total = self._exchange_chunks(tf.cast(tensor, wire), purpose)
            total = tf.cast(total, tensor.dtype)
            total.set_shape(tensor.shape)
            return total

    def all_gather_rows(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates tensors that may differ in length along axis 0."""
        with tf.device(self._collectives.device):
            rows = tf.cast(tensor, self.dtype_of(tensor.dtype))
            gathered = self._collectives.all_gather_rows(rows, purpose)
            return tf.cast(gathered, tensor.dtype)

    def dtype_of(self, dtype: tf.DType) -> tf.DType:
        """The dtype in which tensors of `dtype` cross."""
        if self._dtype is None or not dtype.is_floating:
            return dtype
        return self._dtype if self._dtype.size < dtype.size else dtype

    def _exchange(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        gathered = self._collectives.all_gather(tensor[tf.newaxis], purpose)
        return _sum(gathered, self._num_workers)

    def _exchange_chunks(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        size = tf.size(tensor)
        flat = tf.pad(
            tf.reshape(tensor, [-1]), [[0, -size % self._num_workers]]
        )
        chunks = tf.reshape(flat, [self._num_workers, -1])
        mine = _sum(
            self._collectives.all_to_all(chunks, f"chunks of {purpose}"),
            self._num_workers,
        )
        sums = self._collectives.all_gather(
            tf.cast(mine, tensor.dtype), purpose
        )
        return tf.reshape(sums[:size], tf.shape(tensor))


def _sum(parts: tf.Tensor, count: int) -> tf.Tensor:
    """Sums along axis 0 in the order of the workers, in 32 bits or more."""
    wide = parts.dtype.is_floating and parts.dtype.size < 4
    if wide:
        parts = tf.cast(parts, tf.float32)
    return tf.add_n(tf.unstack(parts, count))


def _nbytes(tensor: tf.Tensor) -> float:
    elements = tensor.shape.num_elements()
    return float("inf") if elements is None else elements * tensor.dtype.size
