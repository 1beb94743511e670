"""Updates the variables of each replica with reduced gradients.

All replicas of a worker come to the same, each with its own part of each
variable. So the others

    take over    the values of the first, where variables are large (CPUs)
    repeat       the ops that the first has traced, with their own variables
    update       as the first does, if its effects are not known: optimizers
                   of users, accumulators, reads of anything but variables

Half of the time of tracing a step with Adam is that of its updates.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce import xla_clusters
from keras_allreduce.compat import functions, graphs, keras_config
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
        self._traced: dict[int, tuple[Any, TracedUpdate | None]] = {}

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
            The result of `apply`.
        """
        replicas, number = self._replicas, _number_on_worker(self._replicas)
        call = replica.current().next_call("update")
        if not variables or not _is_known(optimizer):
            return update(apply, gradients, variables)
        if is_done_once(replicas, optimizer, gradients):
            if number:
                return take_over(replicas, number, optimizer, variables)
            return update(apply, gradients, variables)
        if not _is_repeatable(replicas, optimizer, gradients):
            return update(apply, gradients, variables)
        place = _place(optimizer, gradients, variables)
        if number == 0:
            self._traced[call] = (
                place,
                traced_update(apply, gradients, variables),
            )
        first, traced = self._traced.get(call, (None, None))
        if first != place:
            return update(apply, gradients, variables)
        if traced is None:
            return _update_here(apply, gradients, variables)
        written = [*optimizer.variables, *variables]
        captures = traced.captures(replicas, number, written)
        if captures is None:
            return update(apply, gradients, variables)
        return traced.call(gradients, captures)


def _is_known(optimizer: Any) -> bool:
    """Whether it is known what an update does, the same for each replica.

    It writes the variables of an optimizer of Keras's, and those that it is
    given. An optimizer of the user may do anything, and accumulators hold what
    belongs to a replica.
    """
    return (
        not replica.is_measured()
        and keras_config.is_of_keras(optimizer)
        and not keras_compat.accumulates(optimizer)
    )


def _is_repeatable(
    replicas: Replicas, optimizer: Any, gradients: Sequence[Any]
) -> bool:
    """Whether the others may repeat the ops that the first replica has traced.

    A tape would record the variables of the first.
    """
    return (
        len(replicas.devices) > 1
        and not tf.executing_eagerly()
        and not graphs.is_recorded()
        and optimizer.built
        and all(
            isinstance(each, tf.Tensor | tf.IndexedSlices)
            for each in _given(gradients)
        )
    )


def _place(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> tuple[Any, ...]:
    """The same for replicas that update alike."""
    return (
        tf.compat.v1.get_default_graph(),
        id(optimizer),
        *map(id, variables),
        *(each is None for each in gradients),
        *((each.dtype, each.shape) for each in _tensors(gradients)),
    )


class TracedUpdate:
    """The update of a replica, as a function of its gradients.

    Args:
        apply: Called with gradients; updates variables.
        gradients: Those of the replica.
        is_program: Whether the function is one program of XLA.
    """

    def __init__(
        self,
        apply: Callable[[list[Any]], Any],
        gradients: Sequence[Any],
        *,
        is_program: bool,
    ):
        self._is_program = is_program
        self._result: Any = None

        def update_all(*tensors: tf.Tensor) -> Any:
            given = iter(
                tf.nest.pack_sequence_as(
                    _given(gradients), tensors, expand_composites=True
                )
            )
            self._result = apply(
                [g if g is None else next(given) for g in gradients]
            )
            # Keras's optimizers return nothing, or a variable.
            return self._result if tf.is_tensor(self._result) else None

        self._function = functions.traced_anywhere(
            update_all, _tensors(gradients), jit_compile=is_program
        )

    @property
    def graph(self) -> tf.Graph:
        """The graph of the function."""
        return self._function.graph

    def captures(
        self, replicas: Replicas, number: int, variables: Sequence[Any]
    ) -> list[tf.Tensor] | None:
        """The handles of a replica's variables, in place of the first's.

        `None` for another replica than the first if the update reads anything
        but `variables`.
        """
        captures = self._function.captured_inputs
        if number == 0:
            return list(captures)
        own = {}
        for variable in variables:
            parts = replicas.local_values(variable.value) or [variable.value]
            own[id(parts[0].handle)] = parts[number % len(parts)].handle
        found = [own.get(id(each)) for each in captures]
        return None if any(each is None for each in found) else found

    def call(
        self,
        gradients: Sequence[Any],
        captures: Sequence[tf.Tensor] | None = None,
    ) -> Any:
        """Updates the variables whose handles `captures` are, or its own."""
        if captures is None:
            captures = self._function.captured_inputs
        marks = (
            xla_clusters.left_out()
            if self._is_program
            else contextlib.nullcontext()
        )
        with marks:
            tensor = functions.call(
                self._function, _tensors(gradients), captures
            )
        return self._result if tensor is None else tensor


def _given(gradients: Sequence[Any]) -> list[Any]:
    return [each for each in gradients if each is not None]


def _tensors(gradients: Sequence[Any]) -> list[tf.Tensor]:
    return list(tf.nest.flatten(_given(gradients), expand_composites=True))


def is_done_once(
    replicas: Replicas, optimizer: Any, gradients: Sequence[Any]
) -> bool:
    """Whether the first replica of a worker updates for all of them.

    All come to the same, so on CPUs one update and a copy that shares memory
    take less time than an update of each, if the variables are large. On GPUs
    a copy takes more. A variable that is written row by row is copied whole
    when it is read, and an optimizer without slots writes as much as is
    copied, so these update each replica.

    Args:
        replicas: The replicas of this worker.
        optimizer: One of Keras's.
        gradients: The reduced gradients.
    """
    return (
        not any(map(is_gpu, replicas.devices))
        and keras_compat.has_slots(optimizer)
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
    if xla_clusters.is_marking():
        traced = traced_update(keras_apply, grads, trainable_variables)
        if traced:
            return traced.call(grads)
    return _update_here(keras_apply, grads, trainable_variables)


def _update_here(
    keras_apply: Callable[..., Any], grads: Any, variables: Any
) -> Any:
    more = () if variables is None else (variables,)
    with replica.local_update():
        return keras_apply(grads, *more)  # A custom one may take no more.


def traced_update(
    keras_apply: Callable[..., Any], grads: Any, trainable_variables: Any
) -> TracedUpdate | None:
    """An update as a function, for XLA as one program if it can be one.

    The gradients come from outside of XLA, and the update (clip, optimizer,
    constraints) is the end of a step, so it can be a program of its own. Its
    variables are then written in place, which XLA does not do for ops that are
    marked one by one.

    It cannot if an op has no kernel of XLA's, or with sparse gradients, as a
    program has fixed shapes and they have as many rows as a batch needs. On
    CPUs it is not worth it for plain SGD, whose few ops for each variable cost
    less than to pass the variable to a program. Then its ops are marked one by
    one, as all ops of a replica.

    Returns:
        The function; `None` if XLA is to compile its ops one by one.
    """
    is_program = xla_clusters.is_marking()
    given = _given(grads)
    if is_program and not (given and all(map(_has_fixed_shape, given))):
        return None
    traced = TracedUpdate(
        lambda each: _update_here(keras_apply, each, trainable_variables),
        grads,
        is_program=is_program,
    )
    if is_program and not xla_clusters.is_worth_a_program(
        traced.graph, given[0].device, parts=len(given)
    ):
        return None
    return traced


def _has_fixed_shape(gradient: Any) -> bool:
    return isinstance(gradient, tf.Tensor) and gradient.shape.is_fully_defined()
