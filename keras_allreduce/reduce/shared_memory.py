"""All-reduce between replicas of one process: sum once, share without a copy.

Host devices of one process share their memory, so a tensor goes from one to
another without a copy. Each pack is summed once, by one device, in one op
that reads every replica's part once; all replicas then hold the same buffer.
With R replicas and N bytes that is R N bytes read and N written, the least
that a sum can cost. On GPUs of one process the same ops copy between devices:
slower than NCCL, but right everywhere.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_allreduce.devices import on_each
from keras_allreduce.reduce.algorithm import Algorithm
from keras_allreduce.reduce.buckets import balance
from keras_allreduce.reduce.packing import nbytes_of


def all_reduce(
    packs: Sequence[Sequence[tf.Tensor]], devices: Sequence[str]
) -> list[list[tf.Tensor]]:
    """Sums each pack on one device and hands the result to all.

    Args:
        packs: `packs[pack][replica]`, tensors of any shape; the replicas of
            one pack have one dtype and one shape.
        devices: Device of each replica. The packs are shared out so that
            each device sums about as many bytes.

    Returns:
        `sums[pack][replica]`, like `packs`; all replicas of a pack bit for
        bit the same.
    """
    owners = balance([nbytes_of(pack[0]) for pack in packs], len(devices))
    return [
        share(add(pack, devices[owner]), devices)
        for pack, owner in zip(packs, owners, strict=True)
    ]


def add(tensors: Sequence[tf.Tensor], device: str) -> tf.Tensor:
    """Sums tensors of one shape on `device`, always in the order given."""
    with tf.device(device):
        return tf.add_n(tensors)


def share(tensor: tf.Tensor, devices: Sequence[str]) -> list[tf.Tensor]:
    """Gives `tensor` to every device."""
    return on_each(devices, lambda: tf.identity(tensor))


ALGORITHM = Algorithm("shared_memory", all_reduce)
