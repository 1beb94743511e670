"""The step functions of a strategy, and meters that read their clocks."""

import math
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce import environment
from keras_allreduce.compat import runtime, versions
from keras_allreduce.fit_output.clocks import ROWS, EagerClocks, GraphClocks
from keras_allreduce.fit_output.recording import PackLabel, names_in_pack
from keras_allreduce.fit_output.stats import ReduceStats, measure, merge
from keras_allreduce.reduce.observe import BatchRecord
from keras_allreduce.reduce.plan import GatheredLoss, ReducePlan

ONE_REPLICA = "batch_all_reduce: nothing to reduce, num_replicas = 1"


@dataclass(frozen=True, eq=False)
class TracedStep:
    """One traced (or eager) step function that reduces gradients.

    Attributes:
        plan: Its plan.
        clocks: Its clocks. A traced step owns them, so this is a weak
            reference there.
        model: Weak reference to the model whose `train_step` it is, or to
            nothing in a custom training loop.
    """

    plan: ReducePlan
    clocks: Any
    model: Any

    def labels(self) -> list[PackLabel]:
        """The content of each of its packs, by layers of the model."""
        model = self.model()
        names: list[str] = []
        if model is not None:
            names = [each.path for each in model.trainable_variables]
        if len(names) != self.plan.num_gradients + self.plan.num_sparse:
            # Which variables have gradients is not known here.
            numbers = range(len(names) or self.plan.num_gradients)
            names = [f"gradient {number}" for number in numbers]
        return [
            PackLabel(
                names_in_pack(names, pack.indices),
                pack.nbytes,
                pack.dtype,
                sparse=number >= self.plan.num_packs,
            )
            for number, pack in enumerate(self.plan.packs)
        ]


class StepLog:
    """All step functions of one strategy, in the order they were first run.

    Attributes:
        recorders: Recorders of timelines. While there is one, steps that are
            traced also take the times that only a timeline needs.
        bytes_per_pack: Capacity of a pack that was asked for; 0: none.
        sparse_as_dense: Whether sparse gradients are made dense.
        may_hint: Whether no hint has been given yet, and one may be.
    """

    def __init__(self) -> None:
        self.recorders: weakref.WeakSet[Any] = weakref.WeakSet()
        self.bytes_per_pack = 0
        self.sparse_as_dense = False
        self.may_hint = os.environ.get(environment.HINT) != "0"
        self._steps: list[TracedStep] = []
        self._told: weakref.WeakKeyDictionary[Any, set[str]] = (
            weakref.WeakKeyDictionary()
        )

    def add(
        self,
        records: Sequence[BatchRecord],
        model: Any | None,
        inputs: Any = None,
        begun: float = math.nan,
        gathered: tuple[GatheredLoss, ...] = (),
    ) -> None:
        """Notes a step that was just traced, or has just run eagerly.

        Args:
            records: All it reduces.
            model: The model whose `train_step` it is, if it is one.
            inputs: Distributed values that it was called with, if they are in
                the current graph.
            begun: When it was called, in seconds since the epoch.
            gathered: Its losses that are computed on the whole batch.
        """
        if not records:
            return
        # Gradients are the largest batch. Others are the statistics of
        # synchronized layers and all-reduces of custom code.
        record = max(
            records,
            key=lambda record: (record.plan.nbytes or 0, len(record.packs)),
        )
        if gathered:
            plan = replace(record.plan, gathered=gathered)
            record = replace(record, plan=plan)
        owner = _nothing if model is None else weakref.ref(model)
        if tf.executing_eagerly():
            self._eager_clocks(record, owner).add(
                record.started, record.ended, begun
            )
            return
        tensor = tf.nest.flatten(
            record.packs[0].results[0], expand_composites=True
        )[0]
        if tensor.graph is not tf.compat.v1.get_default_graph():
            return  # Traced inside a function of its own: out of our reach.
        clocks = self._graph_clocks(record, inputs)
        self._steps.append(TracedStep(record.plan, clocks, owner))

    def _graph_clocks(self, record: BatchRecord, inputs: Any) -> Any:
        """Returns the clocks of a traced step as long as it can run."""
        if not runtime.has_clock():
            # Shows its plan; nothing is timed.
            none = EagerClocks(record.plan.num_packs)
            return lambda: none
        given = None
        if self.recorders and inputs is not None:
            given = _of_replicas(inputs, len(record.devices))
        return weakref.ref(GraphClocks(record.packs, record.devices, given))

    def _eager_clocks(self, record: BatchRecord, owner: Any) -> EagerClocks:
        for step in self._steps:
            clocks = step.clocks()
            if (
                isinstance(clocks, EagerClocks)
                and step.plan == record.plan
                and step.model() is owner()
            ):
                return clocks
        clocks = EagerClocks(record.plan.num_packs)
        self._steps.append(TracedStep(record.plan, lambda: clocks, owner))
        return clocks

    def steps(self, model: Any | None = None) -> list[TracedStep]:
        """Steps that can still run; only those of `model`, if given."""
        self._steps = [
            step
            for step in self._steps
            if step.clocks() is not None
            and (step.model is _nothing or step.model() is not None)
        ]
        return [
            step
            for step in self._steps
            if model is None or step.model() is model
        ]

    def untold_plans(self, model: Any) -> list[str]:
        """Plans of `model` that this has not returned before."""
        told = self._told.setdefault(model, set())
        plans = [str(step.plan) for step in self.steps(model)]
        if model.distribute_strategy.num_replicas_in_sync == 1:
            plans = [ONE_REPLICA]
        new = []
        for line in plans:
            if line not in told:
                told.add(line)
                new.append(line)
        return new


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


def _of_replicas(structure: Any, num_replicas: int) -> list[list[tf.Tensor]]:
    """The tensors of each replica in a structure of distributed values."""
    tensors: list[list[tf.Tensor]] = []
    for replica in range(num_replicas):
        values = [
            leaf.values[replica]
            if isinstance(leaf, tf.distribute.DistributedValues)
            else leaf
            for leaf in tf.nest.flatten(structure)
        ]
        flat = tf.nest.flatten(values, expand_composites=True)
        tensors.append([leaf for leaf in flat if tf.is_symbolic_tensor(leaf)])
    return tensors


def _nothing() -> None:
    return None
