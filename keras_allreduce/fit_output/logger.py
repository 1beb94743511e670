"""The callback that puts the cost of the all-reduce into the logs."""

from typing import Any

import keras

from keras_allreduce.fit_output.meter import EpochMeter, step_log_of
from keras_allreduce.fit_output.progress_bar import NEVER


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
