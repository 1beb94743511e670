"""All-reduce between workers, on TensorFlow's collective runtime.

TensorFlow's own strategy numbers its collectives as they are called, through
a value captured when a function is called; inside a function in a function
(`steps_per_execution`) nothing feeds it. Here a collective is named by what it
reduces and by its place in the graph that is traced. That is the same on all
workers, whenever each of them traces, and it can run in any nesting. It may
run again only when it has come back, which one step after the other ensures.
"""

import itertools
import weakref
import zlib
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from keras_allreduce.progress import Progress

_group_keys = itertools.count(1_000_000)


@dataclass(frozen=True)
class WorkerGroup:
    """The host devices of all workers, one each.

    Attributes:
        num_workers: Number of workers.
        device: Host device of this worker.
        key: Number of the group; strategies are made in one order on all
            workers.
    """

    num_workers: int
    device: str
    key: int = field(default_factory=lambda: next(_group_keys))


class Collectives:
    """Collectives of one group of workers.

    They wait for the others without end; whoever watches `progress` ends them.

    Args:
        group: The workers.
        progress: Told what is under way.
    """

    def __init__(self, group: WorkerGroup, progress: Progress):
        self._group = group
        self._progress = progress
        self._seen: weakref.WeakKeyDictionary[Any, dict[str, int]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def device(self) -> str:
        """Host device of this worker, where the results are."""
        return self._group.device

    def all_reduce(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sums `tensor` over the workers, in TensorFlow's ring.

        Args:
            tensor: Tensor of one shape and dtype on all workers.
            purpose: What it is for, the same on all workers; goes into the
                name of the collective.

        Returns:
            The sum, on the host device of this worker.
        """
        return self._run(
            tf.raw_ops.CollectiveReduceV2,
            tensor,
            purpose,
            merge_op="Add",
            final_op="Id",
        )

    def all_gather(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Concatenates `tensor`, of one shape on all workers, along axis 0."""
        return self._move(tf.raw_ops.CollectiveGatherV2, tensor, purpose)

    def all_to_all(self, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        """Sends row w of `tensor` to worker w.

        Args:
            tensor: Tensor with one row per worker, of one shape on all.
            purpose: As for `all_reduce`.

        Returns:
            Tensor of the same shape; row w is what worker w has sent here.
        """
        return self._move(tf.raw_ops.CollectiveAllToAllV2, tensor, purpose)

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
            parts = tf.split(gathered, self._group.num_workers)
            return tf.concat(
                [part[: lengths[worker]] for worker, part in enumerate(parts)],
                axis=0,
            )

    def _move(self, op: Any, tensor: tf.Tensor, purpose: str) -> tf.Tensor:
        if tensor.dtype != tf.bfloat16:
            return self._run(op, tensor, purpose)
        with tf.device(self._group.device):
            # Has no kernel for bfloat16, whose bytes it can move as well.
            moved = self._run(op, tf.bitcast(tensor, tf.float16), purpose)
            return tf.bitcast(moved, tf.bfloat16)

    def _run(
        self, op: Any, tensor: tf.Tensor, purpose: str, **attributes: Any
    ) -> tf.Tensor:
        with tf.device(self._group.device):
            place = self._place(tensor, purpose)
            return self._progress.watched(
                lambda ready: op(
                    input=ready,
                    communication_hint="ring",
                    **attributes,
                    **place,
                ),
                tensor,
            )

    def _place(self, tensor: tf.Tensor, purpose: str) -> dict[str, Any]:
        graph = tf.compat.v1.get_default_graph()
        seen = self._seen.setdefault(graph, {})
        name = f"{purpose} {tensor.dtype.name} {tensor.shape}"
        seen[name] = seen.get(name, 0) + 1
        return {
            "group_size": self._group.num_workers,
            "group_key": self._group.key,
            "instance_key": _instance(f"{name} {seen[name]}", tensor),
            "ordering_token": [],
        }


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
