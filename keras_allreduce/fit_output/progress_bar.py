"""The fit output: the plan of the all-reduce, and what it costs, live."""

import sys
import time
from typing import Any

import keras
from absl import logging

from keras_allreduce.clocks import ROWS
from keras_allreduce.meter import Meter, StepLog
from keras_allreduce.stats import ReduceStats, merge

REFRESH_SECONDS = 0.5
"""Least time between two readings of the clocks for the progress bar."""

NEVER = float("inf")


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
        self._time_of_read = float("-inf")

    def refresh(self, steps: int, seconds: float) -> None:
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
            self.read(steps)

    def read(self, steps: int) -> None:
        """Reads now, after `steps` steps of the epoch."""
        self._steps_at_read = steps
        new = self._meter.read()
        if new is not None:
            self.stats = merge(self.stats, new)
        self._time_of_read = time.monotonic()


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


class AllReduceLogger(keras.callbacks.Callback):
    """Puts the cost of the all-reduce into the logs of each epoch.

    Adds `all_reduce_ms`, `overlap` and `all_reduce_gbps` (see `ReduceStats`),
    so that they show in History and in the callbacks after this one, such as
    CSVLogger and TensorBoard: pass it first.

    ```python
    model.fit(x, y, callbacks=[AllReduceLogger(), CSVLogger("log.csv")])
    ```

    Under a `MultiWorkerAllReduceStrategy(measure_lateness=True)` also
    `last_worker`, the number of the worker that comes last to a step, and
    `lateness_ms`, how much later than the first. Pass it on all workers then.

    Raises:
        ValueError: If the model is trained without an `AllReduceStrategy`.
    """

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        log = getattr(model.distribute_strategy, "step_log", None)
        if log is None:
            raise ValueError(
                "AllReduceLogger reports on an AllReduceStrategy. Received: a "
                f"model under {type(model.distribute_strategy).__name__}. "
                "Make the model inside its scope."
            )
        self._epoch = EpochMeter(log, model)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._epoch.begin()
        self._steps = 0

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._steps = batch + 1
        self._epoch.refresh(self._steps, NEVER)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._epoch.read(self._steps)
        stats = self._epoch.stats
        if stats is not None and logs is not None:
            logs["all_reduce_ms"] = stats.all_reduce_ms
            logs["overlap"] = stats.overlap
            logs["all_reduce_gbps"] = stats.all_reduce_gbps
        strategy = self.model.distribute_strategy
        if getattr(strategy, "measure_lateness", False) and logs is not None:
            late = strategy.worker_lateness()
            logs["last_worker"] = late.index(max(late))
            logs["lateness_ms"] = max(late)
