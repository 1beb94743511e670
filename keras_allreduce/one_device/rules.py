"""Looks at a model and says how its loss is weighted over the replicas.

Keras gives every replica the mean loss over its part of the batch, divided by
the number of replicas. The sum of these is the mean over the whole batch only
if all parts are equal, or if each is scaled by its share. Whether that is
right depends on the loss: a sum must not be scaled.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat

MEANS = frozenset({"sum_over_batch_size", "mean"})
WEIGHTED_MEAN = "mean_with_sample_weight"

_warned: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class Rule:
    """How the loss of a replica goes into that of the batch.

    Attributes:
        kind: `"samples"`: by its number of samples. `"sample_weights"`: by
            the sum of its sample weights. `"sum"`: it is added up. `"as_is"`:
            not known, so it is left unscaled.
        reason: Why it is not known, for a warning.
        suspects: Custom losses; they are means only if they return one value
            per sample.
    """

    kind: str
    reason: str = ""
    suspects: tuple[Callable[..., Any], ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether losses are scaled, and empty replicas left out."""
        return self.kind != "as_is"


def find_rule(
    model: keras.Model, step: str, weigh_samples: bool | None
) -> Rule:
    """The rule for a step of `model`.

    Args:
        model: A compiled model.
        step: `"train_step"` or `"test_step"`.
        weigh_samples: `True` and `False` decide; `None` looks at the model.
    """
    if weigh_samples is not None:
        return Rule("samples" if weigh_samples else "as_is")
    for method in (step, "compute_loss"):
        if not keras_compat.is_keras_method(model, method):
            return Rule("as_is", f"the model has a custom `{method}`")
    losses = [loss for loss in keras.tree.flatten(model.loss) if loss]
    for loss in losses:
        if not keras_compat.reduces_as_keras(loss):
            return Rule("as_is", f"{_name(loss)} has a custom `__call__`")
    reductions = {keras_compat.reduction(loss) for loss in losses}
    suspects = tuple(
        loss for loss in losses if not keras_compat.is_keras_own(loss)
    )
    if reductions <= MEANS:
        return Rule("samples", suspects=suspects)
    if reductions == {"sum"}:
        return Rule("sum", suspects=suspects)
    if reductions == {WEIGHTED_MEAN} and len(losses) == 1:
        return Rule("sample_weights", suspects=suspects)
    return Rule(
        "as_is",
        "its losses are reduced in ways that do not go together "
        f"({', '.join(sorted(str(name) for name in reductions))})",
    )


def find_scalar_loss(
    losses: Sequence[Callable[..., Any]], y: Any, y_pred: Any
) -> Callable[..., Any] | None:
    """The first of `losses` that returns one value for all samples, if any.

    The losses are traced for their shapes, and not run.
    """
    pairs = list(
        zip(keras.tree.flatten(y), keras.tree.flatten(y_pred), strict=False)
    )
    for loss in losses:
        traced = tf.function(getattr(loss, "call", loss), autograph=False)
        for true, predicted in pairs:
            shapes = traced.get_concrete_function(
                tf.TensorSpec(true.shape, true.dtype),
                tf.TensorSpec(predicted.shape, predicted.dtype),
            ).output_shapes
            if isinstance(shapes, tf.TensorShape) and shapes.rank == 0:
                return loss
    return None


def warn_of_scalar_loss(model: keras.Model, loss: Callable[..., Any]) -> None:
    """Warns that Keras does not divide a loss by the number of replicas."""
    _warn_once(
        model,
        f"The loss {_name(loss)} returns one value for all samples, which "
        "Keras does not divide by the number of replicas: gradients may be as "
        "many times those of one device. Return one value per sample and let "
        "Keras take the mean. AllReduceStrategy(weigh_samples=False) says "
        "that the loss is right as it is.",
    )


def warn_of_unknown_rule(model: keras.Model, rule: Rule) -> None:
    """Warns that uneven batches may differ from one device, and how."""
    _warn_once(
        model,
        "When a batch does not divide evenly between the replicas, the "
        f"result may differ from that of one device: {rule.reason}. Pass "
        "weigh_samples=True to AllReduceStrategy if the loss is a mean over "
        "samples divided by the number of replicas, False if it is right as "
        "it is.",
    )


def _warn_once(model: keras.Model, warning: str) -> None:
    if model not in _warned:
        _warned.add(model)
        warnings.warn(warning, stacklevel=3)


def _name(loss: Any) -> str:
    return f"`{getattr(loss, '__name__', type(loss).__name__)}`"
