"""The half of a strategy that decides how values are reduced."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.one_device import weighing
from keras_allreduce.one_device.step import Step
from keras_allreduce.one_device.update import already_reduced
from keras_allreduce.reduce.observe import observe
from keras_allreduce.strategy.checks import check_model
from keras_allreduce.strategy.datasets import (
    distribute as distribute_arrays,
)


class ExtendedBase(distribute.MirroredExtended):
    """The half of a strategy that decides how values are reduced.

    To be mixed into the `extended` of a strategy of TensorFlow's.
    """

    # The step of Keras that is being run or traced.
    _step: Step | None = None

    def _experimental_distribute_dataset(
        self, dataset: Any, options: Any
    ) -> Any:
        stock = super()._experimental_distribute_dataset
        return distribute_arrays(dataset, lambda made: stock(made, options))

    def _use_merge_call(self) -> bool:
        # Once gradients are reduced, each replica can update on its own, also
        # inside a conditional, where no merge_call can be.
        return not already_reduced() and super()._use_merge_call()

    def _replica_ctx_all_reduce(
        self, reduce_op: Any, value: Any, options: Any = None
    ) -> Any:
        if already_reduced():
            return value
        return super()._replica_ctx_all_reduce(reduce_op, value, options)

    def _batch_reduce_to(
        self, reduce_op: Any, value_destination_pairs: Any, options: Any
    ) -> Any:
        if not self._step or reduce_op != tf.distribute.ReduceOp.SUM:
            return self._sum_over_replicas(
                reduce_op, value_destination_pairs, options
            )
        # A layer sums over the replicas, or its gradient does: an empty
        # replica gives nothing to the sum, and nothing flows back to it.
        self._step.layers_sum = True
        part = self._step.part_of_replicas_with_samples
        sums = self._sum_over_replicas(
            reduce_op,
            [
                (part(value), destination)
                for value, destination in value_destination_pairs
            ],
            options,
        )
        return [self._step.part_that_flows_back(total) for total in sums]

    def _sum_over_replicas(
        self, reduce_op: Any, value_destination_pairs: Any, options: Any
    ) -> Any:
        return super()._batch_reduce_to(
            reduce_op, value_destination_pairs, options
        )

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return 1

    def shares_of(self, amounts: list[tf.Tensor]) -> list[tf.Tensor]:
        """Share of each replica in the batch, times the number of replicas."""
        return weighing.shares(amounts)

    def sum_over_workers(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of a tensor that each worker has, in its own dtype."""
        return value

    def sum_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """Sums distributed gradients; those of an empty replica are 0."""
        return self._sum_over_replicas(
            tf.distribute.ReduceOp.SUM,
            [(gradient, gradient) for gradient in gradients],
            tf.distribute.experimental.CommunicationOptions(),
        )

    def _call_for_each_replica(
        self, fn: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        strategy = self._container_strategy()
        model, step_name = _keras_step(fn)
        run = super()._call_for_each_replica
        if model is None:
            with observe() as records:
                result = run(fn, args, kwargs)
            strategy.step_log.add(records, None)
            return result
        check_model(model, strategy)
        trains = step_name == "train_step"
        if strategy.num_replicas_in_sync == 1:
            if trains:
                strategy.step_log.add_alone(model)
            return run(fn, args, kwargs)
        self._step = Step(
            model,
            step_name,
            strategy,
            strategy.weigh_samples,
            note=lambda found: strategy.step_log.add(found, model),
        )
        try:
            with observe() as records:
                result = self._step.run(run, fn, args, kwargs)
        finally:
            self._step = None
        if trains:
            strategy.step_log.add(records, model)
        return result


def _keras_step(fn: Callable[..., Any]) -> tuple[keras.Model | None, str]:
    """The model whose step this is, and which step, if it is one."""
    fn = inspect.unwrap(fn)
    model = getattr(fn, "__self__", None)
    name = getattr(fn, "__name__", "")
    if isinstance(model, keras.Model) and name in ("train_step", "test_step"):
        return model, name
    return None, ""
