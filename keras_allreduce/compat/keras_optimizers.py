"""Assumptions about Keras's optimizers, one function each."""

from collections.abc import Sequence
from typing import Any

import keras


def optimizers_of(model: keras.Model) -> list[Any]:
    """All optimizers that a step of the model may use.

    Keras's own step uses `model.optimizer`; a custom one finds the others in
    attributes of the model.
    """
    candidates = [getattr(model, "optimizer", None), *vars(model).values()]
    found: list[Any] = []
    for candidate in candidates:
        if isinstance(candidate, keras.optimizers.Optimizer) and not any(
            candidate is other for other in found
        ):
            found.append(candidate)
    return found


def inner_optimizer(optimizer: Any) -> Any | None:
    """The optimizer that a `LossScaleOptimizer` applies, `None` for others.

    The outer one checks that all gradients are finite, and only then calls
    `apply` of the inner one.
    """
    return getattr(optimizer, "inner_optimizer", None)


def accumulates(optimizer: Any) -> bool:
    """Whether an optimizer adds up the gradients of several steps."""
    inner = inner_optimizer(optimizer) or optimizer
    return bool(getattr(inner, "gradient_accumulation_steps", None))


def gradient_accumulators(
    optimizer: Any, variables: Sequence[Any]
) -> list[Any] | None:
    """The variables in which `optimizer` adds up gradients of `variables`.

    Keras has no public name for them. `None` if it does not accumulate, or
    has not made them yet.
    """
    if not getattr(optimizer, "gradient_accumulation_steps", None):
        return None
    if not optimizer.built:
        return None
    accumulators = [
        optimizer._accumulated_gradients[optimizer._get_variable_index(v)]
        for v in variables
    ]
    return None if any(a is None for a in accumulators) else accumulators


def all_accumulators(optimizer: Any) -> list[Any]:
    """All variables in which `optimizer` adds up gradients, if it does."""
    inner = inner_optimizer(optimizer) or optimizer
    found = getattr(inner, "_accumulated_gradients", None) or ()
    return [each for each in found if each is not None]


def iterations(optimizer: Any) -> Any:
    """Variable that counts the gradients `optimizer` was given.

    The public `iterations` counts updates, which are fewer if it accumulates.
    """
    return optimizer._iterations.value


def takes_gradient_as_value(variable: Any) -> bool:
    """Whether Keras assigns a variable its gradient (scales of float8).

    Keras takes those out of the update, so nothing is summed over replicas.
    """
    return bool(getattr(variable, "overwrite_with_gradient", False))
