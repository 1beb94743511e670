"""Records some steps and writes them as a timeline."""

import contextlib
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.fit_output import chrome_trace
from keras_allreduce.fit_output.clocks import ROWS, ReplicaTimes
from keras_allreduce.fit_output.recording import (
    Call,
    StepTimes,
    WorkerTimeline,
)
from keras_allreduce.fit_output.step_log import StepLog, TracedStep, step_log_of
from keras_allreduce.reduce.process_group import ProcessGroup

_MEETINGS = 16
"""Meetings of the workers from which their clocks are compared."""


class Recorder:
    """Collects the times of steps from its making until `stop`.

    Args:
        log: The steps of the strategy.
        model: Only the steps of this model. `None`: all.
    """

    def __init__(self, log: StepLog, model: Any | None = None):
        self._log = log
        self._model = model
        self._seen: weakref.WeakKeyDictionary[Any, int] = (
            weakref.WeakKeyDictionary()
        )
        log.recorders.add(self)
        for step in log.steps(model):
            self._seen[step.clocks()] = step.clocks().steps

    def stop(self) -> None:
        """Steps that are traced from now on take no times for this."""
        self._log.recorders.discard(self)

    def read(self, calls: Sequence[Call] = ()) -> list[StepTimes]:
        """The steps since, at most the last `clocks.ROWS` of each function.

        Args:
            calls: Calls of the train function. Steps outside all of them are
                left out, and the others get their numbers.
        """
        found: list[StepTimes] = []
        for step in self._log.steps(self._model):
            clocks = step.clocks()
            times = clocks.read_replicas(self._seen.get(clocks, 0))
            found += _steps(step, times)
        found.sort(key=lambda step: max(step.ready[0]))
        return _numbered(found, calls)


def _steps(step: TracedStep, times: ReplicaTimes) -> list[StepTimes]:
    labels = step.labels()
    return [
        StepTimes(
            0,
            labels,
            times.ready[:, index].tolist(),
            times.done[:, index].tolist(),
            times.marks[:, index].tolist(),
        )
        for index in range(times.ready.shape[1])
    ]


def _numbered(
    steps: Sequence[StepTimes], calls: Sequence[Call]
) -> list[StepTimes]:
    """The steps that ran inside `calls`, each with its number."""
    if not calls:
        return [replace(step, number=n) for n, step in enumerate(steps)]
    numbered = []
    for call in calls:
        inside = [
            step
            for step in steps
            if call.begin <= max(step.ready[0]) <= call.end
        ]
        numbered += [
            replace(step, number=n)
            for n, step in enumerate(inside, call.number)
        ]
    return numbered


def record(
    strategy: Any,
    path: str | os.PathLike[str],
    recorder: Recorder,
    calls: Sequence[Call] = (),
) -> None:
    """Writes the recording; with several workers the chief writes.

    Args:
        strategy: The strategy. All workers must call this.
        path: The file.
        recorder: The recorder.
        calls: See `Recorder.read`.
    """
    devices = [
        tf.DeviceSpec.from_string(device)
        for device in strategy.extended.worker_devices
    ]
    group: ProcessGroup = strategy.extended.group
    meetings = _MEETINGS if group.size > 1 else 0
    own = WorkerTimeline(
        group.rank,
        [f"{spec.device_type}:{spec.device_index}" for spec in devices],
        recorder.read(calls),
        list(calls),
        [group.barrier() for _ in range(meetings)],
    )
    texts = group.all_gather_text("timeline", own.dumps())
    if not group.rank:
        # By worker: without a store only this one's text comes back.
        read = map(WorkerTimeline.loads, texts)
        everyone = list({each.worker: each for each in read}.values())
        chrome_trace.write(path, chrome_trace.trace(everyone))


@contextlib.contextmanager
def recording(
    strategy: Any, path: str | os.PathLike[str]
) -> Iterator[Recorder]:
    """Writes the steps that run in the block.

    Args:
        strategy: The strategy. All workers must enter and leave.
        path: The file.
    """
    recorder = Recorder(strategy.step_log)
    try:
        yield recorder
    finally:
        recorder.stop()
    record(strategy, path, recorder)


class AllReduceTimeline(keras.callbacks.Callback):
    """Writes some steps of `fit` as a timeline (a Chrome trace).

    Open the file in https://ui.perfetto.dev or chrome://tracing. It shows, for
    each replica, waiting for input, forward pass and backprop, waiting for
    the all-reduce, and the update; the packs in flight with their layers and
    bytes; and steps and epochs. With several workers, pass it on all of them:
    the chief writes one file for all workers, on its clock.

    ```python
    model.fit(x, y, callbacks=[AllReduceTimeline("timeline.json")])
    ```

    The train step is retraced at the beginning, with three more timestamps on
    each replica, and again at the end. Without this callback, steps have no
    overhead.

    Args:
        path: Path of the JSON file; gzipped if it ends in `.gz`.
        steps: Range of steps to record: the first, counted over the epochs of
            this `fit`, and the first after it. The first steps of a `fit`
            include tracing.

    Raises:
        ValueError: If `steps` is not a range of up to 1024 steps, or if the
            model is trained without an `AllReduceStrategy`.
    """

    def __init__(
        self, path: str | os.PathLike[str], steps: tuple[int, int] = (10, 20)
    ):
        super().__init__()
        first, end = steps
        if not 0 <= first < end <= first + ROWS:
            raise ValueError(
                "`steps` must be (first, end), with 1 to "
                f"{ROWS} steps. Received: steps={steps}"
            )
        self.path = path
        self.first, self.end = first, end

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._log = step_log_of(model, "AllReduceTimeline")

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._calls: list[Call] = []
        self._steps = 0
        self._epoch = 0
        self._recorder: Recorder | None = Recorder(self._log, self.model)
        self.model.make_train_function(force=True)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._epoch = epoch + 1
        self._before = 0

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._begin = time.time()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        number = self._steps
        self._steps += batch + 1 - self._before
        if self._recorder is None or self._steps <= self.first:
            self._before = batch + 1
            return
        self._calls.append(
            Call(
                number,
                self._epoch,
                not self._before,
                self._begin,
                time.time(),
            )
        )
        self._before = batch + 1
        if self._steps >= self.end:
            self._write()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._write()
        # Other fits have nothing of this in their step.
        self.model.make_train_function(force=True)

    def _write(self) -> None:
        if self._recorder is None:
            return
        self._recorder.stop()
        record(
            self.model.distribute_strategy,
            self.path,
            self._recorder,
            self._calls,
        )
        self._recorder = None
