"""What the strategies of one machine and of several have in common."""

from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.fit_output import keras_hook
from keras_allreduce.fit_output.meter import Meter
from keras_allreduce.fit_output.stats import ReduceStats
from keras_allreduce.fit_output.step_log import StepLog
from keras_allreduce.strategy.checks import check_backend


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
            keras_hook.install()

    @property
    def shown_steps(self) -> StepLog | None:
        """The steps that the fit output shows; `None` if `fit_log=False`."""
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
        if keras_compat.is_batch_without_mean(reduce_op, value, axis):
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
