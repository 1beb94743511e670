"""Reads the clocks of the steps in a `StepLog`, per call and per epoch."""

import math
import time
import weakref
from typing import Any

import keras

from keras_allreduce.compat import versions
from keras_allreduce.fit_output.clocks import ROWS
from keras_allreduce.fit_output.stats import ReduceStats, measure, merge
from keras_allreduce.fit_output.step_log import StepLog


def step_log_of(model: keras.Model, callback: str) -> StepLog:
    """The step functions of the strategy that trains `model`.

    Args:
        model: The model in training.
        callback: Name of the callback that needs them.

    Raises:
        ValueError: If it is trained without an `AllReduceStrategy`.
    """
    versions.check_model_is_not_legacy(model)
    log = getattr(model.distribute_strategy, "step_log", None)
    if not isinstance(log, StepLog):
        raise ValueError(
            f"{callback} reports on an AllReduceStrategy. Received: a "
            f"model under {type(model.distribute_strategy).__name__}. "
            "Make the model inside its scope."
        )
    return log


class Meter:
    """Reads the clocks of a `StepLog`, each step once.

    Args:
        log: The steps to read.
        model: Only the steps of this model. `None`: all.
    """

    def __init__(self, log: StepLog, model: Any | None = None):
        self._log = log
        self._model = model
        self._seen: weakref.WeakKeyDictionary[Any, int] = (
            weakref.WeakKeyDictionary()
        )

    def read(self) -> ReduceStats | None:
        """Means over the steps since the last call, `None` without any."""
        stats: ReduceStats | None = None
        for step in self._log.steps(self._model):
            clocks = step.clocks()
            seen = self._seen.get(clocks, 0)
            if clocks.steps == seen:
                continue
            times = clocks.read(seen)
            self._seen[clocks] = times.steps
            new = measure(
                times.ready,
                times.done,
                step.plan.nbytes,
                step.plan.num_replicas,
            )
            stats = merge(stats, new)
        return stats if stats is not None and stats.steps else None


class EpochMeter:
    """Means over the epoch so far; never loses a step, never reads often.

    Args:
        log: The steps of the strategy.
        model: The model in training.
    """

    def __init__(self, log: StepLog, model: keras.Model):
        self._meter = Meter(log, model)
        self._meter.read()
        self.begin()

    def begin(self) -> None:
        """Forgets the epoch before."""
        self.stats: ReduceStats | None = None
        self._steps_at_read = 0
        self._time_of_read = -math.inf

    def refresh(self, steps: int, seconds: float = math.inf) -> None:
        """Reads if the last reading is old.

        Args:
            steps: Steps of the epoch so far. The clocks are also read before
                they begin to forget.
            seconds: Least time between two readings.
        """
        unread = steps - self._steps_at_read
        waited = time.monotonic() - self._time_of_read
        # The first step of all is not counted: wait for the second.
        if unread > 1 and (waited >= seconds or unread >= ROWS // 2):
            self._steps_at_read = steps
            self.read()

    def read(self) -> None:
        """Reads now."""
        new = self._meter.read()
        if new is not None:
            self.stats = merge(self.stats, new)
        self._time_of_read = time.monotonic()
