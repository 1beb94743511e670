"""Gradients of a custom step, summed over the replicas where they are taken.

`tf.GradientTape.gradient` is the one place that every step passes: what it
returns on a replica is the gradient of the whole batch, as on one device,
whatever the step then does with it: clip it, look at its norm, add it up, hand
it to an optimizer of its own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat import keras_optimizers
from keras_allreduce.one_device import counted, replica
from keras_allreduce.one_device.natures import Natures
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.one_device.synchronized_layers import SynchronizedSums
from keras_allreduce.one_device.update import (
    already_reduced,
    sum_over_replicas,
    update,
)
from keras_allreduce.reduce.scaling import scale


class GradientsOfTheBatch:
    """Makes gradients of a replica's part those of the whole batch.

    Args:
        replicas: The replicas of this worker.
        natures: What is a mean, and what a sum.
        sums: The sums that layers make.
        shares_on_host: float32 scalars, the share of each replica; empty: all
            are 1.
        on_workers: Whether the step trains on several workers.
    """

    def __init__(
        self,
        replicas: Replicas,
        natures: Natures,
        sums: SynchronizedSums,
        shares_on_host: Sequence[tf.Tensor],
        *,
        on_workers: bool,
    ):
        self._replicas = replicas
        self._natures = natures
        self._sums = sums
        self._shares_on_host = shares_on_host
        # Backprop would wait for the shares of all workers.
        self._may_scale_gradients = on_workers and not tf.executing_eagerly()

    def gradient(
        self,
        gradient: Callable[..., Any],
        tape: tf.GradientTape,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The gradient of the whole batch, if that of variables is taken."""
        key = counted.gradient(tape, sources)
        if key is None:
            return gradient(tape, target, sources, output_gradients, **kwargs)
        this = replica.current()
        variables = tf.nest.flatten(sources)
        weight, host_weights = self._weights(variables, *key)
        self._sums.in_backprop = True
        found = gradient(
            tape,
            target,
            sources,
            _seeds(target, output_gradients, weight),
            **kwargs,
        )
        self._sums.in_backprop = False
        flat = tf.nest.flatten(found)
        this.reduced.update(map(keras_compat.identity_of, variables))
        flat = sum_over_replicas(self._replicas, flat, host_weights, variables)
        this.gradients.update(
            (id(each), each) for each in flat if each is not None
        )
        return tf.nest.pack_sequence_as(sources, flat)

    def _weights(
        self, variables: Sequence[Any], *key: Any
    ) -> tuple[Any, Sequence[tf.Tensor]]:
        """What scales the loss, and what scales the gradients on the host."""
        this = replica.current()
        if self._natures.is_sum(*key):
            if this.has_samples is None:
                return None, ()
            return tf.cast(this.has_samples, tf.float32), ()
        scales_gradients = self._may_scale_gradients and not any(
            map(keras_optimizers.takes_gradient_as_value, variables)
        )
        if scales_gradients and not self._sums.used:
            return 1 / this.num_replicas, self._shares_on_host
        return this.weight, ()

    def apply(
        self,
        apply: Callable[..., Any],
        optimizer: Any,
        grads: Any,
        trainable_variables: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Updates with the gradients of the whole batch, as one device does.

        Gradients that no tape has taken are summed here.
        """
        apply = partial(apply, optimizer, **kwargs)
        if already_reduced() or not replica.sees_one_device():
            # Called by another optimizer, or by `super()`: a
            # `LossScaleOptimizer` calls its inner one in threads of its own.
            return update(apply, grads, trainable_variables)
        grads = list(grads)
        variables = trainable_variables and list(trainable_variables)
        is_sum = self._natures.is_sum(*counted.update())
        if not self._are_reduced(variables or optimizer.variables):
            grads = self._sums_of(grads, variables, is_sum=is_sum)
        if keras_optimizers.inner_optimizer(optimizer) is not None:
            return apply(grads, variables)
        return update(apply, grads, variables)

    def _sums_of(
        self, grads: list[Any], variables: list[Any] | None, *, is_sum: bool
    ) -> list[Any]:
        """Sums of gradients that no tape has taken."""
        this = replica.current()
        weight = this.has_samples if is_sum else this.weight
        grads = [g if g is None else scale(g, weight) for g in grads]
        return sum_over_replicas(self._replicas, grads, (), variables or grads)

    def _are_reduced(self, variables: Sequence[Any]) -> bool:
        reduced = replica.current().reduced
        return any(keras_compat.identity_of(v) in reduced for v in variables)


def _seeds(target: Any, output_gradients: Any, weight: Any) -> Any:
    """What backprop starts from, so that the target counts `weight` times."""
    if weight is None:
        return output_gradients
    targets = tf.nest.flatten(target, expand_composites=True)
    given = (
        [None] * len(targets)
        if output_gradients is None
        else tf.nest.flatten(output_gradients, expand_composites=True)
    )
    return [
        scale(tf.ones_like(one) if seed is None else seed, weight)
        for one, seed in zip(targets, given, strict=True)
    ]
