"""Gradients summed over the replicas before a step looks at them.

Every step takes its gradients from `tf.GradientTape.gradient` and gives them to
`Optimizer.apply`. The tape returns on each replica the gradient of the
whole batch, as on one device; the step may then clip it,
look at its norm, add it up, hand it to any optimizer. So the finite check,
accumulation and clipping of Keras see the sum.

    tape.gradient      [1] the target scaled by the weight of the replica
                       [2] backprop
                       [3] the sum over all replicas
    optimizer.apply    [4] the sum of what no tape has taken
                       [5] the update, on each replica alike (`update.py`)

A step of Keras whose optimizer accumulates leaves out [3]: each replica adds
up its own gradients, and [4] sums them in the step that applies them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import graphs
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import reduction, replica
from keras_allreduce.one_device.empty_replica import SynchronizedSums
from keras_allreduce.one_device.gradient_sums import (
    sum_over_replicas,
    sum_when_applied,
)
from keras_allreduce.one_device.reduction import (
    RATIO,
    SUM,
    Key,
    Reductions,
)
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shares import part_of_denominators
from keras_allreduce.one_device.update import Updates, update
from keras_allreduce.reduce.observe import BatchRecord
from keras_allreduce.reduce.packing import scale


class GradientsOfTheBatch:
    """Makes gradients of a replica's part those of the whole batch.

    Args:
        replicas: The replicas of this worker.
        reductions: Which gradients are those of a mean, and which of a sum.
        sums: The sums that layers make.
        shares_on_host: float32 scalars, the share of each replica; empty: all
            are 1.
        is_custom: Whether the step is not Keras's own.
        accumulates: Whether the step leaves gradients to the accumulators of
            its optimizer.
        note: Called with the records of accumulated gradients, inside the
            branch that reduces them.
    """

    def __init__(
        self,
        replicas: Replicas,
        reductions: Reductions,
        sums: SynchronizedSums,
        shares_on_host: Sequence[tf.Tensor],
        *,
        is_custom: bool,
        accumulates: bool,
        note: Callable[[Sequence[BatchRecord]], None],
    ):
        self._replicas = replicas
        self._reductions = reductions
        self._sums = sums
        self._updates = Updates(replicas)
        self._shares_on_host = shares_on_host
        self._is_custom = is_custom
        self._accumulates = accumulates
        self._note = note
        # Backprop would wait for the shares of all workers.
        self._may_scale_gradients = (
            replicas.group.size > 1
            and not tf.executing_eagerly()
            and not accumulates
        )

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
        key = reduction.gradient_key(tape, sources)
        if key is None:
            return gradient(tape, target, sources, output_gradients, **kwargs)
        if key[0] == "inputs":
            found = gradient(tape, target, sources, output_gradients, **kwargs)
            return self._of_inputs(key, target, found)
        variables = tf.nest.flatten(sources)
        if self._reductions.losses is not None:
            replica.current().differentiated.update(
                (id(each), each) for each in graphs.terms(target)
            )
        kind = SUM if self._adds_up(target) else self._reductions.of(*key).kind
        weight, host_weights = self._weights(variables, kind, target)
        self._sums.in_backprop = True
        seeds = _seeds(target, output_gradients, weight)  # [1]
        found = gradient(tape, target, sources, seeds, **kwargs)  # [2]
        self._sums.in_backprop = False
        if kind == RATIO:  # Nothing counts on a replica: 0 / 0.
            counts = tf.not_equal(weight, 0) if tf.is_tensor(weight) else None
            found = tf.nest.map_structure(
                lambda each: each if each is None else scale(each, counts),
                found,
            )
        if self._accumulates:
            return found
        flat = tf.nest.flatten(found)
        flat = sum_over_replicas(  # [3]
            self._replicas, flat, host_weights, variables
        )
        replica.current().have_summed(variables, flat)
        return tf.nest.pack_sequence_as(sources, flat)

    def _adds_up(self, target: Any) -> bool:
        """Whether Keras's step differentiates a loss that is not reduced.

        Backprop then adds up the samples.
        """
        return not self._is_custom and bool(len(getattr(target, "shape", ())))

    def _of_inputs(self, key: Key, target: Any, found: Any) -> Any:
        """Gradients by inputs, as of a loss of the whole batch.

        A mean over the samples of the batch divides by more than one over
        those of the replica.
        """
        of_inputs = self._reductions.of_inputs(target, *key)
        if of_inputs is None:
            return found
        weight = replica.current().weight
        return tf.nest.map_structure(
            lambda each: None if each is None else scale(each, weight), found
        )

    def _weights(
        self, variables: Sequence[Any], kind: str, target: Any
    ) -> tuple[Any, Sequence[tf.Tensor]]:
        """Scales of the target, and of the gradients on the host.

        A scaled target also scales gradients that cross between replicas in
        synchronized layers. But backprop then waits for the shares of all
        workers. Without such layers gradients are scaled as they leave, which
        costs nothing where all replicas have as many samples.
        """
        this = replica.current()
        if kind == SUM:
            if this.has_samples is None:
                return None, ()
            return tf.cast(this.has_samples, tf.float32), ()
        if kind == RATIO:
            part = part_of_denominators(target, self._replicas)
            if part is not None:
                return part, ()
        scales_gradients = self._may_scale_gradients and not any(
            map(keras_compat.takes_gradient_as_value, variables)
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
        if replica.updates_locally() or not replica.sees_one_device():
            # Called by another optimizer, or by `super()`: a
            # `LossScaleOptimizer` calls its inner one in threads of its own.
            return update(apply, grads, trainable_variables)
        grads = list(grads)
        variables = trainable_variables and list(trainable_variables)
        grads = self._reduced(optimizer, grads, variables)  # [4]
        if keras_compat.inner_optimizer(optimizer) is not None:
            # Checks all replicas' gradients at once, in a merge_call.
            return apply(grads, variables)
        return self._updates.make(apply, optimizer, grads, variables)  # [5]

    def _reduced(
        self, optimizer: Any, grads: list[Any], variables: list[Any] | None
    ) -> list[Any]:
        """Gradients of the whole batch; sums of what no tape has taken."""
        this = replica.current()
        is_sum = self._reductions.is_sum(*reduction.update_key())
        if self._accumulates:
            return sum_when_applied(
                self._replicas, optimizer, grads, variables, self._note
            )
        if this.has_summed_any(variables or optimizer.variables):
            return grads
        weight = this.has_samples if is_sum else this.weight
        grads = [g if g is None else scale(g, weight) for g in grads]
        return sum_over_replicas(self._replicas, grads, (), variables or grads)


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
