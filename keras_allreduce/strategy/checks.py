"""Validates the backend, the arguments and the models of a strategy."""

import functools
import inspect
import math
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
    # A variable that is not built yet has none.
    return value is None or strategy.extended.variable_created_in_scope(value)


_Init = TypeVar("_Init", bound=Callable[..., None])

_RESOLVER = (
    "Leave it out: workers are found by TF_CONFIG or by the launcher. Or pass "
    "`cluster_resolver` to `MultiWorkerAllReduceStrategy`."
)
_PLACE = "Leave it out: gradients are summed where the devices need the sums."

OURS: dict[str, str | Callable[[Any], str]] = {
    # torch.nn.parallel.DistributedDataParallel
    "bucket_cap_mb": lambda value: (
        f"Pass `bytes_per_pack={int(value * 2**20)}`, in bytes."
        if isinstance(value, int | float) and math.isfinite(value)
        else "Pass `bytes_per_pack`, in bytes."
    ),
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
    "init_sync": (
        "Leave it out: variables begin with the same value on all replicas."
    ),
    "mixed_precision": (
        "Call `keras.mixed_precision.set_global_policy`. To send gradients in "
        "fewer bits, pass `wire_dtype` to `MultiWorkerAllReduceStrategy`."
    ),
    "delay_all_reduce_named_params": (
        "Leave it out: a pack is sent when its gradients are ready."
    ),
    "device_ids": "Pass `devices` to `AllReduceStrategy`.",
    "output_device": "Leave it out: `predict` returns NumPy arrays.",
    "process_group": (
        "Pass `cluster_resolver` to `MultiWorkerAllReduceStrategy`."
    ),
    # torch.distributed.init_process_group
    "timeout": ("Pass `timeout_seconds` to `MultiWorkerAllReduceStrategy`."),
    "backend": (
        "Leave it out: workers with GPUs use NCCL. Without GPUs, pass "
        "`transport` to `MultiWorkerAllReduceStrategy`."
    ),
    "init_method": _RESOLVER,
    "world_size": _RESOLVER,
    "rank": _RESOLVER,
    # horovod.keras.DistributedOptimizer
    "backward_passes_per_step": (
        "Pass `gradient_accumulation_steps` to the Keras optimizer."
    ),
    "average_aggregated_gradients": (
        "Pass `gradient_accumulation_steps` to the Keras optimizer, which "
        "averages."
    ),
    "gradient_predivide_factor": (
        "Leave it out: means are not divided in two steps here."
    ),
    "num_groups": "Pass `bytes_per_pack`, in bytes.",
    "groups": "Pass `bytes_per_pack`, in bytes.",
    "op": (
        "Leave it out: means and sums are told apart by the loss. Adasum is "
        "not supported."
    ),
    "process_set": (
        "Leave it out: all workers sum all gradients. Pass `cluster_resolver` "
        "to `MultiWorkerAllReduceStrategy` to choose the workers."
    ),
    "device_dense": _PLACE,
    "device_sparse": _PLACE,
    # tf.distribute.NcclAllReduce
    "num_packs": "Pass `bytes_per_pack`, in bytes.",
}
"""What to write instead, by the name of another package's argument."""

BETWEEN_WORKERS = ("wire_dtype", "compression")
"""Arguments of `MultiWorkerAllReduceStrategy` about what crosses."""

OUR_METHODS = {
    # torch.nn.parallel.DistributedDataParallel
    "no_sync": (
        "Pass `gradient_accumulation_steps` to the Keras optimizer: nothing "
        "is sent between updates."
    ),
    "join": (
        "Leave it out: a replica without samples takes part with weight 0."
    ),
    "register_comm_hook": (
        "Pass `wire_dtype` or `compression` to `MultiWorkerAllReduceStrategy`."
    ),
}
"""What to write instead, by the name of another package's method."""


def check_attribute(strategy: Any, name: str) -> None:
    """Raises if an attribute that is not there is another package's method.

    Args:
        strategy: The strategy; only its type is looked at.
        name: The name.

    Raises:
        AttributeError: If it is. It says what to write instead.
    """
    if name in OUR_METHODS:
        raise AttributeError(
            f"{type(strategy).__name__} has no method of this name. Received: "
            f"{name}. {OUR_METHODS[name]}",
            name=name,
            obj=strategy,
        )


def explained(init: _Init) -> _Init:
    """Makes `__init__` raise an error that names our argument.

    Args:
        init: The `__init__` of a strategy.

    Returns:
        The same with the same signature. It raises a `TypeError` if it gets
        an argument that PyTorch or Horovod have under that name, or that only
        the strategy of several workers has.
    """
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            remedy = None if name in known else _remedy(name, kwargs[name])
            if remedy:
                raise TypeError(
                    f"{type(self).__name__} has no argument of this name. "
                    f"Received: {name}={kwargs[name]!r}. {remedy}"
                )
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def _remedy(name: str, value: Any) -> str | None:
    if name in BETWEEN_WORKERS:
        return (
            "It is an argument of `MultiWorkerAllReduceStrategy`: inside one "
            "process nothing crosses. Leave it out."
        )
    ours = OURS.get(name)
    return ours(value) if callable(ours) else ours
