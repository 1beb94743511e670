"""The one change to Keras: `fit` shows the all-reduce without being asked.

`model.fit` builds a `keras.callbacks.CallbackList` and offers no way for a
strategy to take part. This module wraps its constructor, once, when the first
strategy with `fit_log=True` is made. The wrapper exchanges the default progress
bar for `FitProgbar` if the model is under such a strategy, and does nothing
else. `AllReduceStrategy(fit_log=False)` leaves Keras as it is.
"""

import functools
import warnings
from typing import Any

import keras

from keras_allreduce.fit_output.progress_bar import FitProgbar

_state = {"installed": False, "warned": False}


def install() -> None:
    """Wraps the constructor of `keras.callbacks.CallbackList`, once."""
    if _state["installed"]:
        return
    try:
        constructor = keras.callbacks.CallbackList.__init__
    except AttributeError as error:
        _warn(error)
        return

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        try:
            _exchange_progress_bar(self)
        except AttributeError as error:
            _warn(error)

    keras.callbacks.CallbackList.__init__ = construct
    _state["installed"] = True


def _exchange_progress_bar(callbacks: Any) -> None:
    model = callbacks.model
    strategy = getattr(model, "distribute_strategy", None)
    steps = getattr(strategy, "shown_steps", None)
    if steps is None:
        return
    for index, callback in enumerate(callbacks.callbacks):
        if type(callback) is keras.callbacks.ProgbarLogger:
            ours = FitProgbar(steps)
            ours.set_params(callbacks.params)
            ours.set_model(model)
            callbacks.callbacks[index] = ours


def _warn(error: AttributeError) -> None:
    if not _state["warned"]:
        _state["warned"] = True
        warnings.warn(
            "The fit output cannot show the all-reduce with this version of "
            f"Keras ({keras.__version__}): {error}. Training goes on; "
            "keras_allreduce.AllReduceLogger() still reports per epoch.",
            stacklevel=3,
        )
