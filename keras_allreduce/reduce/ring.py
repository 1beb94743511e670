"""All-reduce in a ring: reduce-scatter, then all-gather, over chunks.

Every rank sends to the next one only. With P ranks and a pack of N bytes it
takes 2 (P - 1) steps and sends 2 N (P - 1) / P bytes per rank, the least that
an all-reduce can (Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009).

    chunk that rank r sends:   r=0  1  2  3
    reduce-scatter  step 0       0  1  2  3
                    step 1       3  0  1  2
                    step 2       2  3  0  1
    all-gather      step 3       1  2  3  0
                    step 4       0  1  2  3
                    step 5       3  0  1  2

In the reduce-scatter the receiver adds the chunk to its own; after it, rank r
holds the sum of chunk r + 1. In the all-gather the receiver keeps it as is,
so all ranks end with the same bits.
"""

from collections.abc import Sequence
from functools import partial

import tensorflow as tf

from keras_allreduce.devices import on_each
from keras_allreduce.reduce.algorithm import Algorithm


def chunk_sizes(size: int, num_ranks: int) -> list[int]:
    """Cuts `size` elements into `num_ranks` chunks that differ by one at most.

    The first `size % num_ranks` chunks are the longer ones.
    """
    small, rest = divmod(size, num_ranks)
    return [small + (chunk < rest) for chunk in range(num_ranks)]


def schedule(num_ranks: int) -> list[list[int]]:
    """The chunk that each rank sends in each step, as drawn above.

    Returns:
        `chunks[step][rank]`, with `num_ranks - 1` steps of reduce-scatter
        followed by `num_ranks - 1` steps of all-gather.
    """
    return [
        [(rank - step) % num_ranks for rank in range(num_ranks)]
        for step in range(num_ranks - 1)
    ] + [
        [(rank + 1 - step) % num_ranks for rank in range(num_ranks)]
        for step in range(num_ranks - 1)
    ]


def all_reduce(
    packs: Sequence[Sequence[tf.Tensor]], devices: Sequence[str]
) -> list[list[tf.Tensor]]:
    """Sums each pack over the replicas by sending chunks around a ring.

    Args:
        packs: `packs[pack][replica]`, tensors of any shape; the replicas of
            one pack have one dtype and one shape.
        devices: Device of each replica.

    Returns:
        `sums[pack][replica]`, like `packs`; all replicas of a pack bit for
        bit the same.
    """
    return [_all_reduce_pack(pack, devices) for pack in packs]


def _all_reduce_pack(
    pack: Sequence[tf.Tensor], devices: Sequence[str]
) -> list[tf.Tensor]:
    num_ranks = len(devices)
    chunks = on_each(devices, partial(_cut, num_ranks=num_ranks), pack)
    for step, sent in enumerate(schedule(num_ranks)):
        # All ranks of a step send at once: read every chunk before any is
        # replaced.
        moving = [chunks[rank][sent[rank]] for rank in range(num_ranks)]
        for rank, chunk in enumerate(sent):
            receiver = (rank + 1) % num_ranks
            with tf.device(devices[receiver]):
                if step < num_ranks - 1:
                    received = chunks[receiver][chunk] + moving[rank]
                else:
                    received = tf.identity(moving[rank])
            chunks[receiver][chunk] = received
    return on_each(devices, _join, chunks, pack)


def _cut(tensor: tf.Tensor, num_ranks: int) -> list[tf.Tensor]:
    flat = tf.reshape(tensor, [-1])
    return list(tf.split(flat, _chunk_sizes(flat, num_ranks), num=num_ranks))


def _join(chunks: Sequence[tf.Tensor], like: tf.Tensor) -> tf.Tensor:
    joined = tf.reshape(tf.concat(chunks, axis=0), tf.shape(like))
    joined.set_shape(like.shape)
    return joined


def _chunk_sizes(tensor: tf.Tensor, num_ranks: int) -> list[int] | tf.Tensor:
    length = tensor.shape.num_elements()
    if length is not None:
        return chunk_sizes(length, num_ranks)
    length = tf.size(tensor)
    longer = tf.cast(tf.range(num_ranks) < length % num_ranks, tf.int32)
    return tf.fill([num_ranks], length // num_ranks) + longer


ALGORITHM = Algorithm("ring", all_reduce)
