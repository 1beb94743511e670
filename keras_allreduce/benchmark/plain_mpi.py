"""MPI_Allreduce without TensorFlow, as the rival of the sums over MPI."""

import time
from typing import Any

import numpy as np
import tensorflow as tf

from keras_allreduce.benchmark.timed_loop import Message
from keras_allreduce.reduce.observe import BatchRecord
from keras_allreduce.workers.mpi import library


class PlainMpi:
    """Sums one gradient after the other with blocking calls, on arrays.

    What osu_allreduce measures, with the messages of this benchmark. Parts of
    several devices of a worker are added before the clock starts.

    Args:
        message: The message.
    """

    def __init__(self, message: Message):
        self.gradients = message.gradients
        self._message = message
        self._comm = library.load().COMM_WORLD
        # TensorFlow sends nothing.
        self.records: list[BatchRecord] = []

    def seconds(self, values: Any, number: tf.Tensor, loops: int) -> float:
        """Returns the time of one sum: see `TimedLoop`.

        Args:
            values: What `Message.make` gave.
            number: For which round.
            loops: How often to sum them.

        Raises:
            WrongSumError: If a sum is wrong.
        """
        local = self._message.strategy.experimental_local_results(values)
        owns = [
            np.ascontiguousarray(np.sum([part.numpy() for part in parts], 0))
            for parts in zip(*local, strict=True)
        ]
        totals = [np.empty_like(own) for own in owns]
        self._comm.Barrier()
        start = time.perf_counter()
        for _ in range(loops):
            for own, total in zip(owns, totals, strict=True):
                self._comm.Allreduce(own, total)
        elapsed = time.perf_counter() - start
        self._message.check([tf.constant(total) for total in totals], number)
        return elapsed / loops


def can_sum(message: Message) -> bool:
    """Whether MPI has a type for every gradient: none for 16-bit floats."""
    return all(
        not gradient.dtype.is_floating or gradient.dtype.size >= 4
        for gradient in message.gradients
    )
