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
from keras_allreduce.records import BatchRecord, observe
from keras_allreduce.stats import ReduceStats


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
            any machine. `None`: all GPUs, or `["/cpu:0"]` without one.
        cross_device_ops: A `tf.distribute.CrossDeviceOps` to use instead of
            the `BatchAllReduce` that the next three arguments describe.
        algorithm: See `BatchAllReduce`.
        bytes_per_pack: See `BatchAllReduce`.
        sparse_as_dense: See `BatchAllReduce`.
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
        self._fit_log = bool(fit_log)
        if fit_log:
            fit_hook.install()

    @property
    def fit_log(self) -> StepLog | None:
        """What the fit output shows, or `None` if it was switched off."""
        return self.step_log if self._fit_log else None

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

    def _get_cross_device_ops(self, value: Any) -> Any:
        # Stock takes a new ReductionToOneDevice for each int32 value, and
        # then finds that a batch of two does not agree on its ops.
        if self._use_merge_call():
            return self._cross_device_ops
        return super()._get_cross_device_ops(value)

    def _call_for_each_replica(
        self, fn: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        model = _model_of(fn)
        strategy = self._container_strategy()
        if model is not None:
            check_model(model, strategy)
        with observe() as records:
            result = super()._call_for_each_replica(fn, args, kwargs)
        if records:
            strategy.step_log.add(_gradients_among(records), model)
        return result


def _model_of(fn: Callable[..., Any]) -> keras.Model | None:
    """The model whose `train_step` this is, if it is one."""
    fn = inspect.unwrap(fn)
    model = getattr(fn, "__self__", None)
    if isinstance(model, keras.Model) and fn.__name__ == "train_step":
        return model
    return None


def _gradients_among(records: Sequence[BatchRecord]) -> BatchRecord:
    """The batch that carries the gradients of a step: its largest.

    Others are the statistics of synchronized layers and what the user's own
    code reduces.
    """
    return max(
        records,
        key=lambda record: (record.plan.nbytes or 0, len(record.packs)),
    )
