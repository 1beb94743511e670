"""MirroredStrategy whose gradients go through `BatchAllReduce`."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from keras_allreduce import malloc
from keras_allreduce.devices import check_devices, names_of, on_gpus
from keras_allreduce.input.dataset import split
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.reduce.process_group import ProcessGroup
from keras_allreduce.strategy.base import StrategyBase
from keras_allreduce.strategy.checks import explained
from keras_allreduce.strategy.datasets import distribute
from keras_allreduce.strategy.extended import ExtendedBase


class AllReduceStrategy(StrategyBase, tf.distribute.MirroredStrategy):
    """Synchronous data-parallel training on the devices of one machine.

    A drop-in replacement for `tf.distribute.MirroredStrategy` with the same
    positional arguments. Gradients are reduced in packs, which overlaps
    communication with backprop, and `model.fit` shows the cost.

    ```python
    strategy = keras_allreduce.AllReduceStrategy()
    with strategy.scope():
        model = keras.Sequential([...])
        model.compile(...)
    model.fit(x, y)
    ```

    Args:
        devices: Device names, such as `["/gpu:0", "/gpu:1"]`, or
            `tf.config.LogicalDevice`s: either all GPUs or all logical CPU
            devices (see `host_devices`). `None`: all GPUs, or all logical CPU
            devices on a machine without a GPU.
        cross_device_ops: A `tf.distribute.CrossDeviceOps` that replaces the
            `BatchAllReduce` configured by the next three arguments.
        algorithm: See `BatchAllReduce`.
        bytes_per_pack: See `BatchAllReduce`.
        sparse_as_dense: See `BatchAllReduce`.
        weigh_samples: How to treat losses that Keras does not reduce: those
            of a custom `train_step`, and loss functions that return a scalar.
            `True`: as means over samples, weighted by the samples of each
            replica; `False`: as sums; `None`: those of `compile` are computed
            on the whole batch, others are detected on a few samples.
        fit_log: Whether `model.fit` prints the plan and the cost of the
            all-reduce.

    Raises:
        TypeError: If `devices` is not an iterable of devices.
        ValueError: If `devices` is empty, mixes GPUs and logical CPU devices,
            or has duplicates or unknown devices; if `cross_device_ops` is
            combined with an argument that it overrides; if `BatchAllReduce`
            rejects an argument; or if the Keras backend is not TensorFlow.
    """

    @explained
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
        self._log_start()


class AllReduceExtended(ExtendedBase):
    """MirroredStrategy's, with another path for gradients."""

    @property
    def group(self) -> ProcessGroup:
        """This process alone."""
        return ProcessGroup(self._cross_device_ops)

    def _experimental_distribute_dataset(
        self, dataset: Any, options: Any
    ) -> Any:
        # TensorFlow's own, not that of `ExtendedBase`.
        stock = super(ExtendedBase, self)._experimental_distribute_dataset
        return distribute(
            dataset,
            lambda made: split(made, self, options, stock),
            self._num_replicas_in_sync,
        )

    def _get_cross_device_ops(self, value: Any) -> Any:
        # Stock takes a new ReductionToOneDevice for each int32 value, and
        # then finds that a batch of two does not agree on its ops.
        if super()._use_merge_call():
            return self._cross_device_ops
        return super()._get_cross_device_ops(value)
