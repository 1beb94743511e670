"""Sums gradients over the replicas.

With gradient accumulation nothing has to be sent between two updates: each
replica adds up its own gradients in Keras's accumulators. When Keras is about
to apply, the accumulated gradients of the replicas are reduced together with
the last ones, and the accumulators start again from zero. Keras then adds its
(zero) accumulators and goes on as on one device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shares import largest
from keras_allreduce.reduce.observe import BatchRecord, observe


def sum_when_applied(
    replicas: Replicas,
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Sequence[Any] | None,
    note: Callable[[Sequence[BatchRecord]], None],
) -> list[Any]:
    """Sums accumulated gradients if this step applies them.

    Args:
        replicas: The replicas of this worker.
        optimizer: Optimizer with `gradient_accumulation_steps`.
        gradients: Those of this replica; `None` stays `None`.
        variables: Those that the gradients are of, if known.
        note: Called with the records of accumulated gradients, inside the
            branch that reduces them.

    Returns:
        On a step that applies, the sums of all that was accumulated on all
        replicas; on others the gradients as they were.
    """
    moving = _moving(gradients, variables)
    accumulators = variables and keras_compat.gradient_accumulators(
        optimizer, [variables[index] for index in moving]
    )
    if not accumulators:
        return sum_over_replicas(replicas, gradients, (), variables)
    gradients = largest_of_assigned(replicas, gradients, variables)
    steps = optimizer.gradient_accumulation_steps
    local_values = replicas.local_values

    def merge(_strategy: Any, values: Sequence[Any]) -> list[Any]:
        parts = [local_values(value) for value in values]
        accumulated = [local_values(each.value) for each in accumulators]

        def communicate() -> list[tuple[Any, ...]]:
            totals = [
                distribute.PerReplica(tuple(map(_take, *both)))
                for both in zip(parts, accumulated, strict=True)
            ]
            with observe() as records:
                sums = replicas.sum_gradients(totals)
            note([record.every(steps) for record in records])
            return [tuple(local_values(total)) for total in sums]

        def keep() -> list[tuple[Any, ...]]:
            return [tuple(each) for each in parts]

        count = keras_compat.iterations(optimizer) + 1
        kept = tf.cond(tf.equal(count % steps, 0), communicate, keep)
        return [distribute.PerReplica(tuple(each)) for each in kept]

    dense = [tf.convert_to_tensor(gradients[index]) for index in moving]
    return _exchanged(gradients, moving, replica.merged(merge, dense))


def sum_over_replicas(
    replicas: Replicas,
    gradients: Sequence[Any],
    weights: Sequence[tf.Tensor],
    variables: Sequence[Any] | None,
) -> list[Any]:
    """The sums over all replicas, in a replica's thread.

    Args:
        replicas: The replicas.
        gradients: Those of this replica; `None` stays `None`.
        weights: See `Replicas.sum_gradients`.
        variables: Those that the gradients are of, if known. Of gradients
            that Keras assigns as they are the largest is taken.
    """
    reduced = largest_of_assigned(replicas, gradients, variables)
    moving = _moving(reduced, variables)
    if not moving:
        return reduced

    def merge(_strategy: Any, moved: Sequence[Any]) -> list[Any]:
        return replicas.sum_gradients(moved, weights)

    sums = replica.merged(merge, [reduced[index] for index in moving])
    return _exchanged(reduced, moving, sums)


def largest_of_assigned(
    replicas: Replicas,
    gradients: Sequence[Any],
    variables: Sequence[Any] | None,
) -> list[Any]:
    """Gradients that Keras assigns, the largest of all replicas.

    Those of float8 are scales and the largest values of the last batches; the
    largest value of a batch is that of the largest of its parts.
    """
    moving = set(_moving(gradients, variables))
    assigned = [
        index
        for index, gradient in enumerate(gradients)
        if gradient is not None and index not in moving
    ]
    if not assigned:
        return list(gradients)

    def merge(_strategy: Any, values: Sequence[Any]) -> list[Any]:
        return [largest(value, replicas) for value in values]

    found = replica.merged(merge, [gradients[index] for index in assigned])
    return _exchanged(gradients, assigned, found)


def _exchanged(
    values: Sequence[Any], indices: Sequence[int], others: Sequence[Any]
) -> list[Any]:
    """The values, with others at some indices."""
    by_index = dict(zip(indices, others, strict=True))
    return [by_index.get(at, value) for at, value in enumerate(values)]


def _moving(
    gradients: Sequence[Any], variables: Sequence[Any] | None
) -> list[int]:
    """Indices of the gradients that are summed."""
    return [
        index
        for index, gradient in enumerate(gradients)
        if gradient is not None
        and not (
            variables is not None
            and keras_compat.takes_gradient_as_value(variables[index])
        )
    ]


def _take(gradient: tf.Tensor, accumulator: tf.Variable) -> tf.Tensor:
    """The gradient and all that was accumulated, which starts again."""
    with tf.device(accumulator.device):
        total = gradient + accumulator
        accumulator.assign(tf.zeros_like(accumulator))
    return total
