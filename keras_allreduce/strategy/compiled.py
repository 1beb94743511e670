"""Runs the replicas of a model that is compiled with `jit_compile=True`."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce import xla_clusters
from keras_allreduce.compat import keras_door

LEAST_SHARE = 0.5
"""Share of the ops of a step that XLA compiles, below which it is said."""

_TYPES_SHOWN = 4


def compiled_by_xla(
    model: keras.Model | None, run: Callable[..., Any]
) -> Callable[..., Any]:
    """The function that runs the replicas, compiled if the model says so.

    Args:
        model: The model whose step it is, if it is one.
        run: Runs a function on every replica.
    """
    if model is None or not keras_door.compiles_replicas(model):
        return run
    return partial(_run, model, run)


def _run(
    model: keras.Model,
    run: Callable[..., Any],
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    if tf.executing_eagerly():
        return run(fn, args, kwargs)
    with xla_clusters.marking() as coverage:
        result = run(fn, args, kwargs)
    if coverage.share < LEAST_SHARE:
        common = coverage.outside.most_common(_TYPES_SHOWN)
        warnings.warn(
            "`jit_compile=True` is for steps that XLA can compile. Received: "
            f"model {model.name!r}, of whose ops XLA compiles "
            f"{coverage.share:.0%}; the others, such as "
            f"{', '.join(name for name, _ in common)}, run as without it. "
            "Leave `jit_compile` out of `compile` if the step is not faster "
            "with it.",
            stacklevel=2,
        )
    return result
