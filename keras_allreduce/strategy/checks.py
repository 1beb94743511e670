"""Validates the backend, the arguments and the models of a strategy."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat import keras_door, versions


def check_backend() -> None:
    """Raises unless a tested Keras 3 runs on a tested TensorFlow.

    Warns once if one is newer than the tests know.

    Raises:
        RuntimeError: If TensorFlow or Keras is too old, or if `tf.keras` is
            Keras 2.
        ValueError: If Keras runs on another backend.
    """
    versions.check_versions(tf.__version__, keras.__version__)
    versions.check_keras_is_not_legacy()
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            "A tf.distribute strategy needs the TensorFlow backend of Keras. "
            f"Received: backend={backend!r}. Set KERAS_BACKEND=tensorflow."
        )


def check_model(model: keras.Model, strategy: Any) -> None:
    """Raises if `model` cannot be trained under `strategy`.

    Raises:
        ValueError: If the model or its optimizer was made outside the scope
            of the strategy, if a layer is stateful, or if it is compiled with
            `jit_compile=True` and Keras would compile all replicas as one
            program. On GPUs TensorFlow would then sum gradients by its own
            ops.
    """
    optimizer = getattr(model, "optimizer", None)
    for what, variables in (
        ("model", model.variables),
        ("optimizer", getattr(optimizer, "variables", ())),
    ):
        for variable in variables:
            if not _made_in_scope(variable, strategy):
                raise made_outside(f"variable {variable.path!r} of the {what}")
    replicas = strategy.num_replicas_in_sync
    stateful = keras_compat.stateful_layers(model) if replicas > 1 else []
    if stateful:
        raise ValueError(
            "A stateful layer keeps a state for each row of a batch of one "
            "size, and a replica has some of the rows. Received: layer "
            f"{stateful[0].name!r} with stateful=True, on {replicas} replicas. "
            "Use `stateful=False`, or train on one device."
        )
    if (
        getattr(model, "jit_compile", False) is True
        and replicas > 1
        and not keras_door.makes_functions()
    ):
        raise ValueError(
            "XLA can compile what each replica does, but not a step of "
            f"several replicas. Received: jit_compile=True, {replicas} "
            f"replicas and Keras {keras.__version__}, which can no longer be "
            "told the difference. Leave `jit_compile` out of `compile`."
        )


def made_outside(what: str) -> ValueError:
    """The error of a model that was not made, or compiled, in the scope."""
    return ValueError(
        "A model must be made and compiled inside the scope of the strategy "
        f"that trains it. Received: {what}, made outside. Put `with "
        "strategy.scope():` around both the making of the model and `compile`."
    )


def _made_in_scope(variable: Any, strategy: Any) -> bool:
    value = getattr(variable, "value", None)
    if not isinstance(value, tf.distribute.DistributedValues):
        # One device, or a variable that is not built yet.
        return value is None or strategy.num_replicas_in_sync == 1
    return strategy.extended.variable_created_in_scope(value)


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
