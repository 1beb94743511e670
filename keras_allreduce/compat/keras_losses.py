"""Assumptions about Keras's losses, one function each."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

WEIGHTED_MEAN = "mean_with_sample_weight"
_SUMS = ("sum", "none", None)


def reduction(loss: Any) -> Any:
    """How Keras reduces a loss that was passed to `compile`.

    Names and functions become means over samples.
    """
    if isinstance(loss, keras.losses.Loss):
        return loss.reduction
    return "sum_over_batch_size"


def is_sum(loss: Any) -> bool:
    """Whether the samples of a loss are added up.

    A loss that is not reduced at all is added up when it is differentiated.
    """
    return reduction(loss) in _SUMS


def reduces_as_keras(loss: Any) -> bool:
    """Whether Keras's own `Loss.__call__` reduces a loss, if it is an object.

    That applies `sample_weight`, the mask and `reduction`.
    """
    return (
        isinstance(loss, keras.losses.Loss)
        and type(loss).__call__ is keras.losses.Loss.__call__
    )


def divides_by_weights(model: keras.Model) -> bool:
    """Whether a loss of `compile` is divided by the sum of its weights."""
    return any(
        reduction(loss) == WEIGHTED_MEAN
        for loss in keras.tree.flatten(getattr(model, "loss", None))
    )


def is_keras_own(loss: Any) -> bool:
    """Whether a loss is computed by a function or class of Keras.

    Keras wraps functions in a loss object with the function in `fn`.
    """
    function = getattr(loss, "fn", None)
    named = type(loss) if function is None else function
    return str(getattr(named, "__module__", "")).startswith("keras.")


def may_compare_samples(loss: Any) -> bool:
    """Whether values of a loss may depend on other samples of the batch.

    `Circle` is the one loss of Keras that returns one value per sample and
    compares them.
    """
    return isinstance(loss, keras.losses.Circle) or not is_keras_own(loss)


def mask_of(y_pred: Any) -> Any:
    """The mask that Keras has attached to an output, or `None`."""
    return getattr(y_pred, "_keras_mask", None)


def call_and_rank(
    loss: Any, y_true: Any, y_pred: Any, sample_weight: Any
) -> tuple[Any, int | None]:
    """Calls a loss object of Keras, and sees what it reduces.

    Returns:
        The loss, and the rank of the values that Keras has reduced to it. 0:
        `loss.call` returns one value for all samples, which Keras leaves as
        it is.
    """
    ranks: list[int] = []
    call = loss.call

    def observed(*args: Any, **kwargs: Any) -> Any:
        values = call(*args, **kwargs)
        ranks.append(len(values.shape))
        return values

    vars(loss)["call"] = observed
    try:
        value = loss(y_true, y_pred, sample_weight)
    finally:
        del vars(loss)["call"]
    return value, ranks[0] if ranks else None


@contextlib.contextmanager
def compiled_losses_replaced(
    model: keras.Model, replace: Callable[[int, Any], Callable[..., Any]]
) -> Iterator[None]:
    """Other functions compute the losses of `compile` in the block.

    Args:
        model: A compiled model.
        replace: Gets the number of a loss and the loss, and returns what is
            called in its place with `(y_true, y_pred, sample_weight)`.
    """
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None:
        yield
        return
    originals: dict[int, Any] = {}

    def exchange() -> None:
        for index, item in enumerate(compiled._flat_losses or ()):
            originals[index] = item.loss
            compiled._flat_losses[index] = item._replace(
                loss=replace(index, item.loss)
            )

    def build(y_true: Any, y_pred: Any) -> None:
        type(compiled).build(compiled, y_true, y_pred)
        exchange()

    if compiled.built:
        exchange()
    else:
        # Keras makes the list when it first sees an output.
        vars(compiled)["build"] = build
    try:
        yield
    finally:
        vars(compiled).pop("build", None)
        for index, loss in originals.items():
            compiled._flat_losses[index] = compiled._flat_losses[
                index
            ]._replace(loss=loss)


def num_added_losses(model: keras.Model) -> int:
    """How many of `model.losses` come from `add_loss`; they come first.

    The others are those of weight regularizers.
    """
    return sum(
        len(layer._get_own_losses()) for layer in model._flatten_layers()
    )


ADDS_A_LOSS = "_aggregate_additional_loss"
"""The method of a model that Keras calls with each of `model.losses`."""
