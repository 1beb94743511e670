"""Defines `HostCollectives`: the engine between workers, as a wire uses it.

`collectives.py` has them over gRPC, `mpi/collectives.py` over MPI. In all of
them `purpose` names the purpose of a tensor, the same on all workers, and
results are on the logical CPU device of this worker, bit for bit equal on all.
"""

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
