"""Says what would make the step faster, if that is sure and worth it.

Each rule looks at one possible change and returns its largest possible gain,
from the times of the measured steps. The hint names the largest gain, if it is
a tenth of a step or more, and a second or more of the whole `fit`. An `Advisor`
gathers the measurements while the first epoch of `fit` runs.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_allreduce import environment
from keras_allreduce.fit_output.readable import milliseconds
from keras_allreduce.fit_output.stats import measure
from keras_allreduce.fit_output.step_log import StepLog, TracedStep
from keras_allreduce.reduce.plan import ReducePlan

WORTH = 0.1
"""Share of a step that a hint must be worth."""

WORTH_MS_OF_FIT = 1000.0
"""Milliseconds that it must be worth in all epochs of a `fit`."""

MIN_STEPS = 5
"""Steps that must have been measured."""

MOST_STEPS_PER_CALL = 8
"""Of more steps in one call, the hint would save little more."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one epoch, and the options that hints mention.

    Attributes:
        step_ms: Milliseconds from one step to the next, on average, without
            the first call of the train function, which traces.
        between_ms: The part of it between two calls of the train function.
        ready: `ready[step, pack]` in seconds.
        done: `done[step, pack]` in seconds.
        plan: The plan of the step.
        steps_of_epoch: Steps of one epoch.
        steps_of_fit: Steps of all its epochs.
        steps_per_call: Steps of one call of the train function.
        tables: Bytes of the whole variable of each sparse pack.
        lateness_ms: How much later than the first the last worker comes to a
            step; `nan` if not known.
        last_worker: Number of that worker.
        bytes_per_pack: Capacity of a pack that was asked for; 0: none.
        sparse_as_dense: Whether sparse gradients are made dense.
    """

    step_ms: float
    between_ms: float
    ready: np.ndarray
    done: np.ndarray
    plan: ReducePlan
    steps_of_epoch: int
    steps_of_fit: int
    steps_per_call: int = 1
    tables: Sequence[int] = ()
    lateness_ms: float = float("nan")
    last_worker: int = 0
    bytes_per_pack: int = 0
    sparse_as_dense: bool = False

    @property
    def exposed_ms(self) -> float:
        """Milliseconds of a step in which only the all-reduce goes on."""
        return self.exposed_of(range(self.ready.shape[1]))

    def exposed_of(self, packs: Sequence[int]) -> float:
        """What would be exposed if only these packs were sent."""
        if not len(packs):
            return 0.0
        last = self.ready.max(axis=1, keepdims=True)
        # A pack that takes no time ends backprop where it ends.
        ready = np.concatenate([self.ready[:, packs], last], axis=1)
        done = np.concatenate([self.done[:, packs], last], axis=1)
        return measure(ready, done, None, 1).exposed_ms


_Advice = tuple[float, str]
"""Milliseconds of a step that a change would gain, and its text."""


def hint(measured: Measured) -> str | None:
    """The one change that would gain most, or `None`."""
    if measured.ready.shape[0] < MIN_STEPS or not measured.step_ms > 0:
        return None
    least = max(
        WORTH * measured.step_ms, WORTH_MS_OF_FIT / measured.steps_of_fit
    )
    rules = (_straggler, _one_pack, _sparse, _between)
    found = [advice for rule in rules if (advice := rule(measured))]
    gain_ms, text = max(found, default=(0.0, ""))
    if not text or gain_ms < least:
        return None
    return f"hint: {text} ({environment.HINT}=0 hides this line.)"


def _of_step(ms: float, measured: Measured) -> str:
    share = ms / measured.step_ms
    step = milliseconds(measured.step_ms)
    return (
        f"{milliseconds(ms)} of {step} per step ({share:.0%}, without the "
        "first step)"
    )


def _straggler(measured: Measured) -> _Advice | None:
    late, exposed = measured.lateness_ms, measured.exposed_ms
    # Not if it is hidden behind backprop of the others.
    if not late > 0 or exposed < late / 2:
        return None
    return (
        min(late, exposed),
        f"worker {measured.last_worker} comes last to the all-reduce; waiting "
        f"for it is {_of_step(late, measured)}. Look at its load, its input "
        "and its device.",
    )


def _one_pack(measured: Measured) -> _Advice | None:
    if not measured.bytes_per_pack or measured.plan.num_packs != 1:
        return None
    if measured.plan.num_gradients < 2:
        return None
    exposed = measured.exposed_ms
    return (
        exposed,
        f"bytes_per_pack={measured.bytes_per_pack} puts all gradients into one "
        "pack, which leaves when backprop is over: "
        f"{_of_step(exposed, measured)} wait for it. Leave bytes_per_pack "
        "out, so that packs leave earlier.",
    )


def _sparse(measured: Measured) -> _Advice | None:
    """Small tables, whose rows cost more than the whole of them would."""
    plan = measured.plan
    if measured.sparse_as_dense or not plan.num_sparse or not plan.num_packs:
        return None
    dense = range(plan.num_packs)
    nbytes = [plan.packs[pack].nbytes for pack in dense]
    if None in nbytes or len(measured.tables) != plan.num_sparse:
        return None
    seconds = np.median(measured.done - measured.ready, axis=0)
    # As slow per byte as the slowest pack of about that size would be.
    rate = max(
        seconds[pack] / max(size or 0, 2**16)
        for pack, size in zip(dense, nbytes, strict=True)
    )
    as_dense = sum(measured.tables) * rate * 1e3
    without = measured.exposed_of(dense)
    gain = measured.exposed_ms - without - as_dense
    return (
        gain,
        f"{_of_step(measured.exposed_ms - without, measured)} wait for the "
        "rows of sparse gradients. sparse_as_dense=True would send the whole "
        f"tables, in about {milliseconds(as_dense)} at the speed of the other "
        "packs.",
    )


def _between(measured: Measured) -> _Advice | None:
    # Keras calls the function at least once per epoch.
    steps = min(MOST_STEPS_PER_CALL, measured.steps_of_epoch)
    if steps <= measured.steps_per_call:
        return None
    between = measured.between_ms
    return (
        between * (1 - measured.steps_per_call / steps),
        f"{_of_step(between, measured)} pass between two steps, in Keras and "
        f"in callbacks. compile(steps_per_execution={steps}) pays this once "
        f"every {steps} steps; batch callbacks then run once per {steps} "
        "steps.",
    )


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
                self._log.bytes_per_pack,
                self._log.sparse_as_dense,
            )
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
