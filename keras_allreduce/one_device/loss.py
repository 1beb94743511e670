"""Scales the loss of each replica by its share of the batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat import keras_optimizers
from keras_allreduce.one_device import replica, rules
from keras_allreduce.one_device.rules import Rule
from keras_allreduce.one_device.synchronized_layers import SynchronizedSums
from keras_allreduce.reduce.scaling import scale


class ScaledLoss:
    """Shadows the methods of a model that compute its loss.

    Args:
        model: The model.
        rule: How its loss is weighted.
        sums: The sums that its layers make.
        on_workers: Whether the step trains on several workers. Backprop would
            wait for the shares of all of them if the loss were scaled.
    """

    def __init__(
        self,
        model: keras.Model,
        rule: Rule,
        sums: SynchronizedSums,
        *,
        on_workers: bool,
    ):
        self._model = model
        self._rule = rule
        self._sums = sums
        self._optimizers = keras_optimizers.optimizers_of(model)
        # In a custom step the whole of which may be in backprop, a gradient
        # may have been taken before the loss was scaled.
        self._gradients_can_be_scaled = (
            on_workers
            and not (tf.executing_eagerly() or sums.in_backprop)
            and rule.kind == "samples"
            and not any(map(keras_optimizers.accumulates, self._optimizers))
        )

    def shadows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The shadowed objects, each with its methods."""
        model = self._model
        yield (
            model,
            {"compute_loss": partial(self._compute_loss, model.compute_loss)},
        )
        for metric in keras_compat.loss_metrics(model):
            update = partial(self._update_loss_metric, metric.update_state)
            yield metric, {"update_state": update}
        for optimizer in self._optimizers:
            scale_loss = partial(self._scale_loss, optimizer.scale_loss)
            yield optimizer, {"scale_loss": scale_loss}

    def _compute_loss(
        self,
        keras_compute_loss: Callable[..., Any],
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        **training: Any,
    ) -> Any:
        """The loss of this replica; 0 on an empty one."""
        loss = keras_compute_loss(x, y, y_pred, sample_weight, **training)
        if not self._rule.is_known:
            return loss
        loss = scale(loss, replica.current().has_samples)
        scalar = rules.find_scalar_loss(self._rule.suspects, y, y_pred)
        if scalar is not None:
            rules.warn_of_scalar_loss(self._model, scalar)
            replica.become(
                replace(replica.current(), share=None, correction=None)
            )
        return scale(loss, replica.current().correction)

    def _update_loss_metric(
        self, keras_update: Callable[..., Any], value: Any, sample_weight: Any
    ) -> Any:
        """The loss of one output among several, in the mean that is shown.

        Keras takes the mean over batches where it does not know their size
        in advance; then every replica counts once, with its share.
        """
        if sample_weight is None and self._rule.kind == "samples":
            value = scale(value, replica.current().share)
        return keras_update(value, sample_weight=sample_weight)

    def _scale_loss(
        self, keras_scale_loss: Callable[..., Any], loss: Any
    ) -> Any:
        """The loss that is differentiated, scaled by the share of the batch.

        That also scales gradients that cross between replicas in synchronized
        layers. But backprop waits for the shares of all workers. Without such
        layers the gradients are scaled instead, as they leave, which costs
        nothing where all replicas have as many samples.
        """
        self._sums.in_backprop = True
        if self._rule.is_known:
            this = replica.current()
            if self._gradients_can_be_scaled and not self._sums.used:
                replica.become(replace(this, scaled="gradients"))
            else:
                replica.become(replace(this, scaled="loss"))
                loss = scale(loss, this.share)
        return keras_scale_loss(loss)
