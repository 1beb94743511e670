"""All-reduce with NCCL, one tensor per GPU."""

import itertools
from collections.abc import Sequence

import tensorflow as tf

# As in PyTorch DistributedDataParallel.
BYTES_PER_PACK = 25 * 2**20

# What NCCL's kernel in TensorFlow takes; everything else is summed by
# `shared_memory`.
DTYPES = frozenset({tf.float16, tf.float32, tf.float64, tf.int64})

_names = itertools.count()


def all_reduce(
    packs: Sequence[Sequence[tf.Tensor]], devices: Sequence[str]
) -> list[list[tf.Tensor]]:
    """Sums each pack over the GPUs.

    NCCL hangs if two GPUs start their all-reduces in different orders, so
    each launch waits, on its own GPU, for the launch of the pack before it.
    They would follow one another on the GPU's NCCL stream in any case.

    Args:
        packs: `packs[pack][replica]`, one tensor of a dtype in `DTYPES` per
            GPU; the replicas of one pack have one shape.
        devices: GPU of each replica.

    Returns:
        `sums[pack][replica]`, like `packs`.
    """
    sums: list[list[tf.Tensor]] = []
    for pack in packs:
        # The participants of one all-reduce find each other by this name.
        shared_name = f"keras_allreduce_{next(_names)}"
        before = sums[-1] if sums else [None] * len(devices)
        summed = []
        for tensor, device, launched in zip(pack, devices, before, strict=True):
            with (
                tf.device(device),
                tf.control_dependencies([] if launched is None else [launched]),
            ):
                summed.append(
                    tf.raw_ops.NcclAllReduce(
                        input=tensor,
                        reduction="sum",
                        num_devices=len(devices),
                        shared_name=shared_name,
                    )
                )
        sums.append(summed)
    return sums
