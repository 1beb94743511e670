"""Gathers the measurements for a hint while the first epoch of `fit` runs."""

import math
import time
from collections.abc import Mapping
from typing import Any

import keras

from keras_allreduce.fit_output.hints import Measured, hint
from keras_allreduce.fit_output.step_log import StepLog, TracedStep


class Advisor:
    """Times the calls of the train function of one epoch.

    Args:
        log: The steps of the strategy.
        model: The model in training.
    """

    def __init__(self, log: StepLog, model: keras.Model):
        self._log = log
        self._model = model
        # The first call also traces: it is not timed.
        self._first_end = self._last_end = math.nan
        self._first_steps = self._last_steps = 0
        self._between = 0.0

    def call_begins(self) -> None:
        """The train function is about to be called."""
        if self._last_steps:
            self._between += time.perf_counter() - self._last_end

    def call_ends(self, steps: int) -> None:
        """It has returned, after `steps` steps of the epoch."""
        self._last_end, self._last_steps = time.perf_counter(), steps
        if not self._first_steps:
            self._first_end, self._first_steps = self._last_end, steps

    def line(self, logs: Mapping[str, Any], epochs: int) -> str | None:
        """The hint, if there is one; after that never again.

        Args:
            logs: Logs of the epoch, including those of an `AllReduceLogger`.
            epochs: Epochs of this `fit`.
        """
        steps = self._last_steps - self._first_steps
        found = self._log.steps(self._model)
        if not self._log.may_hint or not steps or not found:
            return None
        step = max(found, key=lambda each: each.clocks().steps)
        times = step.clocks().read()
        line = hint(
            Measured(
                1e3 * (self._last_end - self._first_end) / steps,
                1e3 * self._between / steps,
                times.ready,
                times.done,
                step.plan,
                self._last_steps,
                self._last_steps * epochs,
                self._model.steps_per_execution,
                self._tables(step),
                float(logs.get("lateness_ms", math.nan)),
                int(logs.get("last_worker", 0)),
            ),
            self._log.options,
        )
        if line:
            self._log.may_hint = False
        return line

    def _tables(self, step: TracedStep) -> list[int]:
        """Bytes of the variables whose gradients are sparse, if known."""
        variables = self._model.trainable_variables
        plan = step.plan
        if len(variables) != plan.num_gradients + plan.num_sparse:
            return []
        tables = [
            variables[index]
            for pack in plan.packs[plan.num_packs :]
            for index in pack.indices
        ]
        return [
            math.prod(table.shape) * table.value.dtype.size for table in tables
        ]
