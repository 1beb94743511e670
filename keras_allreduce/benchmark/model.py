"""The gradients of a model that the benchmark is told the name of."""

import importlib
import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.benchmark.timed_loop import Gradient


def gradients_of(name: str, dtype: str | None) -> list[Gradient]:
    """Shapes and dtypes of the gradients of a model.

    Args:
        name: `"module:callable"`; the callable returns a built model. Its
            argument `weights`, if it has one, is `None`.
        dtype: Name of the dtype; `None`: that of each variable.

    Raises:
        ValueError: If it does not name one.
    """
    make = _callable_named(name)
    arguments: dict[str, None] = {}
    try:
        signature = inspect.signature(make)
        if "weights" in signature.parameters:
            arguments["weights"] = None
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--model {name} must be callable without arguments: {error}"
        ) from error
    model = make(**arguments)
    if not isinstance(model, keras.Model) or not model.trainable_variables:
        raise ValueError(
            "--model must make a built keras.Model with trainable variables. "
            f"Received from {name}: {model!r}"
        )
    return [
        Gradient(tuple(variable.shape), tf.as_dtype(dtype or variable.dtype))
        for variable in model.trainable_variables
    ]


def _callable_named(name: str) -> Any:
    """Imports `"module:callable"`."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            "--model must be module:callable, such as "
            f"keras.applications:ResNet50. Received: {name!r}"
        )
    try:
        make: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no --model {name}: {error}") from error
    return make
