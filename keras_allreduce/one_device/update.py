"""Sums gradients over the replicas before the optimizer looks at them.

So the finite check, accumulation and clipping of Keras see the sum, as on one
device.

With gradient accumulation nothing has to be sent between two updates: each
replica adds up its own gradients in Keras's accumulators. When Keras is about
to apply, what the replicas have accumulated is reduced together with the last
gradients, and the accumulators start again from zero. Keras then adds its
(zero) accumulators and goes on as on one device.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute, keras_optimizers
from keras_allreduce.devices import on_each
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.reduce.observe import BatchRecord, observe

_thread = threading.local()


def already_reduced() -> bool:
    """Whether this thread is in an update with reduced gradients."""
    return getattr(_thread, "reduced", False)


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """All replicas update their variables alike in the block, each its own."""
    before = already_reduced()
    _thread.reduced = True
    try:
        yield
    finally:
        _thread.reduced = before


class SummedUpdate:
    """Shadows `apply` of the optimizers of a model.

    Args:
        model: The model.
        replicas: The replicas of this worker.
        weights: float32 scalars on the host, the share of each replica, or
            nothing: all weigh 1.
        note: Called with the records of accumulated gradients, inside the
            branch that reduces them.
    """

    def __init__(
        self,
        model: keras.Model,
        replicas: Replicas,
        weights: Sequence[tf.Tensor],
        *,
        note: Callable[[Sequence[BatchRecord]], None],
    ):
        self._model = model
        self._replicas = replicas
        self._weights = weights
        self._note = note

    def shadows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The shadowed optimizers, each with its methods."""
        for optimizer in keras_optimizers.optimizers_of(self._model):
            yield optimizer, {"apply": partial(self._apply, optimizer)}
            inner = keras_optimizers.inner_optimizer(optimizer)
            if inner is not None:
                yield inner, {"apply": partial(update, inner.apply)}

    def _apply(
        self, optimizer: Any, grads: Any, trainable_variables: Any = None
    ) -> Any:
        """Reduces first, so that all that Keras does sees the sum."""
        if replica.is_measured():
            return None
        keras_apply = type(optimizer).apply.__get__(optimizer)
        grads = list(grads)
        if not already_reduced():
            if trainable_variables is not None:
                trainable_variables = list(trainable_variables)
            grads = self._summed(optimizer, grads, trainable_variables)
        if keras_optimizers.inner_optimizer(optimizer) is not None:
            # Checks all replicas' gradients at once, in a merge_call; its
            # inner optimizer then updates as below.
            return keras_apply(grads, trainable_variables)
        return update(keras_apply, grads, trainable_variables)

    def _summed(
        self, optimizer: Any, grads: list[Any], variables: list[Any] | None
    ) -> list[Any]:
        """The sums over all replicas; `None` stays `None`."""
        grads = largest_of_assigned(self._replicas, grads, variables)
        moving = _moving(grads, variables)
        if not moving:
            return grads
        gradients = [grads[index] for index in moving]
        accumulators = variables and keras_optimizers.gradient_accumulators(
            optimizer, [variables[index] for index in moving]
        )
        if not accumulators:
            this = replica.current()
            scales = this.scaled == "gradients" and this.share is not None
            weights = self._weights if scales else ()
            return _sums(self._replicas, grads, weights, variables)
        gradients = [tf.convert_to_tensor(each) for each in gradients]
        sums = _merge(
            partial(self._sum_when_applied, optimizer, accumulators), gradients
        )
        reduced = list(grads)
        for index, total in zip(moving, sums, strict=True):
            reduced[index] = total
        return reduced

    def _sum_when_applied(
        self,
        optimizer: Any,
        accumulators: Sequence[Any],
        _strategy: tf.distribute.Strategy,
        gradients: Sequence[Any],
    ) -> list[Any]:
        """Sums accumulated gradients if this step applies them.

        Args:
            optimizer: Optimizer with `gradient_accumulation_steps`.
            accumulators: Its accumulator of each gradient.
            gradients: Distributed dense gradients, one per variable.

        Returns:
            One distributed value per gradient: on a step that applies, the
            sum of all that was accumulated on all replicas; on others the
            gradient as it was.
        """
        steps = optimizer.gradient_accumulation_steps
        local_values = self._replicas.local_values
        parts = [local_values(gradient) for gradient in gradients]
        accumulated = [local_values(each.value) for each in accumulators]

        def communicate() -> list[tuple[Any, ...]]:
            totals = [
                distribute.PerReplica(tuple(map(_take, *both)))
                for both in zip(parts, accumulated, strict=True)
            ]
            with observe() as records:
                sums = self._replicas.sum_gradients(totals)
            self._note([record.every(steps) for record in records])
            return [tuple(local_values(total)) for total in sums]

        def keep() -> list[tuple[Any, ...]]:
            return [tuple(each) for each in parts]

        count = keras_optimizers.iterations(optimizer) + 1
        kept = tf.cond(tf.equal(count % steps, 0), communicate, keep)
        return [distribute.PerReplica(tuple(each)) for each in kept]


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
    gradients = largest_of_assigned(replicas, gradients, variables)
    return _sums(replicas, gradients, weights, variables)


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
        largest = []
        for value in values:
            with tf.device("/cpu:0"):
                local = tf.stack(replicas.local_values(value))
                of_all = replicas.largest_of_workers(tf.reduce_max(local, 0))
            parts = on_each(
                replicas.devices,
                tf.identity,
                [of_all] * len(replicas.devices),
            )
            largest.append(distribute.PerReplica(tuple(parts)))
        return largest

    found = list(gradients)
    merged = _merge(merge, [gradients[index] for index in assigned])
    for index, value in zip(assigned, merged, strict=True):
        found[index] = value
    return found


def _sums(
    replicas: Replicas,
    gradients: Sequence[Any],
    weights: Sequence[tf.Tensor],
    variables: Sequence[Any] | None,
) -> list[Any]:
    moving = _moving(gradients, variables)
    if not moving:
        return list(gradients)

    def merge(_strategy: Any, moved: Sequence[Any]) -> list[Any]:
        return replicas.sum_gradients(moved, weights)

    sums = _merge(merge, [gradients[index] for index in moving])
    reduced = list(gradients)
    for index, total in zip(moving, sums, strict=True):
        reduced[index] = total
    return reduced


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
            and keras_optimizers.takes_gradient_as_value(variables[index])
        )
    ]


def _merge(merge: Callable[..., Any], gradients: Sequence[Any]) -> Any:
    """Calls `merge` once, with the gradients of all replicas."""
    context = tf.distribute.get_replica_context()
    # Only the gradients are arguments: merge_call makes one distributed value
    # of the replicas' arguments; what is bound stays as it is.
    return context.merge_call(
        tf.autograph.experimental.do_not_convert(merge), args=(gradients,)
    )


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
    with alike():
        if trainable_variables is None:  # One of the user's may not take it.
            return keras_apply(grads)
        return keras_apply(grads, trainable_variables)
