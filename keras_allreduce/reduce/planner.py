"""Plans a batch before there is one, as `BatchAllReduce` plans it then."""

from collections.abc import Sequence

import tensorflow as tf

from keras_allreduce.reduce import algorithms
from keras_allreduce.reduce.batch import Batch, dense_and_sparse
from keras_allreduce.reduce.in_process import InProcess
from keras_allreduce.reduce.plan import ReducePlan
from keras_allreduce.reduce.sparse import RowsSpec
from keras_allreduce.reduce.transport import Transport


class Planner:
    """The half of `BatchAllReduce` that needs no gradients.

    Attributes:
        algorithm: See `BatchAllReduce`.
        bytes_per_pack: See `BatchAllReduce`.
        sparse_as_dense: See `BatchAllReduce`.
    """

    _transport: Transport = InProcess()

    algorithm: str
    bytes_per_pack: int
    sparse_as_dense: bool

    def choose(self, devices: Sequence[str]) -> tuple[str, str]:
        """The algorithm for these devices, and why if it was not asked for.

        Raises:
            ValueError: If the algorithm asked for cannot run on `devices`.
        """
        algorithm, reason = algorithms.choose(self.algorithm, devices)
        return algorithm.name, reason

    def plan(
        self,
        gradients: Sequence[tf.TensorSpec | RowsSpec],
        devices: Sequence[str],
    ) -> ReducePlan:
        """The plan of gradients that are not there yet, as `sum` makes it.

        Args:
            gradients: A `tf.TensorSpec` for each dense gradient and a
                `RowsSpec` for each sparse one.
            devices: Device of each replica of this process.
        """
        algorithm, reason = algorithms.choose(self.algorithm, devices)
        if self.sparse_as_dense:
            gradients = [tf.TensorSpec(g.shape, g.dtype) for g in gradients]
        batch = Batch(
            *dense_and_sparse([[spec] * len(devices) for spec in gradients]),
            tuple(devices),
            algorithm,
            self._transport,
        )
        return batch.plan(batch.buckets(self.bytes_per_pack), reason)
