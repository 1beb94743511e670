"""Assumptions about how Keras runs the steps of a model."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras_calls

STEPS = ("train_step", "test_step")
PREDICT = "predict_step"


def function_of(step: str) -> str:
    """The attribute in which a model keeps the function that runs a step."""
    return step.replace("_step", "_function")


def maker_of(step: str) -> str:
    """The method of a model that makes that function."""
    return f"make_{function_of(step)}"


def step_of(fn: Callable[..., Any]) -> tuple[keras.Model | None, str]:
    """The model whose step `strategy.run` is given, and the name of the step.

    The function that runs steps has said so (`keras_door.py`), whatever wraps
    the step. Without it, a method of a model that is its step is known.

    Returns:
        The model and one of `STEPS` or `PREDICT`, or `None` and an empty
        string.
    """
    return keras_calls.current_step() or _bound_step(fn)


def _bound_step(fn: Any) -> tuple[keras.Model | None, str]:
    """The model and the step of a bound method, maybe wrapped."""
    while fn is not None:
        model = getattr(fn, "__self__", None)
        # TensorFlow binds its functions to an object that refers to it.
        model = getattr(model, "target", model)
        if isinstance(model, keras.Model):
            for name in STEPS:
                if name == getattr(fn, "__name__", "") or fn == getattr(
                    model, name
                ):
                    return model, name
        fn = getattr(fn, "__wrapped__", None)
    return None, ""


def what_a_step_depends_on(model: keras.Model, step: str) -> list[Any]:
    """The objects that Keras makes anew when a step may have changed.

    They are the function that runs it, which `make_train_function(force=True)`
    makes too, and the arguments of `compile`.
    """
    function = getattr(model, function_of(step), None)
    optimizer = getattr(model, "optimizer", None)
    return [each for each in (function, optimizer) if each is not None]


def plain(fn: Any, model: keras.Model, name: str) -> Any:
    """A step of a model, or the plain method that replaces a `tf.function`."""
    step = getattr(type(model), name, None)
    if isinstance(step, tf.types.experimental.PolymorphicFunction):
        return getattr(model, name)
    return fn


def inlined_functions(model: keras.Model) -> Iterator[tuple[str, Any]]:
    """The methods of a model that are `tf.function`s, as plain methods.

    A step runs in a `tf.function` of Keras anyway, and replicas cannot sum
    anything inside another one.
    """
    for owner in reversed(type(model).__mro__):
        for name, method in vars(owner).items():
            if isinstance(method, tf.types.experimental.PolymorphicFunction):
                plain = method.python_function
                # Without source code as it is, without autograph.
                with contextlib.suppress(OSError, ValueError, TypeError):
                    plain = tf.autograph.to_graph(plain)
                yield name, partial(plain, model)
