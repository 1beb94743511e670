"""Callbacks that put the cost of the all-reduce into logs and TensorBoard."""

import math
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.fit_output.stats import ReduceStats
from keras_allreduce.fit_output.step_log import EpochMeter, Meter, step_log_of


class AllReduceLogger(keras.callbacks.Callback):
    """Adds the cost of the all-reduce to the logs of each epoch.

    Adds `all_reduce_ms`, `overlap` and `all_reduce_gbps` (see `ReduceStats`)
    for History and for the callbacks after this one, such as CSVLogger and
    TensorBoard: pass it first.

    ```python
    model.fit(x, y, callbacks=[AllReduceLogger(), CSVLogger("log.csv")])
    ```

    Under a `MultiWorkerAllReduceStrategy(measure_lateness=True)` it also adds
    the straggler: `last_worker`, the index of the slowest worker, and
    `lateness_ms`, its delay behind the fastest. Pass it on all workers then.

    Raises:
        ValueError: If the model is trained without an `AllReduceStrategy`.
        RuntimeError: If the model is a tf_keras (Keras 2) model.
    """

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._epoch = EpochMeter(step_log_of(model, "AllReduceLogger"), model)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._epoch.begin()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._epoch.refresh(batch + 1)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._epoch.read()
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


GROUP = "all_reduce"
"""TensorBoard groups scalars by what is before the first slash."""

# What AllReduceLogger puts into the logs of an epoch: shown here anyway, or
# only known from there.
_SHOWN_ANYWAY = ("all_reduce_ms", "overlap", "all_reduce_gbps")
_FROM_LOGGER = ("last_worker", "lateness_ms")


class AllReduceTensorBoard(keras.callbacks.TensorBoard):
    """Keras's TensorBoard callback, with the cost of the all-reduce.

    Takes the arguments of `keras.callbacks.TensorBoard` and adds two groups
    of scalars to its output:

    - `epoch_all_reduce/`: `time_ms`, `exposed_ms`, `overlap` and
      `bandwidth_gbps` (see `ReduceStats`), as means over each epoch, and
      `last_worker` and `lateness_ms` if an `AllReduceLogger` before it has
      measured them;
    - `batch_all_reduce/`: the first four, as means over the steps since the
      previous write, whenever Keras writes batch scalars (`update_freq`).

    ```python
    model.fit(x, y, callbacks=[AllReduceTensorBoard("logs", update_freq=10)])
    ```

    The scalars go to TensorBoard only, not to History or other callbacks.
    Epoch scalars, Keras's too, are written every epoch, whatever `update_freq`
    is; Keras's own callback drops them if it does not divide the last step.

    Raises:
        ValueError: If the model is trained without an `AllReduceStrategy`.
    """

    def set_model(self, model: keras.Model) -> None:
        log = step_log_of(model, "AllReduceTensorBoard")
        super().set_model(model)
        self._reduce_epoch = EpochMeter(log, model)
        self._reduce_steps = Meter(log, model)
        self._reduce_steps.read()

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        super().on_epoch_begin(epoch, logs)
        self._reduce_epoch.begin()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._reduce_epoch.refresh(batch + 1)
        added = {}
        if tf.summary.should_record_summaries():
            added = _scalars(self._reduce_steps.read())
        super().on_train_batch_end(batch, {**(logs or {}), **added})

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._reduce_epoch.read()
        shown = _scalars(self._reduce_epoch.stats)
        for name, value in (logs or {}).items():
            if name in _FROM_LOGGER:
                shown[f"{GROUP}/{name}"] = value
            elif name not in _SHOWN_ANYWAY:
                shown[name] = value
        # Keras leaves the condition of batch scalars on, so that it drops
        # every epoch whose last step `update_freq` does not divide.
        with tf.summary.record_if(True):
            super().on_epoch_end(epoch, shown)


def _scalars(stats: ReduceStats | None) -> dict[str, float]:
    """The scalars of the group that are known."""
    if stats is None:
        return {}
    scalars = {
        "time_ms": stats.all_reduce_ms,
        "exposed_ms": stats.exposed_ms,
        "overlap": stats.overlap,
        "bandwidth_gbps": stats.all_reduce_gbps,
    }
    return {
        f"{GROUP}/{name}": value
        for name, value in scalars.items()
        if not math.isnan(value)
    }
