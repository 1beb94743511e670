"""The fit output: the plan, the live cost, and a hint after an epoch.

`fit` shows it without being asked. `model.fit` builds a
`keras.callbacks.CallbackList` and offers no way for a strategy to take part, so
`install` wraps its constructor, once, when the first strategy with
`fit_log=True` is made. The wrapper exchanges the default progress bar for
`FitProgbar` if the model is under such a strategy, and does nothing else.
`AllReduceStrategy(fit_log=False)` leaves Keras as it is.
"""

import functools
import math
import os
import shutil
import sys
import textwrap
import time
import warnings
from typing import Any

import keras
from absl import logging

from keras_allreduce.compat import versions
from keras_allreduce.environment import COLUMNS
from keras_allreduce.fit_output import readable
from keras_allreduce.fit_output.hints import Advisor
from keras_allreduce.fit_output.step_log import EpochMeter, StepLog

REFRESH_SECONDS = 0.5
"""Least time between two readings of the clocks for the progress bar."""


class FitProgbar(keras.callbacks.ProgbarLogger):
    """Keras's progress bar, with the plan and the cost of the all-reduce.

    The numbers are added to a copy of the logs, for the display alone: no
    other callback sees them. In a terminal no line wraps that would not
    without them.

    Args:
        log: The steps of the strategy.
    """

    def __init__(self, log: StepLog):
        super().__init__()
        self._log = log
        self._epoch: EpochMeter | None = None
        self._advisor: Advisor | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._epoch = EpochMeter(self._log, self.model)
        if self._log.may_hint:
            self._advisor = Advisor(self._log, self.model)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        super().on_epoch_begin(epoch, logs)
        self._tell_plans()
        if self._epoch:
            self._epoch.begin()
        self._first_batch = True
        self._next_draw = 0.0

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._advisor:
            self._advisor.call_begins()
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._advisor:
            self._advisor.call_ends(batch + 1)
        if self._first_batch:
            # The step has just been traced, and no bar is on the screen yet.
            self._first_batch = False
            self._tell_plans()
        if self._epoch:
            seconds = REFRESH_SECONDS if self.verbose == 1 else math.inf
            self._epoch.refresh(batch + 1, seconds)
        super().on_train_batch_end(batch, self._fitted(logs or {}))

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._epoch:
            self._epoch.read()
        # It is that of the first epoch, `initial_epoch`.
        epochs = self.epochs - epoch
        hint = self._advisor and self._advisor.line(logs or {}, epochs)
        self._advisor = None
        logs = logs or {}
        known = readable.logged(logs)
        validation = {k: v for k, v in known.items() if k.startswith("val_")}
        metrics = {
            k: v for k, v in known.items() if k in logs and k not in validation
        }
        # In the place where the live bar has them, before the validation.
        added = {k: v for k, v in known.items() if k not in logs}
        shown = {**metrics, **self._cost(), **added, **validation}
        bar = self.progbar.width if self.verbose == 1 else None
        super().on_epoch_end(
            epoch,
            readable.broken(shown, _columns(), self.target or self.seen, bar),
        )
        if hint and self.verbose:
            self._tell(hint)

    def _fitted(self, logs: dict[str, Any]) -> dict[str, Any]:
        """The logs with the numbers that fit, where the bar may be drawn."""
        now = time.monotonic()
        if self.verbose != 1 or now < self._next_draw:
            return logs
        self._next_draw = now + self.progbar.interval / 2
        shown, self.progbar.width = readable.live(
            logs, self._cost(), _columns(), self.target
        )
        return shown

    def _cost(self) -> dict[str, Any]:
        """The numbers that are known."""
        stats = self._epoch and self._epoch.stats
        if not stats:
            return {}
        # A Keras that prints plain numbers has the unit in the name.
        unit = "" if versions.bar_prints_texts(keras.__version__) else "_ms"
        cost = {f"all_reduce{unit}": readable.milliseconds(stats.all_reduce_ms)}
        if stats.all_reduce_ms:
            cost["overlap"] = readable.percent(stats.overlap)
        return cost

    def _tell_plans(self) -> None:
        for line in self._log.untold_plans(self.model):
            self._tell(line)

    def _tell(self, line: str) -> None:
        if keras.config.is_interactive_logging_enabled():
            columns = _columns()
            if columns is not None:
                # Between words, where the terminal would break a word.
                line = textwrap.fill(line, columns - 1, subsequent_indent="  ")
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        else:
            logging.info(line)


def _columns() -> int | None:
    """Columns of the terminal; `None` for a notebook, a file or a pipe.

    The launcher shows what it reads from a pipe in a terminal. That of mpirun,
    whose output may be a file, has no size.
    """
    told = os.environ.get(COLUMNS, "")
    if told.isdecimal():
        return int(told)
    if not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size((0, 0)).columns or None


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
