"""What the strategies of one machine and of several have in common."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce import fit_hook, internals, weighing
from keras_allreduce.checks import check_backend, check_model
from keras_allreduce.meter import Meter, StepLog
from keras_allreduce.one_device import Step
from keras_allreduce.records import observe
from keras_allreduce.stats import ReduceStats
from keras_allreduce.summing import already_reduced


class StrategyBase(tf.distribute.Strategy):
    """The half of a strategy that users see.

    To be mixed into a strategy of TensorFlow's.
    """

    def _init_options(self, weigh_samples: bool | None, fit_log: bool) -> None:
        check_backend()
        self.weigh_samples = weigh_samples
        self.step_log = StepLog()
        self._meter = Meter(self.step_log)
        self._fit_log = bool(fit_log)
        if fit_log:
            fit_hook.install()

    @property
    def fit_log(self) -> StepLog | None:
        """What the fit output shows, or `None` if it was switched off."""
        return self.step_log if self._fit_log else None

    def reduce(self, reduce_op: Any, value: Any, axis: Any) -> Any:
        """Reduces `value` across replicas, as `tf.distribute.Strategy` does.

        Args:
            reduce_op: `"SUM"`, `"MEAN"` or a `tf.distribute.ReduceOp`.
            value: Distributed value, or a nested structure of such.
            axis: Axis to reduce along within each replica too, or `None`.

        Returns:
            A tensor, or a structure of tensors like `value`.
        """
        if _is_batch_for_its_shapes(reduce_op, value, axis):
            return keras.tree.map_structure(
                lambda leaf: self.experimental_local_results(leaf)[0], value
            )
        return super().reduce(reduce_op, value, axis)

    def all_reduce_stats(self) -> ReduceStats | None:
        """Cost of the all-reduce in the steps run since the last call.

        The first step of each traced step function is left out, and of more
        than 1024 steps between two calls only the last 1024 count.

        Returns:
            Means over those steps, or `None` if there was none.
        """
        return self._meter.read()


class ExtendedBase(internals.MirroredExtended):
    """The half of a strategy that decides how values are reduced.

    To be mixed into the `extended` of a strategy of TensorFlow's.
    """

    # The step of Keras that is being run or traced.
    _step: Step | None = None

    def _experimental_distribute_dataset(
        self, dataset: Any, options: Any
    ) -> Any:
        # TensorFlow takes the memory of arrays from Python as its own and,
        # once a batch is split, writes results into it: the generator's (or
        # PyDataset's) arrays would change under the user. It may have a copy.
        if not internals.yields_arrays_of_python(dataset):
            return super()._experimental_distribute_dataset(dataset, options)
        distributed = super()._experimental_distribute_dataset(
            dataset.map(_copied), options
        )
        return internals.SpecFirstDataset.take_over(distributed)

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


@tf.autograph.experimental.do_not_convert
def _copied(*element: Any) -> Any:
    def copy(tensor: tf.Tensor) -> tf.Tensor:
        if tensor.dtype.is_floating or tensor.dtype.is_integer:
            return tf.raw_ops.DeepCopy(x=tensor)
        return tensor

    copies = tf.nest.map_structure(copy, element, expand_composites=True)
    return copies if len(copies) > 1 else copies[0]


def _keras_step(fn: Callable[..., Any]) -> tuple[keras.Model | None, str]:
    """The model whose step this is, and which step, if it is one."""
    fn = inspect.unwrap(fn)
    model = getattr(fn, "__self__", None)
    name = getattr(fn, "__name__", "")
    if isinstance(model, keras.Model) and name in ("train_step", "test_step"):
        return model, name
    return None, ""


def _is_batch_for_its_shapes(reduce_op: Any, value: Any, axis: Any) -> bool:
    """Whether this is Keras, asking for a batch only to see its shapes.

    Before the first step Keras takes the "mean" of a whole nested batch over
    the replicas. Where there is none (text, ragged or sparse inputs, parts of
    different sizes), one replica's part shows the shapes as well.
    """
    if (
        not tf.executing_eagerly()
        or axis is not None
        or str(getattr(reduce_op, "value", reduce_op)).upper() != "MEAN"
        or not keras.tree.is_nested(value)
    ):
        return False
    return any(_has_no_mean(leaf) for leaf in keras.tree.flatten(value))


def _has_no_mean(value: Any) -> bool:
    if not isinstance(value, tf.distribute.DistributedValues):
        return False
    parts = value.values
    return any(
        not isinstance(part, tf.Tensor)
        or not (part.dtype.is_floating or part.dtype.is_integer)
        or part.shape != parts[0].shape
        for part in parts
    )
