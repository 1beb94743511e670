"""One timed call: a tf.function that all-reduces in a loop, and its check.

    wait for the last result ──> all-reduce ──> look at every result ──┐
         ^           on each replica            on each replica        │
         └─────────────────────────── next loop ───────────────────────┘

The all-reduce is that of a training step: `extended.batch_reduce_to` of the
strategy over the gradients of its replicas. Each replica starts the next one
when it has all results of the last, as in nccl-tests.

Values are small integers, so that sums are exact in any order. In each loop
the first element of each result is compared on each replica, which also keeps
TensorFlow from leaving out sums that nobody reads; after the last loop, when
the time is taken, every element is.

`plain_mpi_seconds` is the rival of sums over MPI, without TensorFlow.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_allreduce.reduce.observe import BatchRecord, observe

# Elements cycle through 0 to 4, times 1 to 3 by replica: no two neighbours,
# nor neighbouring replicas, gradients or rounds, have the same.
_PERIOD = 5
_WEIGHTS = 3
_ROW = 1024 * _PERIOD

# Integers up to here are exact.
_LARGEST_EXACT = {tf.float16: 2**11, tf.bfloat16: 2**8}


@dataclass(frozen=True)
class Gradient:
    """Shape and dtype of a gradient."""

    shape: tuple[int, ...]
    dtype: tf.DType

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(tf.TensorShape(self.shape).num_elements())

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * int(self.dtype.size)


class WrongSumError(RuntimeError):
    """An all-reduce gave something else than the sum."""


class Message:
    """Gradients on all replicas, whose sum is known.

    Args:
        strategy: Gives the replicas.
        gradients: The gradients of each replica.

    Raises:
        ValueError: If a dtype cannot hold the sum exactly.
    """

    def __init__(self, strategy: Any, gradients: Sequence[Gradient]):
        self.strategy = strategy
        self.gradients = gradients
        replicas = strategy.num_replicas_in_sync
        self._weight = sum(1 + rank % _WEIGHTS for rank in range(replicas))
        for dtype in {gradient.dtype for gradient in gradients}:
            largest = (_PERIOD - 1) * self._weight
            if largest > _LARGEST_EXACT.get(dtype, 2**24):
                raise ValueError(
                    f"{dtype.name} does not hold the sum over {replicas} "
                    "replicas exactly. Pass another --dtype."
                )

    @tf.function(reduce_retracing=True)
    def make(self, number: tf.Tensor) -> Any:
        """Gradients of round `number`, as distributed values."""

        def on_replica() -> list[tf.Tensor]:
            context = tf.distribute.get_replica_context()
            weight = 1 + context.replica_id_in_sync_group % _WEIGHTS
            return self._values(number, weight)

        return self.strategy.run(on_replica)

    def firsts(self, number: tf.Tensor) -> tf.Tensor:
        """First element of the sum of each gradient, as int32."""
        start = tf.range(len(self.gradients)) + number
        return start % _PERIOD * self._weight

    def check(self, sums: Any, number: tf.Tensor) -> None:
        """Compares every element on every replica of this worker.

        Raises:
            WrongSumError: If one is wrong.
        """
        by_replica = self.strategy.experimental_local_results(
            self._count_wrong(sums, number)
        )
        for replica, counts in enumerate(by_replica):
            for index, wrong in enumerate(counts.numpy()):
                if wrong:
                    gradient = self.gradients[index]
                    raise WrongSumError(
                        f"The sum must be exact. Received: {wrong} of "
                        f"{gradient.elements} elements wrong in gradient "
                        f"{index} ({gradient.dtype.name}, shape "
                        f"{gradient.shape}) on replica {replica}"
                    )

    @tf.function(reduce_retracing=True)
    def _count_wrong(self, sums: Any, number: tf.Tensor) -> Any:
        def on_replica(sums: list[tf.Tensor]) -> tf.Tensor:
            right = self._values(number, self._weight)
            return tf.stack(
                [
                    tf.math.count_nonzero(total != expected)
                    for total, expected in zip(sums, right, strict=True)
                ]
            )

        return self.strategy.run(on_replica, args=(sums,))

    def _values(self, number: tf.Tensor, weight: Any) -> list[tf.Tensor]:
        values = []
        for index, gradient in enumerate(self.gradients):
            row = (tf.range(_ROW) + index + number) % _PERIOD * weight
            rows = -(-gradient.elements // _ROW)
            flat = tf.tile(tf.cast(row, gradient.dtype), [rows])
            values.append(tf.reshape(flat[: gradient.elements], gradient.shape))
        return values


class TimedLoop:
    """All-reduces a message many times in one call.

    Args:
        message: The message.
        strategy: Reduces it, on the replicas of the message's.
        bytes_per_pack: Capacity of a pack; 0: the default.
    """

    def __init__(self, message: Message, strategy: Any, bytes_per_pack: int):
        self._message = message
        self._strategy = strategy
        self._options = tf.distribute.experimental.CommunicationOptions(
            bytes_per_pack=bytes_per_pack
        )
        # The plan of one all-reduce, once it is traced.
        self.records: list[BatchRecord] = []

    def seconds(self, values: Any, number: tf.Tensor, loops: int) -> float:
        """Reduces `values`, checks the sums, and returns the time of one.

        Args:
            values: What `Message.make` gave.
            number: For which round.
            loops: How often to reduce them.

        Raises:
            WrongSumError: If a sum is wrong.
        """
        more = tf.constant(loops - 1)
        local = self._strategy.experimental_local_results
        # All workers begin when the last of them is ready.
        _wait_for_all(self._strategy)
        start = time.perf_counter()
        sums, all_right = self._run(values, number, more)
        right = [bool(one.numpy()) for one in local(all_right)]
        elapsed = time.perf_counter() - start
        self._message.check(sums, number)
        if not all(right):
            raise WrongSumError(
                "The sum must be exact. Received: a wrong first element on "
                f"replica {right.index(False)} in one of {loops} loops"
            )
        return elapsed / loops

    @tf.function(reduce_retracing=True)
    def _run(self, values: Any, number: tf.Tensor, more: tf.Tensor) -> Any:
        firsts = self._message.firsts(number)
        right = self._strategy.run(lambda: tf.constant(True))
        _, right = tf.while_loop(
            lambda loop, _: loop < more,
            lambda loop, right: (
                loop + 1,
                self._reduce(values, right, firsts)[1],
            ),
            (tf.constant(0), right),
            parallel_iterations=1,
        )
        with observe() as self.records:
            return self._reduce(values, right, firsts)

    def _reduce(self, values: Any, right: Any, firsts: tf.Tensor) -> Any:
        gradients = self._strategy.run(_after, args=(values, right))
        sums = self._strategy.extended.batch_reduce_to(
            tf.distribute.ReduceOp.SUM,
            [(gradient, gradient) for gradient in gradients],
            self._options,
        )
        return self._strategy.run(_look_at, args=(sums, right, firsts))


def plain_mpi_seconds(
    comm: Any, message: Message, values: Any, number: tf.Tensor, loops: int
) -> float:
    """Returns the time of one sum of MPI_Allreduce: see `TimedLoop.seconds`.

    What osu_allreduce measures, with the messages of this benchmark: one array
    after the other, with blocking calls. Parts of several devices of a worker
    are added before the clock starts.

    Args:
        comm: Communicator of mpi4py with all workers.
        message: The message.
        values: What `Message.make` gave.
        number: For which round.
        loops: How often to sum them.

    Raises:
        WrongSumError: If a sum is wrong.
    """
    local = message.strategy.experimental_local_results(values)
    owns = [
        np.ascontiguousarray(np.sum([part.numpy() for part in parts], 0))
        for parts in zip(*local, strict=True)
    ]
    totals = [np.empty_like(own) for own in owns]
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(loops):
        for own, total in zip(owns, totals, strict=True):
            comm.Allreduce(own, total)
    elapsed = time.perf_counter() - start
    message.check([tf.constant(total) for total in totals], number)
    return elapsed / loops


def mpi_can_sum(message: Message) -> bool:
    """Whether MPI has a type for every gradient: none for 16-bit floats."""
    return all(
        not gradient.dtype.is_floating or gradient.dtype.size >= 4
        for gradient in message.gradients
    )


def _after(values: list[tf.Tensor], right: tf.Tensor) -> list[tf.Tensor]:
    with tf.control_dependencies([right]):
        return [tf.identity(value) for value in values]


def _look_at(
    sums: list[tf.Tensor], right: tf.Tensor, firsts: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    by_dtype: dict[tf.DType, list[int]] = {}
    for index, total in enumerate(sums):
        by_dtype.setdefault(total.dtype, []).append(index)
    for dtype, indices in by_dtype.items():
        seen = tf.stack([tf.reshape(sums[index], [-1])[0] for index in indices])
        expected = tf.cast(tf.gather(firsts, indices), dtype)
        right &= tf.reduce_all(seen == expected)
    return [tf.identity(total) for total in sums], right


def _wait_for_all(strategy: Any) -> None:
    if strategy.extended.num_workers > 1:
        strategy.reduce("SUM", tf.constant(1.0), axis=None)
