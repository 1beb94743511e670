"""Runs collectives between workers, on TensorFlow's collective runtime.

TensorFlow's own strategy numbers its collectives as they are called, through
a value captured when a function is called; inside a function in a function
(`steps_per_execution`) nothing feeds it. Here the name of a collective is
its tensor's spec and its place in the traced graph. That is the same on all
workers, whenever each of them traces, and it can run in any nesting. It may
run again only when it has come back, which one step after the other ensures.
"""

import itertools
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.devices import on_each
from keras_allreduce.reduce.pack_sizes import small_bytes
from keras_allreduce.reduce.packing import nbytes_of
from keras_allreduce.workers.in_flight import InFlight

_SUM = {"merge_op": "Add", "final_op": "Id"}

FIRST_KEY = 2**30
"""Of a strategy; far above the numbers that TensorFlow gives its groups."""

_other_keys = itertools.count(1_000_000)


@dataclass(frozen=True)
class CollectiveGroup:
    """The logical CPU devices of all workers, one each, or all of their GPUs.

    Attributes:
        size: Number of devices in the group.
        device: Host device of this worker.
        key: Number of the group, the same on all workers.
    """

    size: int
    device: str
    key: int = field(default_factory=lambda: next(_other_keys))


class CollectiveNames:
    """Names collectives by their place in the graph that is traced."""

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[Any, dict[str, int]] = (
            weakref.WeakKeyDictionary()
        )

    def name(self, tensor: tf.Tensor, purpose: str) -> str:
        """Returns a name that is the same on all workers.

        Args:
            tensor: The tensor to send.
            purpose: Its purpose, the same on all workers.
        """
        graph = tf.compat.v1.get_default_graph()
        seen = self._seen.setdefault(graph, {})
        name = f"{purpose} {tensor.dtype.name} {tensor.shape}"
        seen[name] = seen.get(name, 0) + 1
        return f"{name} {seen[name]}"


class Collectives:
    """Collectives of one group of devices, over gRPC or NCCL.

    They wait for the others without a limit; the health monitor ends them.

    Args:
        group: The devices.
        in_flight: Counts the collectives for the health monitor.
    """

    medium = "gRPC"
    """What logical CPU devices send over, for the plan line."""

    def __init__(self, group: CollectiveGroup, in_flight: InFlight):
        self._group = group
        self._in_flight = in_flight
        self._names = CollectiveNames()
        self._tokens: dict[str, tf.Variable] = {}

    @property
    def device(self) -> str:
        """Host device of this worker, where the results are."""
        return self._group.device

    def sums(self, tensor: tf.Tensor) -> bool:
        """Whether `all_reduce` is the way to sum `tensor`.

        A small one is exchanged in less time.
        """
        nbytes = nbytes_of(tensor)
        return nbytes is None or nbytes > small_bytes(self._group.size)

    def all_reduce(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sums `tensor` over the workers, in TensorFlow's ring.

        Args:
            tensor: Tensor of one shape and dtype on all workers.
            purpose: Its purpose, the same on all workers; goes into the
                name of the collective.

        Returns:
            The sum, on the logical CPU device of this worker.
        """
        return self._run(tf.raw_ops.CollectiveReduceV2, tensor, purpose, **_SUM)

    def all_reduce_on_gpus(
        self, tensors: Sequence[tf.Tensor], devices: Sequence[str], purpose: str
    ) -> list[tf.Tensor]:
        """Sums one tensor of each GPU of the group, with NCCL.

        NCCL hangs if two workers start their sums in different orders, so each
        waits, on its own GPU, for the one traced before it.

        Args:
            tensors: One of each GPU of this worker, of one shape and dtype
                on all.
            devices: The GPUs of this worker.
            purpose: As for `all_reduce`.

        Returns:
            The sum, on each of `devices`.
        """
        with tf.device(self._group.device):
            name = self._names.name(tensors[0], purpose)
            place = self._place(name, tensors[0])

            def launch(tensor: tf.Tensor, token: tf.Tensor) -> tf.Tensor:
                return tf.raw_ops.CollectiveReduceV2(
                    input=tensor,
                    ordering_token=[token],
                    communication_hint="nccl",
                    **_SUM,
                    **place,
                )

            tokens = [self._token_of(device) for device in devices]
            watched = self._in_flight.watched(f"gpus {name}", tensors)
            with watched as (results, _):
                results += on_each(devices, launch, tensors, tokens)
            return results

    def all_gather(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates `tensor`, of one shape on all workers, along axis 0."""
        return self._run(tf.raw_ops.CollectiveGatherV2, tensor, purpose)

    def all_to_all(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sends row w of `tensor` to worker w.

        Args:
            tensor: Tensor with one row per worker, of one shape on all.
            purpose: As for `all_reduce`.

        Returns:
            Tensor of the same shape; row w is what worker w has sent here.
        """
        return self._run(tf.raw_ops.CollectiveAllToAllV2, tensor, purpose)

    def all_gather_rows(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates tensors that may differ in length along axis 0."""
        with tf.device(self._group.device):
            length = tf.shape(tensor)[:1]
            lengths = self.all_gather(length, f"lengths of {purpose}")
            longest = tf.reduce_max(lengths)
            missing = [[0, longest - length[0]]]
            padding = tf.pad(missing, [[0, tf.rank(tensor) - 1], [0, 0]])
            padded = tf.pad(tensor, padding)
            gathered = self.all_gather(padded, purpose)
            parts = tf.split(gathered, self._group.size)
            return tf.concat(
                [part[: lengths[worker]] for worker, part in enumerate(parts)],
                axis=0,
            )

    def _run(
        self, op: Any, tensor: tf.Tensor, purpose: str, **attributes: Any
    ) -> tf.Tensor:
        with tf.device(self._group.device):
            name = self._names.name(tensor, purpose)
            place = self._place(name, tensor)
            with self._in_flight.watched(name, [tensor]) as (results, tokens):
                result = op(
                    input=tensor,
                    ordering_token=tokens,
                    communication_hint="ring",
                    **attributes,
                    **place,
                )
                results.append(result)
            return result

    def _place(self, name: str, tensor: tf.Tensor) -> dict[str, Any]:
        return {
            "group_size": self._group.size,
            "group_key": self._group.key,
            "instance_key": _instance(name, tensor),
        }

    def _token_of(self, gpu: str) -> tf.Tensor:
        """The token that orders all collectives on a GPU."""
        if gpu not in self._tokens:
            with tf.init_scope(), tf.device(gpu):
                self._tokens[gpu] = distribute.ResourceVariable(
                    0.0, trainable=False
                )
        return self._tokens[gpu].handle


def _instance(name: str, tensor: tf.Tensor) -> Any:
    """A positive int32 that names a collective and the shape it is run with.

    An instance has one shape for ever, so a shape that is known only when the
    collective runs gets a name then; it is the same on all workers.
    """
    if tensor.shape.is_fully_defined():
        return zlib.crc32(name.encode()) >> 1
    shape = tf.strings.reduce_join(
        tf.strings.as_string(tf.shape(tensor)), separator=" "
    )
    return tf.cast(
        tf.strings.to_hash_bucket_fast(
            tf.strings.join([name, shape]), 2**31 - 1
        ),
        tf.int32,
    )
