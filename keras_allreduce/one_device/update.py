"""Sums gradients over the replicas, and updates each replica with the sums.

With gradient accumulation nothing has to be sent between two updates: each
replica adds up its own gradients in Keras's accumulators. When Keras is about
to apply, the accumulated gradients of the replicas are reduced together with
the last ones, and the accumulators start again from zero. Keras then adds its
(zero) accumulators and goes on as on one device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce import xla_clusters
from keras_allreduce.compat import distribute, keras_config
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.devices import is_gpu
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shares import largest
from keras_allreduce.reduce.observe import BatchRecord, observe
from keras_allreduce.reduce.packing import nbytes_of

LARGE_BYTES = 64 * 1024
"""Mean size of gradients from which one update and copies take less time.

With 8 KiB a step of 2 replicas took 1.09 times as long, with 2.7 MiB 0.84
times: see "Steps with Adam" in benchmarks/RESULTS.md.
"""


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


def is_done_once(
    replicas: Replicas,
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Sequence[Any] | None,
) -> bool:
    """Whether the first replica of a worker updates for all of them.

    All come to the same, so on CPUs one update and a copy that shares memory
    take less time than an update of each, if the variables are large. On GPUs
    a copy takes more. It has to be known what an update writes: the variables
    of an optimizer of Keras's, and those that it is given. A variable that is
    written row by row is copied whole when it is read, and an optimizer without
    slots writes as much as is copied, so these update each replica; as do
    accumulators, which hold what belongs to a replica.

    Args:
        replicas: The replicas of this worker.
        optimizer: Keras's, or the user's.
        gradients: The reduced gradients.
        variables: Those that the gradients are of, if known.
    """
    return (
        bool(variables)
        and not replica.is_measured()
        and not any(map(is_gpu, replicas.devices))
        and keras_config.is_of_keras(optimizer)
        and keras_compat.has_slots(optimizer)
        and not keras_compat.accumulates(optimizer)
        and _are_dense_and_large(gradients)
    )


def _are_dense_and_large(gradients: Sequence[Any]) -> bool:
    """Whether gradients are dense, with many bytes each on average."""
    given = [each for each in gradients if each is not None]
    if any(isinstance(each, tf.IndexedSlices) for each in given):
        return False
    sizes = [nbytes_of(tf.convert_to_tensor(each)) or 0 for each in given]
    return sum(sizes) >= LARGE_BYTES * len(sizes)


def take_over(
    replicas: Replicas, number: int, optimizer: Any, variables: Sequence[Any]
) -> None:
    """Gives a replica what the update of the first one came to.

    TensorFlow runs replicas one after the other, so that of the first is
    traced already. A value is not copied: the variables have one buffer until
    the next update writes another one.

    Args:
        replicas: The replicas of this worker.
        number: Which of them this thread runs.
        optimizer: The optimizer that has updated the first replica.
        variables: The variables that it was given.
    """
    for variable in [*optimizer.variables, *variables]:
        parts = replicas.local_values(variable.value)
        if not parts or parts[0] is parts[number]:
            continue  # One variable for all replicas.
        with tf.device(parts[0].device):
            value = parts[0].read_value()
        with tf.device(parts[number].device):
            parts[number].assign(value, read_value=False)


def number_on_worker(replicas: Replicas) -> int:
    """Which of the replicas of this worker this thread runs."""
    context = tf.distribute.get_replica_context()
    number = tf.get_static_value(context.replica_id_in_sync_group)
    return int(number) % len(replicas.devices)


def update(
    keras_apply: Callable[..., Any],
    grads: Any,
    trainable_variables: Any = None,
) -> Any:
    """Updates variables where each replica is, from reduced gradients."""
    more = () if trainable_variables is None else (trainable_variables,)
    with replica.local_update():
        if xla_clusters.is_marking():
            return _update_in_a_program(
                lambda each: keras_apply(each, *more), grads
            )
        return keras_apply(grads, *more)  # A custom one may take no more.


def _update_in_a_program(
    apply: Callable[[list[Any]], Any], gradients: Sequence[Any]
) -> Any:
    """Calls `apply` with the gradients, as one XLA program if it can be one.

    The gradients come from outside of XLA, and the update (clip, optimizer,
    constraints) is the end of a step, so it can be a function of its own. Its
    variables are then written in place, which XLA does not do for ops that are
    marked one by one.

    It cannot if an op has no kernel of XLA's, or with sparse gradients, as a
    program has fixed shapes and they have as many rows as a batch needs. On
    CPUs it is not worth it for plain SGD, whose few ops for each variable cost
    less than to pass the variable to a program. Then its ops are marked one by
    one, as all ops of a replica.

    Args:
        apply: Updates variables; to be called in a graph that is marked.
        gradients: Tensors or `None`s.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    if not given or not all(
        isinstance(each, tf.Tensor) and each.shape.is_fully_defined()
        for each in given
    ):
        return apply(list(gradients))
    results: list[Any] = []

    @tf.function(jit_compile=True, autograph=False)
    def update(*tensors: tf.Tensor) -> Any:
        left = iter(tensors)
        result = apply([g if g is None else next(left) for g in gradients])
        # Keras's optimizers return nothing, or a variable.
        results[:] = [result]
        return result if tf.is_tensor(result) else None

    compiled = update.get_concrete_function(*given)
    if not xla_clusters.is_worth_a_program(
        compiled.graph, given[0].device, parts=len(given)
    ):
        return apply(list(gradients))
    with xla_clusters.left_out():
        tensor = compiled(*given)
    return results[0] if tensor is None else tensor
