"""AllReduceStrategy: MirroredStrategy with another road for gradients."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce import fit_hook, internals
from keras_allreduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.checks import check_devices, check_model
from keras_allreduce.meter import Meter, StepLog
from keras_allreduce.one_device import Step
from keras_allreduce.records import observe
from keras_allreduce.stats import ReduceStats
from keras_allreduce.summing import already_reduced


class AllReduceStrategy(tf.distribute.MirroredStrategy):
    """Trains one model on several devices of one machine, all in step.

    A drop-in replacement for `tf.distribute.MirroredStrategy`: everything it
    does, this does, with the same positional arguments. Gradients travel in
    packs that leave while backprop goes on, and `model.fit` shows what they
    cost.

    ```python
    strategy = keras_allreduce.AllReduceStrategy()
    with strategy.scope():
        model = keras.Sequential([...])
        model.compile(...)
    model.fit(x, y)
    ```

    Args:
        devices: Device names, such as `["/gpu:0", "/gpu:1"]`, all GPUs or all
            host devices; `host_devices(n)` makes host devices to try it on
            any machine. `None`: all GPUs, or all host devices without one.
        cross_device_ops: A `tf.distribute.CrossDeviceOps` to use instead of
            the `BatchAllReduce` that the next three arguments describe.
        algorithm: See `BatchAllReduce`.
        bytes_per_pack: See `BatchAllReduce`.
        sparse_as_dense: See `BatchAllReduce`.
        weigh_samples: Whether the loss of each replica is weighed by its part
            of the batch, which makes batches of any size come out as on one
            device. `None`: where that is known to be right, which is where
            Keras computes a loss that is a mean. `True` and `False` decide,
            for a `train_step` or a loss of your own.
        fit_log: Whether the output of `model.fit` shows the plan and the cost
            of the all-reduce.

    Raises:
        ValueError: If `devices` is empty, mixes GPUs and host devices, names
            one twice or one that is not there; if `cross_device_ops` comes
            with an argument that it makes useless; if an argument is not one
            that `BatchAllReduce` takes; or if the Keras backend is not
            TensorFlow.
    """

    def __init__(
        self,
        devices: Sequence[str] | None = None,
        cross_device_ops: tf.distribute.CrossDeviceOps | None = None,
        *,
        algorithm: str = "auto",
        bytes_per_pack: int = 0,
        sparse_as_dense: bool = False,
        weigh_samples: bool | None = None,
        fit_log: bool = True,
    ):
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                "AllReduceStrategy needs the TensorFlow backend of Keras. "
                f"Received: backend={keras.backend.backend()!r}. Set "
                "KERAS_BACKEND=tensorflow."
            )
        if devices is not None:
            devices = check_devices(devices)
        if cross_device_ops is None:
            cross_device_ops = BatchAllReduce(
                algorithm, bytes_per_pack, sparse_as_dense=sparse_as_dense
            )
        elif (algorithm, bytes_per_pack, sparse_as_dense) != ("auto", 0, False):
            raise ValueError(
                "Pass either `cross_device_ops` or the arguments of the "
                "built-in one. Received: "
                f"cross_device_ops={cross_device_ops}, algorithm="
                f"{algorithm!r}, bytes_per_pack={bytes_per_pack}, "
                f"sparse_as_dense={sparse_as_dense}. Use "
                "cross_device_ops=BatchAllReduce(...) with them."
            )
        # MirroredStrategy.__init__ makes its own `extended`; this is what it
        # does, with ours.
        tf.distribute.Strategy.__init__(
            self, AllReduceExtended(self, devices, cross_device_ops)
        )
        if isinstance(cross_device_ops, BatchAllReduce):
            cross_device_ops.choose(self.extended.worker_devices)
        self.step_log = StepLog()
        self._meter = Meter(self.step_log)
        self.weigh_samples = weigh_samples
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


class AllReduceExtended(internals.MirroredExtended):
    """The half of the strategy that decides how values are reduced."""

    # The step of Keras that is being run or traced.
    _step: Step | None = None

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
            return super()._batch_reduce_to(
                reduce_op, value_destination_pairs, options
            )
        # A layer sums over the replicas, or its gradient does: an empty
        # replica gives nothing to the sum, and nothing flows back to it.
        part = self._step.part_of_replicas_with_samples
        sums = super()._batch_reduce_to(
            reduce_op,
            [
                (part(value), destination)
                for value, destination in value_destination_pairs
            ],
            options,
        )
        return [part(total) for total in sums]

    def sum_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """Sums distributed gradients; those of an empty replica are 0."""
        return super()._batch_reduce_to(
            tf.distribute.ReduceOp.SUM,
            [(gradient, gradient) for gradient in gradients],
            tf.distribute.experimental.CommunicationOptions(),
        )

    def _get_cross_device_ops(self, value: Any) -> Any:
        # Stock takes a new ReductionToOneDevice for each int32 value, and
        # then finds that a batch of two does not agree on its ops.
        if super()._use_merge_call():
            return self._cross_device_ops
        return super()._get_cross_device_ops(value)

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
        with observe() as records:
            if strategy.num_replicas_in_sync == 1:
                result = run(fn, args, kwargs)
            else:
                step = Step(
                    model,
                    step_name,
                    strategy,
                    strategy.weigh_samples,
                    note=lambda found: strategy.step_log.add(found, model),
                )
                self._step = step
                try:
                    result = step.run(run, fn, args, kwargs)
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
