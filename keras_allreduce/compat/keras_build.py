"""Takes part in what Keras does with a first batch, before the first step.

Only under a strategy does Keras call the model, its metrics and its losses on
the shapes of a first batch, to make all variables. On one device the first
step makes them. A custom `train_step` need not call the model, nor take the
batch apart as Keras does, and on one device it trains.
"""

import contextlib
import functools
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

_thread = threading.local()
_state = {"installed": False}

_NAME = "_maybe_symbolic_build"


def is_looking_at_shapes() -> bool:
    """Whether Keras takes a batch in this thread only to see its shapes."""
    return getattr(_thread, "looking", False)


def install(
    is_ours: Callable[[Any], bool], prepare: Callable[[Any, Any], None]
) -> None:
    """Replaces the look at a first batch, once, for some strategies.

    A failure there is left to the first step, which fails on one device too if
    it is the program's. So is a data set without a batch.

    Args:
        is_ours: Whether the models of a strategy are concerned.
        prepare: Called with the model and the batch that Keras looks at.
    """
    if _state["installed"]:
        return
    _state["installed"] = True
    original = getattr(keras.Model, _NAME, None)
    if original is None:
        warnings.warn(
            f"keras_allreduce expects Model.{_NAME} in Keras. Received: Keras "
            f"{keras.__version__}, which has none, so models that Keras cannot "
            "build by itself may fail. Use a version of Keras that "
            "keras_allreduce was tested with.",
            stacklevel=3,
        )
        return

    @functools.wraps(original)
    def look(model: Any, *args: Any, **kwargs: Any) -> None:
        if not is_ours(model.distribute_strategy):
            original(model, *args, **kwargs)
            return
        with _looking(model, prepare):
            original(model, *args, **kwargs)

    setattr(keras.Model, _NAME, look)


@contextlib.contextmanager
def _looking(model: Any, prepare: Callable[[Any, Any], None]) -> Iterator[None]:
    """Keras looks at a first batch in the block; failures end the block."""
    build = model._symbolic_build

    def build_prepared(iterator: Any = None, data_batch: Any = None) -> None:
        prepare(model, data_batch)
        build(iterator=iterator, data_batch=data_batch)

    vars(model)["_symbolic_build"] = build_prepared
    _thread.looking = True
    try:
        yield
    except StopIteration:
        pass  # No batch: Keras's epoch says so.
    except Exception as error:
        if _is_our_own(error):
            raise
    finally:
        _thread.looking = False
        del vars(model)["_symbolic_build"]


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
