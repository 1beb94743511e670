"""Every format in which a tensor crosses between workers.

    rows[row, ...]      as the step has them
        |  encode
    crossed[row, ...]   exchanged by the workers
        |  decode
    rows[row, ...]      in their own dtype again, and summed there

A new format is a subclass of `WireFormat` and an entry in `WIRE_FORMATS`.
"""

import tensorflow as tf


class WireFormat:
    """How tensors cross between workers.

    Attributes:
        name: Value of the argument `wire_dtype`; the plan line shows it.
    """

    name: str

    def carries(self, dtype: tf.DType) -> bool:
        """Whether tensors of `dtype` cross in this format; else as they are."""
        raise NotImplementedError

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Encodes each row by itself: they may go to different workers.

        Args:
            rows: Tensor of a dtype that the format carries, of any shape but
                `[]`.

        Returns:
            Tensor of any shape with as many rows along axis 0, in a dtype
            that TensorFlow's collectives move: float16, float32, float64,
            int32 or int64.
        """
        raise NotImplementedError

    def decode(self, crossed: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Decodes rows that `encode` made, on this or on another worker.

        Args:
            crossed: Tensor as `encode` returns it, of any number of rows.
            like: What was encoded here, for the dtype and the shape of a row.

        Returns:
            As many rows as `crossed` has, in the dtype of `like`.
        """
        raise NotImplementedError

    def nbytes(self, nbytes: float, dtype: tf.DType) -> float:
        """Returns the bytes that cross for `nbytes` bytes of `dtype`."""
        raise NotImplementedError

    def sum_dtype(self, dtype: tf.DType) -> tf.DType | None:
        """Dtype in which one op may move and add up tensors of `dtype`.

        NCCL and TensorFlow's eager collectives do. `None`: they must not add
        up this format. Then packs of GPUs cross from the host, and what is
        summed eagerly crosses as it is.
        """
        return None


class Exact(WireFormat):
    """Tensors cross bit for bit."""

    name = "exact"

    def carries(self, dtype: tf.DType) -> bool:
        """Carries every dtype."""
        return True

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns the rows, in a dtype of the same size that can be moved."""
        return _movable(rows)

    def decode(self, crossed: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Returns the same bits in their own dtype."""
        return _moved(crossed, like.dtype)

    def nbytes(self, nbytes: float, dtype: tf.DType) -> float:
        """Returns the same number."""
        return nbytes

    def sum_dtype(self, dtype: tf.DType) -> tf.DType | None:
        """Returns the same dtype."""
        return dtype


class Narrow(WireFormat):
    """Floats cross in a narrower dtype, each rounded once.

    Args:
        dtype: A dtype of floats; wider ones are carried.
    """

    def __init__(self, dtype: tf.DType):
        self.name = dtype.name
        self._dtype = dtype

    def carries(self, dtype: tf.DType) -> bool:
        """Carries wider floats."""
        return dtype.is_floating and self._dtype.size < dtype.size

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Rounds every number."""
        return _movable(tf.cast(rows, self._dtype))

    def decode(self, crossed: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Returns the rounded numbers in the wider dtype."""
        return tf.cast(_moved(crossed, self._dtype), like.dtype)

    def nbytes(self, nbytes: float, dtype: tf.DType) -> float:
        """Returns a half of float32, a quarter of float64."""
        return nbytes * self._dtype.size / dtype.size

    def sum_dtype(self, dtype: tf.DType) -> tf.DType | None:
        """Returns the narrower dtype: sums are rounded to it as well."""
        return self._dtype


# TensorFlow's collectives move no bfloat16, whose bits float16 can hold.


def _movable(rows: tf.Tensor) -> tf.Tensor:
    if rows.dtype == tf.bfloat16:
        return tf.bitcast(rows, tf.float16)
    return rows


def _moved(crossed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    if dtype == tf.bfloat16:
        return tf.bitcast(crossed, tf.bfloat16)
    return crossed


EXACT = Exact()

WIRE_FORMATS: dict[str, WireFormat] = {
    "exact": EXACT,
    "bfloat16": Narrow(tf.bfloat16),
    "float16": Narrow(tf.float16),
}
"""By name. `wire_dtype` takes all but "exact", which is what `None` means."""


def wire_dtypes() -> list[str]:
    """The values of the argument `wire_dtype` besides `None`."""
    return [name for name in WIRE_FORMATS if name != EXACT.name]
