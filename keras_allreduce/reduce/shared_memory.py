"""All-reduce between replicas of one process: sum once, hand out by reference.

Host devices of one process share their memory, so a tensor goes from one to
another without a copy. Each pack is summed once, by one device, in one op
that reads every replica's part once; all replicas then hold the same buffer.
With R replicas and N bytes that is R N bytes read and N written, the least
that a sum can cost. On GPUs of one process the same ops copy between devices:
slower than NCCL, but right everywhere.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_allreduce.reduce.buckets import balance


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
    owners = balance([_nbytes(pack[0]) for pack in packs], len(devices))
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
    shared = []
    for device in devices:
        with tf.device(device):
            shared.append(tf.identity(tensor))
    return shared


def _nbytes(tensor: tf.Tensor) -> int | None:
    elements = tensor.shape.num_elements()
    return None if elements is None else elements * tensor.dtype.size
