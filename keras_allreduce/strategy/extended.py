"""The half of a strategy that decides how values are reduced."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce import xla_clusters
from keras_allreduce.compat import distribute, keras_door, variables, versions
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.input.dataset import own
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.step import Step, predict
from keras_allreduce.reduce.observe import observe
from keras_allreduce.reduce.process_group import ProcessGroup
from keras_allreduce.strategy.checks import check_model
from keras_allreduce.strategy.datasets import (
    distribute as distribute_arrays,
)

LEAST_SHARE = 0.5
"""Share of the ops of a step that XLA compiles, below which it is said."""

_TYPES_SHOWN = 4


class ExtendedBase(distribute.MirroredExtended, Replicas):
    """The half of a strategy that decides how values are reduced.

    To be mixed into the `extended` of a strategy of TensorFlow's. Steps of
    Keras call it through the interface `Replicas`.
    """

    _workers: ProcessGroup

    def _experimental_distribute_dataset(
        self, dataset: Any, options: Any
    ) -> Any:
        stock = super()._experimental_distribute_dataset
        return distribute_arrays(
            dataset,
            lambda made: stock(made, options),
            self._num_replicas_in_sync,
        )

    def _distribute_datasets_from_function(
        self, dataset_fn: Callable[..., Any], options: Any
    ) -> Any:
        return own(
            super()._distribute_datasets_from_function(dataset_fn, options)
        )

    def _create_variable(
        self, next_creator: Callable[..., Any], **kwargs: Any
    ) -> Any:
        return variables.convert_in_place(
            super()._create_variable(next_creator, **kwargs)
        )

    def before_assignment(self, variable: Any, value: Any) -> Any:
        """A replica is about to assign to its own part of a variable.

        Returns:
            The value, scaled if TensorFlow will aggregate those of replicas.
        """
        step = replica.current_step()
        if step is None or replica.updates_locally():
            return value
        return step.before_assignment(variable, value)

    def assigns_own_part(self) -> bool:
        """Whether a replica may assign its part of any variable by itself."""
        return replica.updates_locally() or replica.is_measured()

    def colocate_vars_with(self, colocate_with_variable: Any) -> Any:
        """As TensorFlow's, which Keras's optimizers call when they are built.

        Args:
            colocate_with_variable: A variable of this strategy.

        Raises:
            RuntimeError: If this strategy is not the current one.
        """
        if tf.distribute.get_strategy().extended is not self:
            raise RuntimeError(variables.OUTSIDE_OF_A_REPLICA)
        return super().colocate_vars_with(colocate_with_variable)

    def _use_merge_call(self) -> bool:
        # Once gradients are reduced, each replica can update on its own, also
        # inside a conditional, where no merge_call can be.
        return not replica.updates_locally() and super()._use_merge_call()

    def _replica_ctx_all_reduce(
        self, reduce_op: Any, value: Any, options: Any = None
    ) -> Any:
        if replica.updates_locally():
            return value
        return super()._replica_ctx_all_reduce(reduce_op, value, options)

    def _batch_gather_to(
        self, value_destination_pairs: Any, axis: Any, options: Any = None
    ) -> Any:
        if replica.is_measured():
            return [value for value, _ in value_destination_pairs]
        return super()._batch_gather_to(value_destination_pairs, axis, options)

    def _batch_reduce_to(
        self, reduce_op: Any, value_destination_pairs: Any, options: Any
    ) -> Any:
        sum_over_replicas = partial(
            self._sum_over_replicas, reduce_op, options=options
        )
        step = replica.current_step()
        sums = None if step is None else step.sums
        if sums is None or reduce_op != tf.distribute.ReduceOp.SUM:
            return sum_over_replicas(value_destination_pairs)
        return sums.sum(sum_over_replicas, value_destination_pairs)

    def _sum_over_replicas(
        self, reduce_op: Any, value_destination_pairs: Any, options: Any
    ) -> Any:
        return super()._batch_reduce_to(
            reduce_op, value_destination_pairs, options
        )

    @property
    def devices(self) -> Sequence[str]:
        """Device of each replica of this worker."""
        return tuple(self.worker_devices)

    @property
    def group(self) -> ProcessGroup:
        """The processes that train together."""
        return self._workers

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that reports and saves."""
        return self.group.rank == 0

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return self.group.size

    def paths_of_gradients(self, count: int) -> Sequence[str]:
        """Paths of the variables of `count` gradients; none if not of all."""
        model = getattr(replica.current_step(), "model", None)
        variables = getattr(model, "trainable_variables", ())
        paths = [variable.path for variable in variables]
        return paths if len(paths) == count else []

    def local_values(self, value: Any) -> Sequence[Any]:
        """The parts of a distributed value; none if it is not distributed."""
        if isinstance(value, tf.distribute.DistributedValues):
            strategy = self._container_strategy()
            return tuple(strategy.experimental_local_results(value))
        # TensorFlow leaves values of a worker's only replica as they are.
        if value is not None and len(self.worker_devices) == 1:
            return (value,)
        return ()

    def sum_gradients(
        self, gradients: Sequence[Any], weights: Sequence[tf.Tensor] = ()
    ) -> list[Any]:
        """Sums distributed gradients; in one process `weights` are empty."""
        return super()._batch_reduce_to(
            tf.distribute.ReduceOp.SUM,
            [(gradient, gradient) for gradient in gradients],
            tf.distribute.experimental.CommunicationOptions(),
        )

    def _call_for_each_replica(
        self, fn: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        versions.check_step_is_not_legacy(fn)
        run = super()._call_for_each_replica
        if replica.current_step() is not None:
            # Called in a merge_call of the current step.
            return run(_in_current_step(fn), args, kwargs)
        model, step_name = keras_compat.step_of(fn)
        if model is None:
            return self._run_custom(run, fn, args, kwargs)
        if keras_door.compiles_replicas(model):
            run = partial(_compiled_by_xla, model, run)
        if step_name == keras_compat.PREDICT:
            return predict(model, self, run, fn, args, kwargs)
        return self._run_step(model, step_name, run, fn, args, kwargs)

    def _run_custom(
        self, run: Callable[..., Any], fn: Callable[..., Any], *args: Any
    ) -> Any:
        """Runs a function of a custom loop, as TensorFlow does."""
        began = time.time()
        with observe() as records:
            result = run(fn, *args)
        log = self._container_strategy().step_log
        log.add(records, None, args, began)
        return result

    def _run_step(
        self,
        model: keras.Model,
        step_name: str,
        run: Callable[..., Any],
        fn: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """Runs a step of Keras, so that it sees one device."""
        strategy = self._container_strategy()
        began = time.time()
        trains = step_name == "train_step"
        is_alone = strategy.num_replicas_in_sync == 1
        if trains or not is_alone:
            check_model(model, strategy)
        if is_alone:
            return run(fn, *args)
        step = Step(
            model,
            step_name,
            strategy,
            self,
            strategy.weigh_samples,
            note=lambda found: strategy.step_log.add(found, model),
        )
        with observe() as records:
            result = step.run(run, fn, *args)
        if trains:
            strategy.step_log.add(
                records, model, args, began, tuple(step.gathered.values())
            )
        return result


def _in_current_step(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` in threads of its own, as a part of the step of this thread."""
    current = replica.current_of_thread()

    @tf.autograph.experimental.do_not_convert
    def in_current_step(*args: Any, **kwargs: Any) -> Any:
        with replica.entered(current):
            return fn(*args, **kwargs)

    return in_current_step


def _compiled_by_xla(
    model: keras.Model,
    run: Callable[..., Any],
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Runs the replicas of a model, whose ops are marked for XLA.

    Args:
        model: The model whose step it is.
        run: Runs a function on every replica.
        fn: The function.
        args: Its arguments.
        kwargs: Likewise.
    """
    if tf.executing_eagerly():
        return run(fn, args, kwargs)
    with xla_clusters.marking() as coverage:
        result = run(fn, args, kwargs)
    if coverage.share < LEAST_SHARE:
        common = coverage.outside.most_common(_TYPES_SHOWN)
        warnings.warn(
            "`jit_compile=True` is for steps that XLA can compile. Received: "
            f"model {model.name!r}, of whose ops XLA compiles "
            f"{coverage.share:.0%}; the others, such as "
            f"{', '.join(name for name, _ in common)}, run as without it. "
            "Leave `jit_compile` out of `compile` if the step is not faster "
            "with it.",
            stacklevel=2,
        )
    return result
