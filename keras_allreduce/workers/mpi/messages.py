"""What crosses in each collective, as nonblocking MPI messages.

A collective is a generator: it starts messages, yields their requests, goes on
when all of them are done, and returns the array that it received. None blocks,
so that one thread has any number of them in flight.
"""

import weakref
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

Exchange = Generator[list[Any], None, np.ndarray]
"""Yields requests of MPI to wait for; returns what was received."""

# TensorFlow takes an array without a copy if it begins at such an address.
_ALIGNMENT = 64


class Buffers:
    """Memory to receive in, used again as soon as TensorFlow is done with it.

    MPI registers memory with the network card, and the system maps it, when it
    is first used.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an array of any content that TensorFlow can alias."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        free = self._free.setdefault(nbytes, [])
        memory = free.pop() if free else _aligned(nbytes)
        array = memory.view(dtype).reshape(shape)
        # Called when the last tensor that has this memory is gone.
        weakref.finalize(array, free.append, memory).atexit = False
        return array


def _aligned(nbytes: int) -> np.ndarray:
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes]


def all_reduce(comm: Any, own: np.ndarray, buffers: Buffers) -> Exchange:
    """Sums arrays of one shape and dtype, which MPI must know."""
    total = buffers.take(own.shape, own.dtype)
    yield [comm.Iallreduce(own, total)]
    return total


def swap(comm: Any, own: np.ndarray, buffers: Buffers) -> Exchange:
    """Returns the array of the other of two workers: one message each way."""
    other = buffers.take(own.shape, own.dtype)
    rank = 1 - comm.rank
    yield [comm.Irecv(_bytes(other), rank), comm.Isend(_bytes(own), rank)]
    return other


def all_gather(comm: Any, own: np.ndarray, buffers: Buffers) -> Exchange:
    """Concatenates arrays of one shape along axis 0."""
    rows = buffers.take((comm.size * len(own), *own.shape[1:]), own.dtype)
    yield [comm.Iallgather(_bytes(own), _bytes(rows))]
    return rows


def all_to_all(comm: Any, own: np.ndarray, buffers: Buffers) -> Exchange:
    """Sends row w to worker w; returns one row of each worker."""
    rows = buffers.take(own.shape, own.dtype)
    yield [comm.Ialltoall(_bytes(own), _bytes(rows))]
    return rows


def all_gather_rows(comm: Any, own: np.ndarray, buffers: Buffers) -> Exchange:
    """Concatenates arrays that may differ in length along axis 0."""
    lengths = np.empty(comm.size, np.int64)
    yield [comm.Iallgather(np.array([len(own)]), lengths)]
    rows = buffers.take((int(lengths.sum()), *own.shape[1:]), own.dtype)
    sizes = lengths * (rows.nbytes // max(1, len(rows)))
    yield [comm.Iallgatherv(_bytes(own), [_bytes(rows), sizes])]
    return rows


def _bytes(array: np.ndarray) -> np.ndarray:
    """The same memory as bytes: MPI need not know the dtype to move it."""
    return array.reshape(-1).view(np.uint8)


Collective = Callable[[Any, np.ndarray, Buffers], Exchange]
