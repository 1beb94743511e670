"""PowerSGD between workers, with error feedback, as a custom `WireFormat`.

A pack is taken for a matrix M of about as many rows as columns, and only its
product of low rank P Q^T crosses (Vogels et al. 2019, arXiv:1905.13727).

    python -m keras_allreduce.launch --workers 2 examples/powersgd.py
"""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_allreduce


class PowerSGD(keras_allreduce.WireFormat):
    """Sends the nearest matrix of a low rank that it can find in one step."""

    def __init__(self, rank: int = 4):
        self.name = f"powersgd rank {rank}"
        self.rank = rank

    def carries(self, dtype: tf.DType) -> bool:
        """Whether gradients of this dtype cross in this format."""
        return bool(dtype == tf.float32)

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Leaves P and Q unchanged."""
        return rows

    def decode(self, crossed: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Leaves P and Q unchanged."""
        return crossed

    def side(self, size: float) -> int:
        """Rows and columns of the matrix of a pack."""
        return math.ceil(math.sqrt(size))

    def nbytes(self, nbytes: int, dtype: tf.DType) -> float:
        """Bytes of P and Q, for the plan line."""
        return min(nbytes, 2 * 4 * self.rank * self.side(nbytes / 4))

    def state(self, pack: tf.Tensor) -> dict[str, tf.Tensor]:
        """Initial Q, and what has not been sent yet."""
        side = self.side(pack.shape[0])
        q = tf.random.stateless_normal([side, self.rank], seed=[1, side])
        return {"q": q, "error": tf.zeros(pack.shape)}

    def all_reduce(self, pack: tf.Tensor, state: Any, exchange: Any) -> Any:
        """One power iteration: P crosses, then Q."""
        side = self.side(pack.shape[0])
        wanted = pack + state["error"]
        padded = tf.pad(wanted, [[0, side * side - pack.shape[0]]])
        matrix = tf.reshape(padded, [side, side])
        p, _ = tf.linalg.qr(exchange(matrix @ state["q"]))
        own = tf.matmul(matrix, p, transpose_a=True)
        state["error"].assign(wanted - self.pack_of(p, own, pack))
        total = exchange(own)
        state["q"].assign(total)
        return self.pack_of(p, total, pack)

    def pack_of(self, p: Any, q: Any, pack: tf.Tensor) -> tf.Tensor:
        """The pack that P Q^T stands for."""
        matrix = tf.matmul(p, q, transpose_b=True)
        return tf.reshape(matrix, [-1])[: pack.shape[0]]


def main() -> None:
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        compression=PowerSGD(rank=2)
    )
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).normal(size=(96, 16)).astype("float32")
    y = x @ np.ones((16, 4), "float32")
    with strategy.scope():
        model = keras.Sequential(
            [keras.layers.Dense(24), keras.layers.Dense(4)]
        )
        model.compile(keras.optimizers.SGD(0.02), "mse")
    model.fit(x, y, batch_size=16, epochs=6, verbose=2)
    print("weights", [w.ravel().tolist() for w in model.get_weights()])


if __name__ == "__main__":
    main()
