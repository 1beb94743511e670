"""Assumptions about Keras's losses, one function each."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat.keras_config import is_of_keras

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


def is_one_value_per_sample(loss: Any, y_pred: Any) -> bool:
    """Whether a loss of `compile` is known to be one value per sample.

    That is, value i depends on sample i alone, and Keras reduces the values.
    It is known of the functions of Keras below, which reduce the last axis or
    those of the argument `axis`, if none of these is that of the samples.

    Args:
        loss: A loss of `compile`; Keras wraps functions in a loss object.
        y_pred: Its argument.
    """
    if not (
        reduces_as_keras(loss)
        and type(loss).call is _CallsAFunction.call
        and "call" not in vars(loss)
        and any(loss.fn is each for each in _OF_SAMPLES)
    ):
        return False
    rank = tf.TensorShape(getattr(y_pred, "shape", None)).rank
    axis = loss._fn_kwargs.get("axis", _DEFAULT_AXES.get(loss.fn, -1))
    if rank is None or rank < 2 or axis is None:
        return False
    return all(each % rank for each in keras.tree.flatten(axis))


def call_function(
    metric: Any, y_true: Any, y_pred: Any, _sample_weight: Any = None
) -> Any:
    """Calls the function of a `MeanMetricWrapper`."""
    return metric._fn(y_true, y_pred, **metric._fn_kwargs)


def has_function_of_samples(metric: Any, y_pred: Any) -> bool:
    """Whether the function of a metric returns one value for each sample.

    Args:
        metric: A `MeanMetricWrapper`.
        y_pred: The outputs that its function is called with.
    """
    function = metric._fn
    if isinstance(function, keras.losses.Loss):
        return is_one_value_per_sample(function, y_pred)
    return is_of_keras(function)


def losses_of_batch(model: keras.Model) -> list[str]:
    """Names of the losses of `compile` that are not one value per sample.

    Those of a model of one output whose shape is known; of other models, by
    their kind alone.
    """
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    y_pred = outputs[0] if len(outputs) == 1 else _MATRIX
    found = []
    for given in keras.tree.flatten(getattr(model, "loss", None)):
        if given is None or str(given).lower() in ("crossentropy", "ce"):
            continue
        loss = keras.losses.get(given)
        if not isinstance(loss, keras.losses.Loss):
            loss = _CallsAFunction(loss, name=name_of(loss))
        if not is_one_value_per_sample(loss, y_pred):
            found.append(name_of(loss))
    return found


_MATRIX = tf.TensorSpec([None, None])

_CallsAFunction: Any = keras.losses.MeanSquaredError.__base__
"""Keras's class of losses that call the function `fn`."""

_OF_SAMPLES = [
    getattr(keras.losses, name)
    for name in (
        "binary_crossentropy",
        "binary_focal_crossentropy",
        "categorical_crossentropy",
        "categorical_focal_crossentropy",
        "categorical_generalized_cross_entropy",
        "categorical_hinge",
        "cosine_similarity",
        "ctc",
        "dice",
        "hinge",
        "huber",
        "kl_divergence",
        "log_cosh",
        "mean_absolute_error",
        "mean_absolute_percentage_error",
        "mean_squared_error",
        "mean_squared_logarithmic_error",
        "poisson",
        "sparse_categorical_crossentropy",
        "squared_hinge",
        "tversky",
    )
    if hasattr(keras.losses, name)
]
"""Functions of one value per sample; `circle` compares samples."""

_DEFAULT_AXES = {keras.losses.dice: None, keras.losses.tversky: None}
"""The default of `axis`, where it is not -1. `None`: all axes."""


def name_of(loss: Any) -> str:
    """The name of a loss of `compile`."""
    return str(getattr(loss, "name", getattr(loss, "__name__", loss)))


def mask_of(value: Any) -> Any:
    """The mask that Keras has attached to an output or loss, or `None`."""
    return getattr(value, "_keras_mask", None)


def attach_mask(value: Any, mask: Any) -> None:
    """Attaches a mask, as Keras does."""
    value._keras_mask = mask


def call_and_see(
    loss: Any, y_true: Any, y_pred: Any, sample_weight: Any
) -> tuple[Any, int | None, Any]:
    """Calls a loss object of Keras, and observes the values it reduces.

    Returns:
        The loss; the rank of the values that Keras has reduced to it, 0 if
        `loss.call` returns one value for all samples, which Keras leaves as
        it is; and the mask of the values that Keras has counted, or `None`.
    """
    seen: list[tuple[int, Any]] = []

    def observed(*args: Any, **kwargs: Any) -> Any:
        values = loss.call(*args, **kwargs)
        seen.append((len(values.shape), mask_of(values)))
        return values

    # Another thread may train another model with the same loss.
    twin = object.__new__(type(loss))
    vars(twin).update(vars(loss), call=observed)
    value = twin(y_true, y_pred, sample_weight)
    rank, of_values = seen[0] if seen else (None, None)
    masks = [m for m in (mask_of(y_pred), of_values) if m is not None]
    mask = masks[0] & masks[1] if len(masks) == 2 else (masks or [None])[0]
    return value, rank, mask


@contextlib.contextmanager
def compiled_losses_replaced(
    model: keras.Model, replace: Callable[[int, Any], Callable[..., Any]]
) -> Iterator[None]:
    """Other functions compute the losses of `compile` in the block.

    Args:
        model: A compiled model.
        replace: Gets the number of a loss and the loss, and returns the
            function that is called in its place with `(y_true, y_pred,
            sample_weight)`.
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


@contextlib.contextmanager
def added_losses_of_each_thread(model: keras.Model) -> Iterator[None]:
    """Each thread has its own losses of `add_loss` in the block.

    A replica's thread pauses wherever replicas meet, and then the next one
    runs the same layers, which keep their added losses in one list.
    """
    lists = [(vars(layer), _ListOfThread()) for layer in _layers(model)]
    before = [own["_losses"] for own, _ in lists]
    for own, of_thread in lists:
        own["_losses"] = of_thread
    try:
        yield
    finally:
        for (own, _), losses in zip(lists, before, strict=True):
            own["_losses"] = losses


def added_losses(model: keras.Model) -> list[tuple[Any, list[Any]]]:
    """The losses that each layer has added, for `put_back_losses`."""
    return [(layer, layer._losses[:]) for layer in _layers(model)]


def put_back_losses(
    model: keras.Model, before: list[tuple[Any, list[Any]]]
) -> None:
    """Forgets the losses that layers have added since then."""
    model._clear_losses()
    for layer, losses in before:
        layer._losses.extend(losses)


def _layers(model: keras.Model) -> list[Any]:
    return [
        layer for layer in model._flatten_layers() if "_losses" in vars(layer)
    ]


class _ListOfThread:
    """The list of losses of a layer, with other content in each thread."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def _list(self) -> list[Any]:
        return vars(self._thread).setdefault("list", [])

    def __getitem__(self, index: Any) -> Any:
        return self._list[index]

    def __len__(self) -> int:
        return len(self._list)

    def extend(self, losses: Any) -> None:
        """Adds losses."""
        self._list.extend(losses)

    def clear(self) -> None:
        """Forgets all."""
        self._list.clear()


def num_added_losses(model: keras.Model) -> int:
    """How many of `model.losses` come from `add_loss`; they come first.

    The others are those of weight regularizers.
    """
    return sum(
        len(layer._get_own_losses()) for layer in model._flatten_layers()
    )


ADDS_A_LOSS = "_aggregate_additional_loss"
"""The method of a model that Keras calls with each of `model.losses`."""
