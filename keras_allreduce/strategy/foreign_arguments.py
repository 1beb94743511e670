"""Names ours where an argument of PyTorch DDP or Horovod is passed."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_Init = TypeVar("_Init", bound=Callable[..., None])

OURS = {
    # torch.nn.parallel.DistributedDataParallel
    "bucket_cap_mb": "Pass `bytes_per_pack`, in bytes.",
    "find_unused_parameters": (
        "Leave it out: the gradients that a step has are the ones reduced."
    ),
    "static_graph": "Leave it out: a traced step is static.",
    "gradient_as_bucket_view": (
        "Leave it out: sums are shared without a copy where devices can."
    ),
    "broadcast_buffers": (
        "Leave it out: state that layers assign is equal on all replicas."
    ),
    "device_ids": "Pass `devices` to `AllReduceStrategy`.",
    "process_group": (
        "Pass `cluster_resolver` to `MultiWorkerAllReduceStrategy`."
    ),
    "timeout": ("Pass `timeout_seconds` to `MultiWorkerAllReduceStrategy`."),
    # horovod.keras.DistributedOptimizer
    "backward_passes_per_step": (
        "Pass `gradient_accumulation_steps` to the Keras optimizer."
    ),
    "num_groups": "Pass `bytes_per_pack`, in bytes.",
    "groups": "Pass `bytes_per_pack`, in bytes.",
    "op": "Leave it out: means and sums are told apart by the loss.",
    # tf.distribute.NcclAllReduce
    "num_packs": "Pass `bytes_per_pack`, in bytes.",
}
"""What to write instead, by the name of another package's argument."""


def explained(init: _Init) -> _Init:
    """Makes `__init__` raise an error that names our argument.

    Args:
        init: The `__init__` of a strategy.

    Returns:
        The same with the same signature. It raises a `TypeError` if it gets
        an argument that PyTorch or Horovod have under that name.
    """

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() & OURS.keys():
            raise TypeError(
                f"{type(self).__name__} has no argument of this name. "
                f"Received: {name}={kwargs[name]!r}. {OURS[name]}"
            )
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]
