"""The step functions of a strategy and their clocks."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_allreduce.fit_output.clocks import EagerClocks, GraphClocks
from keras_allreduce.reduce.observe import BatchRecord
from keras_allreduce.reduce.plan import ReducePlan

ONE_REPLICA = "batch_all_reduce: nothing to reduce, num_replicas = 1"


@dataclass(frozen=True, eq=False)
class TracedStep:
    """One traced (or eager) step function that reduces gradients.

    Attributes:
        plan: What it sends.
        clocks: Its clocks. A traced step owns them, so this is a weak
            reference there.
        model: Weak reference to the model whose `train_step` it is, or to
            nothing in a custom training loop.
    """

    plan: ReducePlan
    clocks: Any
    model: Any


class StepLog:
    """All step functions of one strategy, in the order they were first run."""

    def __init__(self) -> None:
        self._steps: list[TracedStep] = []
        self._alone: weakref.WeakSet[Any] = weakref.WeakSet()
        self._told: weakref.WeakKeyDictionary[Any, set[str]] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, records: Sequence[BatchRecord], model: Any | None) -> None:
        """Notes a step that was just traced, or has just run eagerly.

        Args:
            records: All it reduces.
            model: The model whose `train_step` it is, if it is one.
        """
        if not records:
            return
        # Gradients are the largest batch. Others are the statistics of
        # synchronized layers and what the user's own code reduces.
        record = max(
            records,
            key=lambda record: (record.plan.nbytes or 0, len(record.packs)),
        )
        owner = _nothing if model is None else weakref.ref(model)
        if tf.executing_eagerly():
            self._eager_clocks(record, owner).add(record.started, record.ended)
            return
        tensor = tf.nest.flatten(
            record.packs[0].results[0], expand_composites=True
        )[0]
        if tensor.graph is not tf.compat.v1.get_default_graph():
            return  # Traced inside a function of its own: out of our reach.
        clocks = GraphClocks(record.packs, record.devices)
        self._steps.append(TracedStep(record.plan, weakref.ref(clocks), owner))

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

    def add_alone(self, model: Any) -> None:
        """Notes that `model` trains on one replica and reduces nothing."""
        self._alone.add(model)

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


def _nothing() -> None:
    return None
