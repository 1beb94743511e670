"""MirroredStrategy whose gradients go through `BatchAllReduce`."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from keras_allreduce import malloc
from keras_allreduce.devices import check_devices, names_of, on_gpus
from keras_allreduce.fit_output.timeline import Alone, Peers
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.strategy.base import StrategyBase
from keras_allreduce.strategy.extended import ExtendedBase


class AllReduceStrategy(StrategyBase, tf.distribute.MirroredStrategy):
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
        devices: Device names, such as `["/gpu:0", "/gpu:1"]`, or
            `tf.config.LogicalDevice`s, all GPUs or all host devices;
            `host_devices(n)` makes host devices to try it on any machine.
            `None`: all GPUs, or all host devices without one.
        cross_device_ops: A `tf.distribute.CrossDeviceOps` to use instead of
            the `BatchAllReduce` that the next three arguments describe.
        algorithm: See `BatchAllReduce`.
        bytes_per_pack: See `BatchAllReduce`.
        sparse_as_dense: See `BatchAllReduce`.
        weigh_samples: Whether losses that Keras does not reduce itself, those
            of a custom step and of one value for all samples, are means over
            samples (`True`), which are weighted by samples, or sums
            (`False`). `None`: it is measured on a few samples.
        fit_log: Whether the output of `model.fit` shows the plan and the cost
            of the all-reduce.

    Raises:
        TypeError: If `devices` is no iterable of devices.
        ValueError: If `devices` is empty, mixes GPUs and host devices, names
            one twice or one that is not there; if `cross_device_ops` comes
            with an argument that it makes useless; if an argument is not one
            that `BatchAllReduce` takes; or if the Keras backend is not
            TensorFlow.
    """

    def __init__(
        self,
        devices: Iterable[Any] | None = None,
        cross_device_ops: tf.distribute.CrossDeviceOps | None = None,
        *,
        algorithm: str = "auto",
        bytes_per_pack: int = 0,
        sparse_as_dense: bool = False,
        weigh_samples: bool | None = None,
        fit_log: bool = True,
    ):
        self._init_options(weigh_samples, fit_log)
        if devices is not None:
            devices = names_of(devices)
        if not on_gpus(devices):
            # Before TensorFlow starts its threads: told later, it has no
            # effect.
            malloc.keep_freed()
        if devices is not None:
            check_devices(devices)
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
        # What MirroredStrategy.__init__ does, with our own `extended`.
        tf.distribute.Strategy.__init__(
            self, AllReduceExtended(self, devices, cross_device_ops)
        )
        if isinstance(cross_device_ops, BatchAllReduce):
            cross_device_ops.choose(self.extended.worker_devices)
            self._set_options_of_hints(cross_device_ops)


class AllReduceExtended(ExtendedBase):
    """MirroredStrategy's, with another path for gradients."""

    @property
    def peers(self) -> Peers:
        """All workers, seen from this one: it is alone."""
        return Alone(self._cross_device_ops)

    def _get_cross_device_ops(self, value: Any) -> Any:
        # Stock takes a new ReductionToOneDevice for each int32 value, and
        # then finds that a batch of two does not agree on its ops.
        if super()._use_merge_call():
            return self._cross_device_ops
        return super()._get_cross_device_ops(value)
