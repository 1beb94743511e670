"""Runs `predict_step` on replicas of which some may have no samples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras_threads
from keras_allreduce.one_device import empty_replica, hooks, replica
from keras_allreduce.one_device.reduction import Reductions
from keras_allreduce.one_device.replica import Replica
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.one_device.shares import divided, replicas_with_samples
from keras_allreduce.one_device.view import CurrentStep

_do_not_convert = tf.autograph.experimental.do_not_convert


def run(
    model: keras.Model,
    replicas: Replicas,
    call_for_each_replica: Callable[..., Any],
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Runs `fn` on every replica; returns one row per sample.

    Some layers cannot run on an empty batch, so an empty replica runs on a
    sample that it borrows, and returns no row for it.
    """
    count = replicas.group.size * len(replicas.devices)
    if count == 1:
        return call_for_each_replica(fn, args, kwargs)
    data, *rest = args
    data = divided(data, replicas)
    has_samples = replicas_with_samples(data, replicas)
    spare = None
    if has_samples is not None:
        spare = empty_replica.spare_sample(data, replicas)
    step = CurrentStep(model, Reductions())
    settings = keras_threads.settings()
    call = partial(_on_replica, step, fn, spare, settings, count)
    with hooks.taking_part(step):
        return call_for_each_replica(
            _do_not_convert(call), (has_samples, data, *rest), kwargs
        )


def _on_replica(
    step: CurrentStep,
    fn: Callable[..., Any],
    spare: Any,
    settings: dict[str, Any],
    count: int,
    has_samples: Any,
    data: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    keras_threads.take_over(settings)
    this = Replica(has_samples=has_samples, num_replicas=count)
    with replica.running(this, step):
        step.begin_replica()
        if has_samples is not None:
            data = empty_replica.with_a_sample(data, has_samples, spare)
        outputs = _with_rows(fn(data, *args, **kwargs))
        if has_samples is None:
            return outputs
        return keras.tree.map_structure(
            partial(empty_replica.rows_if, has_samples), outputs
        )


def _with_rows(outputs: Any) -> Any:
    """The outputs, each of which must have one row for each sample."""
    for path, output in keras.tree.flatten_with_path(outputs):
        if tf.TensorShape(output.shape).rank == 0:
            raise ValueError(
                "Outputs of `predict` have one row for each sample, since "
                "those of all replicas are joined. Received: one number for "
                f"a batch in outputs{list(path) or ''}. Return a value for "
                "each sample and reduce what `predict` returns, or compute "
                "it with `evaluate`, in a metric."
            )
    return outputs
