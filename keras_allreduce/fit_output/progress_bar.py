"""The fit output: the plan of the all-reduce, and what it costs, live."""

import sys
from typing import Any

import keras
from absl import logging

from keras_allreduce.fit_output.meter import EpochMeter
from keras_allreduce.fit_output.step_log import StepLog

REFRESH_SECONDS = 0.5
"""Least time between two readings of the clocks for the progress bar."""

NEVER = float("inf")


class FitProgbar(keras.callbacks.ProgbarLogger):
    """Keras's progress bar, with the plan and the cost of the all-reduce.

    The numbers are added to a copy of the logs, for the display alone: no
    other callback sees them.

    Args:
        log: The steps of the strategy.
    """

    def __init__(self, log: StepLog):
        super().__init__()
        self._log = log
        self._epoch: EpochMeter | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._epoch = EpochMeter(self._log, self.model)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        super().on_epoch_begin(epoch, logs)
        self._tell_plans()
        if self._epoch:
            self._epoch.begin()
        self._first_batch = True

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._first_batch:
            # The step has just been traced, and no bar is on the screen yet.
            self._first_batch = False
            self._tell_plans()
        if self._epoch:
            live = self.verbose == 1
            self._epoch.refresh(batch + 1, REFRESH_SECONDS if live else NEVER)
        super().on_train_batch_end(batch, self._with_cost(logs))

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._epoch:
            self._epoch.read(self.seen)
        super().on_epoch_end(epoch, self._with_cost(logs))

    def _with_cost(self, logs: dict[str, Any] | None) -> dict[str, Any]:
        logs = logs or {}
        if not self._epoch or not self._epoch.stats:
            return logs
        cost = {
            "all_reduce_ms": self._epoch.stats.all_reduce_ms,
            "overlap": self._epoch.stats.overlap,
        }
        validation = {k: v for k, v in logs.items() if k.startswith("val_")}
        # In the place where the live bar has them, before the validation.
        return {
            **{k: v for k, v in logs.items() if k not in validation},
            **cost,
            **validation,
        }

    def _tell_plans(self) -> None:
        for line in self._log.untold_plans(self.model):
            if keras.config.is_interactive_logging_enabled():
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            else:
                logging.info(line)
