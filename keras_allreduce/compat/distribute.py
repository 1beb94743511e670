"""Private names of `tf.distribute`, and why each is needed.

A name moves out of this file as soon as there is a public way.
"""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import tensorflow as tf

# Which devices a value is on, by TensorFlow's own rule.
from tensorflow.python.distribute import cross_device_ops as _cross_device_ops

# The half of MultiWorkerMirroredStrategy that decides how values are reduced.
from tensorflow.python.distribute.collective_all_reduce_strategy import (
    CollectiveAllReduceExtended as CollectiveAllReduceExtended,
)

# The half of MirroredStrategy that decides how values are reduced. A strategy
# that subclasses the public half alone cannot change it.
from tensorflow.python.distribute.mirrored_strategy import (
    MirroredExtended as MirroredExtended,
)

# `CrossDeviceOps` is public, but the two classes its values come in and its
# results go out in are not.
from tensorflow.python.distribute.values import Mirrored as _Mirrored
from tensorflow.python.distribute.values import PerReplica as PerReplica

# Which kernels this build of TensorFlow has: a build without NCCL has no
# kernel for NcclAllReduce, and says so only when the op runs.
from tensorflow.python.framework import kernels as _kernels

# Inside `strategy.scope()` the public `tf.Variable` makes one variable per
# replica; this is a variable on one device wherever it is made.
from tensorflow.python.ops.resource_variable_ops import (
    ResourceVariable as ResourceVariable,
)


def mirrored(values: Sequence[Any]) -> Any:
    """Wraps one value per replica, all equal, as cross-device ops return."""
    return _Mirrored(tuple(values))


def per_replica(value: Any) -> Any:
    """Wraps the value of a worker's only replica; others come wrapped."""
    if isinstance(value, tf.distribute.DistributedValues):
        return value
    return PerReplica((value,))


def devices_of(value: Any) -> tuple[str, ...]:
    """Full device names of a distributed value, a tensor or a device name."""
    return tuple(_cross_device_ops.get_devices_from(value))


def has_nccl() -> bool:
    """Whether this build of TensorFlow can run NCCL at all."""
    return bool(_kernels.get_registered_kernels_for_op("NcclAllReduce").kernel)


def is_summed_when_read(variable: Any) -> bool:
    """Whether reading a variable adds up the parts of the replicas.

    Keras makes those of metrics so.
    """
    return (
        isinstance(variable, tf.distribute.DistributedValues)
        and getattr(variable, "synchronization", None)
        == tf.VariableSynchronization.ON_READ
        and getattr(variable, "aggregation", None) == tf.VariableAggregation.SUM
    )


def read_from_first(variable: Any) -> None:
    """Makes a variable of a metric be read from the first replica.

    Keras makes them so that reading adds up those of all replicas, and a
    variable offers no way to change that.
    """
    variable._aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA


def read_first(value: Any) -> tf.Tensor:
    """Reads a variable where the first replica of this worker has it.

    Without the ops in which TensorFlow wraps a read, which take longer.
    """
    if isinstance(value, tf.distribute.DistributedValues):
        value = value._values[0]
    return tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)


def count_collectives(
    extended: CollectiveAllReduceExtended, count: Callable[[], None]
) -> None:
    """Calls `count` before each collective that a strategy numbers itself.

    TensorFlow's multi-worker strategy takes the next number for each eager
    collective, and for each in a graph when that is called. Nothing public
    tells that a sum crosses between workers; some stay on this one.

    Args:
        extended: `extended` of a multi-worker strategy.
        count: Called in the thread that begins the collective.
    """
    keys = extended._collective_keys
    next_number = keys.get_instance_key

    def counted(group_key: int, device: str) -> int:
        count()
        return int(next_number(group_key, device))

    keys.get_instance_key = counted


_COMMUNICATES = {"all_reduce", "all_gather", "merge_call"}
# Between a function that asks a strategy, and the strategy.
_BETWEEN = (
    "keras_allreduce.",
    "tensorflow.python.autograph.",
    "tensorflow.python.distribute.distribute_lib",
)


def caller_communicates() -> bool:
    """Whether the function that asks a strategy sums over replicas itself.

    A layer for `tf.distribute` divides a sum over all replicas by their
    number, or gathers if there are several. A function that only scales its
    loss calls none of `_COMMUNICATES`. Both ask one attribute, which gets no
    argument, so the code of the caller is all that tells them apart.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if not module.startswith(_BETWEEN):
            return not _COMMUNICATES.isdisjoint(frame.f_code.co_names)
        frame = frame.f_back
    return False
