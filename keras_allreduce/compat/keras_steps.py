"""Assumptions about how Keras runs the steps of a model."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat.frames import calling_frames

STEPS = ("train_step", "test_step")
PREDICT = "predict_step"

# The functions of Keras that call `strategy.run`, and the steps they run.
_RUNS_A_STEP = "one_step_on_data"
_RUNS_PREDICT = "one_step_on_data_distributed"


def step_of(fn: Callable[..., Any]) -> tuple[keras.Model | None, str]:
    """The model whose step `strategy.run` is given, and the name of the step.

    Keras passes the bound method, which may be decorated or a `tf.function`.
    What it is called from tells then. To be called within `strategy.run`.

    Returns:
        The model and one of `STEPS` or `PREDICT`, or `None` and an empty
        string.
    """
    for frame in calling_frames():
        model = frame.f_locals.get("self")
        if not isinstance(model, keras.Model):
            continue
        if frame.f_code.co_name == _RUNS_PREDICT:
            return model, PREDICT
        if frame.f_code.co_name == _RUNS_A_STEP:
            step = frame.f_locals.get("step_function")
            for name in STEPS:
                if step == getattr(model, name):
                    return model, name
            raise RuntimeError(
                "A model must be trained by its `train_step`. Received: "
                f"{step} of {model}, which is none of {', '.join(STEPS)}, so "
                "that its gradients cannot be summed as on one device. Use a "
                "version of Keras that keras_allreduce was tested with."
            )
    return _bound_step(fn)


def _bound_step(fn: Any) -> tuple[keras.Model | None, str]:
    """The model and the step of a bound method, maybe wrapped."""
    while fn is not None:
        model = getattr(fn, "__self__", None)
        # TensorFlow binds its functions to an object that refers to it.
        model = getattr(model, "target", model)
        name = getattr(fn, "__name__", "")
        if isinstance(model, keras.Model) and name in STEPS:
            return model, name
        fn = getattr(fn, "__wrapped__", None)
    return None, ""


def what_a_step_depends_on(model: keras.Model, step: str) -> list[Any]:
    """The objects that Keras makes anew when a step may have changed.

    They are the function that runs it, which `make_train_function(force=True)`
    makes too, and the arguments of `compile`.
    """
    function = getattr(model, step.replace("_step", "_function"), None)
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
