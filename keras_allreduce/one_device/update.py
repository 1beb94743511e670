"""Updates the variables of each replica with reduced gradients.

All replicas of a worker come to the same, each with its own part of each
variable. So the others

    take over    what the first has come to, where variables are large (CPUs)
    repeat       what the first has traced, with their own variables
    update       as the first does: XLA, optimizers that are not Keras's,
                   accumulated gradients, whatever reads anything else

Half of the time of tracing a step with Adam is that of its updates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce import xla_clusters
from keras_allreduce.compat import functions, keras_config
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.devices import is_gpu
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.reduce.packing import nbytes_of

LARGE_BYTES = 64 * 1024
"""Mean size of gradients from which one update and copies take less time.

With 8 KiB a step of 2 replicas took 1.09 times as long, with 2.7 MiB 0.84
times: see "Steps with Adam" in benchmarks/RESULTS.md.
"""


class Updates:
    """The updates of a step, which the replicas of a worker make alike.

    TensorFlow traces one replica after the other, the first one first.

    Args:
        replicas: The replicas of this worker.
    """

    def __init__(self, replicas: Replicas):
        self._replicas = replicas
        self._traced: dict[int, _TracedUpdate] = {}

    def make(
        self,
        apply: Callable[..., Any],
        optimizer: Any,
        gradients: Sequence[Any],
        variables: Sequence[Any] | None,
    ) -> Any:
        """Updates the replica that this thread runs.

        Args:
            apply: Called with the gradients and, if known, the variables.
            optimizer: The optimizer whose `apply` it is.
            gradients: The reduced gradients: tensors, `IndexedSlices`, `None`s.
            variables: Those that the gradients are of, if known.

        Returns:
            What `apply` returns.
        """
        replicas, number = self._replicas, _number_on_worker(self._replicas)
        call = replica.current().next_call("update")
        is_once = is_done_once(replicas, optimizer, gradients, variables)
        if number and is_once:
            return take_over(replicas, number, optimizer, variables or ())
        if (
            is_once
            or not variables
            or not _is_repeatable(replicas, optimizer, gradients)
        ):
            return update(apply, gradients, variables)
        if number == 0:
            self._traced[call] = _TracedUpdate(
                apply, optimizer, gradients, variables
            )
        traced = self._traced.get(call)
        if traced and traced.is_of(optimizer, gradients, variables):
            captures = traced.captures(replicas, number)
            if captures is not None:
                return traced.call(gradients, captures)
        return update(apply, gradients, variables)


def _is_repeatable(
    replicas: Replicas, optimizer: Any, gradients: Sequence[Any]
) -> bool:
    """Whether the other replicas may repeat what the first one has traced.

    What an optimizer of the user does in Python may depend on the replica.
    """
    return (
        len(replicas.devices) > 1
        and not tf.executing_eagerly()
        and not replica.is_measured()
        and not xla_clusters.is_marking()
        and keras_config.is_of_keras(optimizer)
        and optimizer.built
        and not keras_compat.accumulates(optimizer)
        and all(
            isinstance(each, tf.Tensor | tf.IndexedSlices)
            for each in _given(gradients)
        )
    )


class _TracedUpdate:
    """The update of the first replica, as a function of its gradients."""

    def __init__(
        self,
        apply: Callable[..., Any],
        optimizer: Any,
        gradients: Sequence[Any],
        variables: Sequence[Any],
    ):
        self._call = _key(optimizer, gradients, variables)
        self._variables = [*optimizer.variables, *variables]
        self._result: Any = None

        def update_first(*tensors: tf.Tensor) -> None:
            given = iter(
                tf.nest.pack_sequence_as(
                    _given(gradients), tensors, expand_composites=True
                )
            )
            self._result = update(
                apply,
                [each if each is None else next(given) for each in gradients],
                variables,
            )

        self._traced = functions.traced_anywhere(
            update_first, _tensors(gradients)
        )

    def is_of(
        self,
        optimizer: Any,
        gradients: Sequence[Any],
        variables: Sequence[Any],
    ) -> bool:
        """Whether another replica is to update the same, at the same place."""
        return self._call == _key(optimizer, gradients, variables)

    def captures(
        self, replicas: Replicas, number: int
    ) -> list[tf.Tensor] | None:
        """The handles of a replica's variables, in place of the first's.

        `None` for another replica than the first if the update reads anything
        but variables.
        """
        own = {}
        for variable in self._variables:
            parts = replicas.local_values(variable.value) or [variable.value]
            own[id(parts[0].handle)] = parts[number % len(parts)].handle
        captures = self._traced.captured_inputs
        if not all(id(each) in own for each in captures):
            return list(captures) if number == 0 else None
        return [own[id(each)] for each in captures]

    def call(
        self, gradients: Sequence[Any], captures: Sequence[tf.Tensor]
    ) -> Any:
        """Updates the variables whose handles `captures` are."""
        functions.call(self._traced, _tensors(gradients), captures)
        return self._result


def _key(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> tuple[Any, ...]:
    return (
        id(tf.compat.v1.get_default_graph()),
        id(optimizer),
        *map(id, variables),
        *(each is None for each in gradients),
        *((each.dtype, each.shape) for each in _tensors(gradients)),
    )


def _given(gradients: Sequence[Any]) -> list[Any]:
    return [each for each in gradients if each is not None]


def _tensors(gradients: Sequence[Any]) -> list[tf.Tensor]:
    return list(tf.nest.flatten(_given(gradients), expand_composites=True))


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
    given = _given(gradients)
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


def _number_on_worker(replicas: Replicas) -> int:
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
    given = _given(gradients)
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
