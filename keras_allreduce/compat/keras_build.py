"""Takes part in what Keras does with a first batch, before the first step.

Only under a strategy does Keras call the model, its metrics and its losses on
the shapes of a first batch, to make all variables. On one device the first
step makes them. A custom `train_step` need not call the model, nor take the
batch apart as Keras does, and on one device it trains.

Keras enters the scope of the strategy for it, which is where a strategy takes
part; nothing of Keras is replaced.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_allreduce.compat.frames import calling_frames

_NAME = "_maybe_symbolic_build"

# The method of the strategy, that of a subclass, and Keras's.
_FRAMES = 3


def first_batch() -> tuple[keras.Model, Any] | None:
    """The model that Keras is about to build, and the batch for it.

    To be called where a strategy is asked for its scope, or to reduce.

    Returns:
        Nothing if it is not Keras that asks, to build a model.
    """
    for frame in calling_frames(_FRAMES):
        if frame.f_code.co_name != _NAME:
            continue
        model = frame.f_locals.get("self")
        if isinstance(model, keras.Model):
            return model, frame.f_locals.get("data_batch")
    return None


@contextlib.contextmanager
def built_or_left(
    scope: Any, prepare: Callable[[Any, Any], None], model: Any, batch: Any
) -> Iterator[None]:
    """Keras builds a model in the block, which a failure only ends.

    It is left to the first step, which fails on one device too if it is the
    program's fault.

    Args:
        scope: The scope of the strategy, entered in the block.
        prepare: Called with the next two first.
        model: The model.
        batch: The batch that Keras looks at.
    """
    try:
        with scope:
            prepare(model, batch)
            yield
    except Exception as error:
        if _is_our_own(error):
            raise


def _is_our_own(error: BaseException | None) -> bool:
    """Whether this package has raised an error, or one that it follows."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if module.startswith("keras_allreduce.") and not module.endswith(
            "keras_build"
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
