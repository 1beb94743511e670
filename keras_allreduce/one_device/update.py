"""Summing gradients over the replicas: at once, or when they are applied.

With gradient accumulation nothing has to be sent between two updates: each
replica adds up its own gradients in Keras's accumulators. When Keras is about
to apply, what the replicas have accumulated is reduced together with the last
gradients, and the accumulators start again from zero. Keras then adds its
(zero) accumulators and goes on as on one device.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.reduce.observe import observe

_thread = threading.local()


def already_reduced() -> bool:
    """Whether this thread is in an update with reduced gradients."""
    return getattr(_thread, "reduced", False)


@tf.autograph.experimental.do_not_convert
def sum_now(strategy: Any, gradients: Sequence[Any]) -> list[Any]:
    """Sums distributed gradients; to be called in cross-replica context."""
    return strategy.extended.sum_gradients(gradients)


@tf.autograph.experimental.do_not_convert
def sum_when_applied(
    strategy: Any,
    gradients: Sequence[Any],
    optimizer: Any,
    accumulators: Sequence[Any],
    note: Callable[..., None],
) -> list[Any]:
    """Sums accumulated gradients if this step applies them.

    To be called in cross-replica context.

    Args:
        strategy: The strategy.
        gradients: Distributed dense gradients, one per variable.
        optimizer: Optimizer with `gradient_accumulation_steps`.
        accumulators: Its accumulator of each gradient.
        note: Called with the records of what is reduced, inside the branch
            that does it.

    Returns:
        One distributed value per gradient: on a step that applies, the sum of
        all that was accumulated on all replicas; on others the gradient as it
        was.
    """
    steps = optimizer.gradient_accumulation_steps
    replicas = [strategy.experimental_local_results(g) for g in gradients]
    accumulated = [
        strategy.experimental_local_results(a.value) for a in accumulators
    ]

    def communicate() -> list[tuple[Any, ...]]:
        totals = [
            distribute.PerReplica(tuple(map(_take, parts, variables)))
            for parts, variables in zip(replicas, accumulated, strict=True)
        ]
        with observe() as records:
            sums = sum_now(strategy, totals)
        note([record.every(steps) for record in records])
        return [strategy.experimental_local_results(total) for total in sums]

    def keep() -> list[tuple[Any, ...]]:
        return [tuple(parts) for parts in replicas]

    applies = tf.equal((keras_compat.iterations(optimizer) + 1) % steps, 0)
    kept = tf.cond(applies, communicate, keep)
    return [distribute.PerReplica(tuple(parts)) for parts in kept]


def _take(gradient: tf.Tensor, accumulator: tf.Variable) -> tf.Tensor:
    """The gradient and all that was accumulated, which starts again."""
    with tf.device(accumulator.device):
        total = gradient + accumulator
        accumulator.assign(tf.zeros_like(accumulator))
    return total


def update(
    keras_apply: Callable[..., Any],
    grads: Any,
    trainable_variables: Any = None,
) -> Any:
    """Updates variables where each replica is, from reduced gradients."""
    before = already_reduced()
    _thread.reduced = True
    try:
        return keras_apply(grads, trainable_variables)
    finally:
        _thread.reduced = before


def all_reduce(
    optimizer: Any,
    grads: list[Any],
    variables: list[Any] | None,
    note: Callable[..., None],
) -> list[Any]:
    """The sums over all replicas; `None` stays `None`."""
    moving = [
        index
        for index, gradient in enumerate(grads)
        if gradient is not None
        and not (
            variables is not None
            and getattr(variables[index], "overwrite_with_gradient", False)
        )
    ]
    if not moving:
        return grads
    context = tf.distribute.get_replica_context()
    gradients = [grads[index] for index in moving]
    accumulators = variables and keras_compat.gradient_accumulators(
        optimizer, [variables[index] for index in moving]
    )
    if accumulators:
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        sums = context.merge_call(
            sum_when_applied,
            args=(gradients, optimizer, accumulators, note),
        )
    else:
        sums = context.merge_call(sum_now, args=(gradients,))
    reduced = list(grads)
    for index, total in zip(moving, sums, strict=True):
        reduced[index] = total
    return reduced


def accumulates(optimizer: Any) -> bool:
    """Whether gradients of several steps are summed at once."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return bool(inner.gradient_accumulation_steps)


def optimizers_of(model: keras.Model) -> list[Any]:
    """All optimizers that a step of the model may use."""
    candidates = [getattr(model, "optimizer", None), *vars(model).values()]
    found: list[Any] = []
    for candidate in candidates:
        if isinstance(candidate, keras.optimizers.Optimizer) and not any(
            candidate is other for other in found
        ):
            found.append(candidate)
    return found
