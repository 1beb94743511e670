"""What the package assumes about Keras, one function per assumption."""

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any


def layers(model: Any) -> list[Any]:
    """All layers of a model, at any depth, and the model itself.

    The public `layers` lists only those at the top.
    """
    return list(model._flatten_layers())


def seed_generators(model: Any) -> list[Any]:
    """All `keras.random.SeedGenerator` objects in the layers of a model.

    Keras tracks them for each layer but lists only their variables.
    """
    found: dict[int, Any] = {}
    for layer in layers(model):
        for generator in getattr(layer, "_seed_generators", ()):
            found[id(generator)] = generator
    return list(found.values())


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


def iterations(optimizer: Any) -> Any:
    """Variable that counts the gradients `optimizer` was given.

    The public `iterations` counts updates, which are fewer if it accumulates.
    """
    return optimizer._iterations.value


def loss_metrics(model: Any) -> list[Any]:
    """Metrics of the losses of a model's outputs, if it has several.

    In `model.metrics` nothing tells them from other metrics.
    """
    compiled = getattr(model, "_compile_loss", None)
    return list(compiled.metrics) if compiled is not None else []


def steps_of_keras_epochs() -> tuple[int | None, int | None] | None:
    """Steps and batches of the data set that Keras wants to have distributed.

    Keras's iterator knows them, and gives the strategy the data set alone. To
    be called where a strategy distributes a data set.

    Returns:
        The steps of an epoch that were asked for and the batches of the data
        set, each `None` if not known; `None` if it is not Keras that asks.
    """
    for frame in _calling_frames():
        iterator: Any = frame.f_locals.get("self")
        if hasattr(iterator, "enumerate_epoch"):
            return iterator.steps_per_epoch, iterator.data_adapter.num_batches
    return None


def called_from(name: str) -> bool:
    """Whether a function of this name is among the calling frames."""
    return any(frame.f_code.co_name == name for frame in _calling_frames())


def _calling_frames() -> Iterator[FrameType]:
    """The frames from which a function of this module was called."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(10):
        if frame is not None:
            yield frame
            frame = frame.f_back
