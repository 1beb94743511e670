"""Every format in which a tensor crosses between workers.

    rows[row, ...]      as the step has them
        |  encode
    crossed[row, ...]   exchanged by the workers
        |  decode
    rows[row, ...]      in their own dtype again, and summed there

A format that needs more than that, such as the rounding error of earlier
steps, keeps it in the state of a pack, and sums the pack itself:

    pack --> format.all_reduce(pack, state, exchange) --> sum
                                  exchange(tensor): encode, cross, decode, sum

A new format is a subclass of `WireFormat`, given to a strategy as
`compression=`. Those in `WIRE_FORMATS` have a name besides: they are exact for
small integers, and round each element relative to its own size.
"""

from collections.abc import Callable, Mapping

import tensorflow as tf


class WireFormat:
    """How gradients cross between workers: what `compression=` takes.

    A subclass gives it a `name` and overrides `carries`, `encode`, `decode`
    and `nbytes`. To keep something from step to step, it overrides `state` and
    `all_reduce` too, as a communication hook of PyTorch DDP does:

    ```python
    class ErrorFeedback(keras_allreduce.WireFormat):
        name = "feedback"
        ...

        def state(self, pack):
            return {"error": tf.zeros(pack.shape, pack.dtype)}

        def all_reduce(self, pack, state, exchange):
            wanted = pack + state["error"]
            row = wanted[tf.newaxis]
            sent = self.decode(self.encode(row), row)[0]
            state["error"].assign(wanted - sent)
            return exchange(sent)
    ```

    A format may lose anything that training can do without. Only those in
    `WIRE_FORMATS`, which have a name for `wire_dtype`, promise more: small
    integers are exact, and the rounding of an element is relative to it.

    Attributes:
        name: The plan line shows it, and all workers must have the same.
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
            like: The rows encoded here, for the dtype and the shape of a row.

        Returns:
            As many rows as `crossed` has, in the dtype of `like`.
        """
        raise NotImplementedError

    def nbytes(self, nbytes: float, dtype: tf.DType) -> float:
        """Returns the bytes that cross for `nbytes` bytes of `dtype`."""
        raise NotImplementedError

    def state(self, pack: tf.TensorSpec) -> Mapping[str, tf.Tensor]:
        """Returns the state that is kept for a pack from step to step.

        Called once per pack of each traced step. A step that is traced again,
        for batches of another shape, begins anew.

        Args:
            pack: Spec of shape `[n]` of the pack, in a dtype that the format
                carries.

        Returns:
            Initial values by name. Each worker has its own; they are not
            saved with the model. `{}`: nothing is kept.
        """
        return {}

    def all_reduce(
        self,
        pack: tf.Tensor,
        state: Mapping[str, tf.Variable],
        exchange: Callable[[tf.Tensor], tf.Tensor],
    ) -> tf.Tensor:
        """Sums a pack over the workers.

        Args:
            pack: Tensor of shape `[n]`: this worker's sum of a pack.
            state: Variables with the names and values of `state`.
            exchange: Sums a tensor over the workers, in this format; must be
                called for the same shapes in the same order on all workers.

        Returns:
            The sum in the shape and dtype of `pack`, the same bits on all
            workers, which holds for what `exchange` returns.
        """
        return exchange(pack)

    def sum_dtype(self, dtype: tf.DType) -> tf.DType | None:
        """Dtype in which one op may move and add up tensors of `dtype`.

        NCCL and TensorFlow's eager collectives do. `None`: they must not add
        up this format. Then packs of GPUs cross from the host, and eager
        tensors cross as they are.
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


def is_stateful(wire_format: WireFormat) -> bool:
    """Whether a format sums packs itself."""
    return type(wire_format).all_reduce is not WireFormat.all_reduce


def wire_dtypes() -> list[str]:
    """The values of the argument `wire_dtype` besides `None`."""
    return [name for name in WIRE_FORMATS if name != EXACT.name]
