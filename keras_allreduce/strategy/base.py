"""The common base of the strategies for one machine and for several."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import keras
import tensorflow as tf

from keras_allreduce import debug
from keras_allreduce.compat import (
    distribute,
    keras_config,
    keras_door,
)
from keras_allreduce.fit_output import explain, progress_bar
from keras_allreduce.fit_output.gradients import ModelGradients, gradients_of
from keras_allreduce.fit_output.stats import ReduceStats
from keras_allreduce.fit_output.step_log import Meter, StepLog
from keras_allreduce.fit_output.timeline import recording
from keras_allreduce.one_device import replica, samples
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.reduce.buckets import parts_of
from keras_allreduce.reduce.cost_model import Link
from keras_allreduce.reduce.plan import ReducePlan
from keras_allreduce.strategy.checks import (
    check_attribute,
    check_backend,
    check_model,
    made_outside,
)


class StrategyBase(tf.distribute.Strategy):
    """The half of a strategy that users see.

    To be mixed into a strategy of TensorFlow's.
    """

    if not TYPE_CHECKING:  # Any name would be an attribute then.

        def __getattr__(self, name: str) -> Any:
            check_attribute(self, name)
            # Again: a property may have failed, and says why.
            return object.__getattribute__(self, name)

    def _init_options(self, weigh_samples: bool | None, fit_log: bool) -> None:
        check_backend()
        self.weigh_samples = weigh_samples
        self.step_log = StepLog()
        self._meter = Meter(self.step_log)
        self._fit_log = bool(fit_log)
        if fit_log:
            progress_bar.install()
        keras_door.install()

    def _log_start(self, *details: str) -> None:
        """Logs how the strategy was made, in debug mode."""
        if debug.is_on():
            versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}"
            devices = ", ".join(self.extended.worker_devices)
            texts = [f"devices here: {devices}", *details, versions]
            debug.log(f"{type(self).__name__}: {'; '.join(texts)}")

    def _set_options_of_hints(self, ops: BatchAllReduce) -> None:
        self.step_log.bytes_per_pack = ops.bytes_per_pack
        self.step_log.sparse_as_dense = ops.sparse_as_dense

    @property
    def num_replicas_in_sync(self) -> int:
        """Number of replicas; 1 inside a step of Keras, as on one device.

        There too it is the number of all for a function that sums or gathers
        over the replicas itself.
        """
        if replica.sees_one_device():
            if not distribute.caller_communicates():
                return 1
            if replica.is_measured():  # And gathers only if there are several.
                replica.current().recorder.communicates = True
                return 1
        return int(super().num_replicas_in_sync)

    @property
    def compiles_replicas(self) -> bool:
        """Whether XLA compiles each replica by itself, not all at once."""
        return int(super().num_replicas_in_sync) > 1

    @property
    def shown_steps(self) -> StepLog | None:
        """The steps that the fit output shows: those of the chief.

        `None` on other workers, and with `fit_log=False`.
        """
        is_shown = self._fit_log and self.extended.is_chief
        return self.step_log if is_shown else None

    samples_to_measure = samples.SAMPLES

    def prepare_model(self, model: keras.Model, batch: Any) -> None:
        """Prepares the first step of a model; nothing is traced yet.

        Args:
            model: The model, which Keras is about to build.
            batch: Some of its samples, or a first batch of one replica.
        """
        samples.remember(model, batch)
        keras_config.make_generator_of_unseeded(self)

    def refuse_model_made_outside(self, model: keras.Model) -> NoReturn:
        """Raises: a model that was made outside has an optimizer from here.

        Args:
            model: The model, which Keras is about to train outside.
        """
        for variable in model.variables:
            raise made_outside(f"variable {variable.path!r} of the model")
        raise made_outside(f"model {model.name!r}")

    def all_reduce_stats(self) -> ReduceStats | None:
        """Cost of the all-reduce in the steps run since the last call.

        The first step of each traced step function is left out, and of more
        than 1024 steps between two calls only the last 1024 count.

        Returns:
            Means over those steps, or `None` if there was none.
        """
        return self._meter.read()

    def plan(self, model: keras.Model, x: Any = None) -> ReducePlan:
        """The plan of the steps of `model`, before there was one.

        The forward pass is traced to find out which gradients there will be;
        nothing runs.

        Args:
            model: A model that is built, in the scope of this strategy.
            x: Inputs, as the model is called with: arrays, tensors or
                `tf.TensorSpec`s. `None`: as the model itself knows them.

        Returns:
            The plan. A custom `train_step` may send other gradients.

        Raises:
            ValueError: If the model is not built, was made elsewhere, or if
                the strategy has `cross_device_ops` that make no plan.
        """
        return self._planned(model, x)[0]

    def explain(
        self,
        model: keras.Model,
        x: Any = None,
        *,
        link: Link | None = None,
        step_seconds: float | None = None,
        print_fn: Callable[[str], Any] | None = None,
    ) -> None:
        """Prints the plan of the steps of `model`, before there was one.

        A table in the look of `model.summary()`: the packs in the order in
        which they leave, the layers in each, its dtype and bytes, and the
        bytes that each worker sends.

        Args:
            model: See `plan`.
            x: See `plan`.
            link: With it and `step_seconds`, also the predicted cost of the
                all-reduce between 2 to 64 workers, by the model of
                docs/algorithms.md ("Scaling").
            step_seconds: Seconds of a step without all-reduce.
            print_fn: Called with the text, on each worker that passes one.
                `None`: the chief prints it.

        Raises:
            ValueError: See `plan`; or if `link` comes without `step_seconds`,
                or `step_seconds` without `link`.
        """
        explain.check_prediction(link, step_seconds)
        plan, gradients = self._planned(model, x)
        if print_fn or self.extended.is_chief:
            explain.show(
                model,
                plan,
                gradients,
                self.extended.group.gradient_ops.bytes_per_pack,
                link,
                step_seconds,
                print_fn,
            )

    def _planned(
        self, model: keras.Model, x: Any
    ) -> tuple[ReducePlan, ModelGradients]:
        check_model(model, self)
        ops = self.extended.group.gradient_ops
        if not isinstance(ops, BatchAllReduce):
            raise ValueError(
                "Only a `BatchAllReduce` makes a plan. Received: "
                f"cross_device_ops={ops}. Leave `cross_device_ops` out."
            )
        gradients = gradients_of(model, self, x)
        plan = ops.plan(gradients.specs, self.extended.worker_devices)
        parts = 0
        if keras_door.compiles_replicas(model):
            parts = len(parts_of(plan.packs))
        return replace(plan, every=gradients.every, parts=parts), gradients

    def timeline(
        self, path: str | os.PathLike[str]
    ) -> contextlib.AbstractContextManager[Any]:
        """Writes the steps that run in a `with` block as a timeline.

        For custom training loops; `AllReduceTimeline` is for `model.fit`.

        ```python
        with strategy.timeline("timeline.json"):
            for batch in batches.take(10):
                step(batch)
        ```

        A step function that is traced in the block takes all times. Of one
        that was traced before there are the packs, and no more. Of the steps
        of one function the last 1024 are written.

        Args:
            path: The file; see `AllReduceTimeline`. With several workers all
                must enter the block, and the chief writes.
        """
        return recording(self, path)
