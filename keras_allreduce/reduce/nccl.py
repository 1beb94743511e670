"""All-reduce with NCCL, one op per GPU and pack."""

import itertools
from collections.abc import Sequence

import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.devices import are_virtual, is_gpu
from keras_allreduce.reduce.algorithm import Algorithm

# The dtypes of NCCL's kernel in TensorFlow.
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


def _refuses(devices: Sequence[str]) -> str:
    return "" if all(map(is_gpu, devices)) else "runs between GPUs only"


def _discouraged(gpus: Sequence[str]) -> str:
    if not distribute.has_nccl():
        return "this TensorFlow is built without NCCL"
    if are_virtual(gpus):
        return "NCCL does not work between virtual GPUs"
    return ""


ALGORITHM = Algorithm(
    "nccl",
    all_reduce,
    takes=DTYPES.__contains__,
    refuses=_refuses,
    discouraged=_discouraged,
    crosses_workers=True,
    needs_graph=True,
)
