"""Predicts the cost of a model's all-reduce between more workers."""

from collections.abc import Sequence

import tensorflow as tf

from keras_allreduce.reduce import cost_model, pack_sizes
from keras_allreduce.reduce.buckets import plan_buckets
from keras_allreduce.reduce.cost_model import Link
from keras_allreduce.reduce.pack_sizes import PackSize
from keras_allreduce.reduce.packing import spec_of
from keras_allreduce.reduce.sparse import RowsSpec

WORKERS = (2, 4, 8, 16, 64)
"""Numbers of workers that are predicted."""


def check(link: Link | None, step_seconds: float | None) -> None:
    """Raises if one comes without the other.

    Raises:
        ValueError: If it does.
    """
    if (link is None) != (step_seconds is None):
        raise ValueError(
            "A prediction needs both `link` and `step_seconds`. Received: "
            f"link={link}, step_seconds={step_seconds}. Pass both or none."
        )


def for_workers(
    gradients: Sequence[tf.TensorSpec | RowsSpec],
    link: Link | None,
    step_seconds: float | None,
    bytes_per_pack: int,
) -> dict[int, float | None]:
    """`exposed_seconds` for each of `WORKERS`; nothing without a link."""
    if link is None or step_seconds is None:
        return {}
    return {
        workers: exposed_seconds(
            gradients, workers, link, step_seconds, bytes_per_pack
        )
        for workers in WORKERS
    }


def exposed_seconds(
    gradients: Sequence[tf.TensorSpec | RowsSpec],
    workers: int,
    link: Link,
    step_seconds: float,
    bytes_per_pack: int = 0,
) -> float | None:
    """Exposed time of the all-reduce, by the model of docs/algorithms.md.

    Args:
        gradients: Specs of all gradients.
        workers: Number of workers, of one device each.
        link: How they reach each other.
        step_seconds: Seconds of a step without all-reduce.
        bytes_per_pack: Capacity of a pack; 0: as chosen between workers.

    Returns:
        Seconds. `None` if a gradient is sparse or of unknown size: how many
        bytes cross is not known then.
    """
    packs = _packs(gradients, workers, bytes_per_pack)
    if packs is None:
        return None

    def cost(nbytes: float) -> float:
        return cost_model.workers_seconds(nbytes, workers, link)

    def busy(nbytes: float) -> float:
        return cost_model.workers_seconds(nbytes, workers, link.busy())

    return cost_model.exposed_seconds(packs, step_seconds, cost, busy)


def _packs(
    gradients: Sequence[tf.TensorSpec | RowsSpec],
    workers: int,
    bytes_per_pack: int,
) -> list[int] | None:
    """Bytes of each pack in the order of leaving, `None` if not known."""
    if any(isinstance(each, RowsSpec) for each in gradients):
        return None
    specs = [spec_of(each) for each in gradients]
    size = PackSize(bytes_per_pack)
    if not bytes_per_pack:
        nbytes = sum(spec.nbytes or 0 for spec in specs)
        size = pack_sizes.between_workers(workers, nbytes)
    packs = plan_buckets(
        specs, size.bytes_per_pack, size.first_bytes_per_pack, size.alone_above
    )
    known = [pack.nbytes for pack in packs if pack.nbytes is not None]
    return known if len(known) == len(packs) else None
