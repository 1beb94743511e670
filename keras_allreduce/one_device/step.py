"""Makes N replicas equal one device under the steps of Keras's models.

Inside a step a replica sees one device: `num_replicas_in_sync` is 1, and every
loss is that of the replica's part of the batch. The replicas' values are then
combined by their kind: the mean of means, weighted by samples, and the sum of
sums. Keras's own step says which it is; of a custom one, it is measured.

A step holds its objects anywhere, so methods of classes ask the
current step first (`hooks.py`). Methods of a model alone are replaced in the
model (`hooks.py`). Afterwards all is as it was.

    the current step takes part in
    tape.gradient                gradients.py  scaled, summed
    optimizer.apply              gradients.py  then Keras's: finite check,
                                               accumulate, clip, update
    metric.update_state          view.py       counts with the share
    metric.result                metrics.py    in the logs: of all samples
    seed_generator.next          view.py       another one per replica
    variable.assign              shared_state.py
                                               then one value for all replicas
    context.merge_call           shared_state.py
                                               numbers of the model in Python

    replaced in the model
    compute_loss                 loss.py       empty replica: 0
    losses, add_loss             loss.py       corrected to a mean over samples
    custom metrics               metrics.py    a maximum is that of all
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat import keras_config, keras_losses
from keras_allreduce.one_device import (
    empty_replica,
    hooks,
    logs,
    measurement,
    metrics,
    replica,
    warn,
)
from keras_allreduce.one_device.empty_replica import SynchronizedSums
from keras_allreduce.one_device.gradients import GradientsOfTheBatch
from keras_allreduce.one_device.hooks import shadowed
from keras_allreduce.one_device.loss import LossOfTheReplica
from keras_allreduce.one_device.metrics import (
    MetricResult,
    Path,
    SharedMetricState,
)
from keras_allreduce.one_device.reduction import Reductions
from keras_allreduce.one_device.replica import Replica, Replicas
from keras_allreduce.one_device.shared_state import SharedState
from keras_allreduce.one_device.shares import (
    BatchShares,
    divided,
    replicas_with_samples,
    shares_of_batch,
    static_samples,
)
from keras_allreduce.one_device.view import CurrentStep
from keras_allreduce.reduce.observe import BatchRecord
from keras_allreduce.reduce.plan import GatheredLoss
from keras_allreduce.reduce.process_group import ProcessGroup

_do_not_convert = tf.autograph.experimental.do_not_convert


class Step:
    """One run (or trace) of a step of Keras on all replicas.

    Args:
        model: The model whose step it is.
        name: `"train_step"` or `"test_step"`.
        strategy: Its strategy.
        replicas: The replicas of this worker.
        weigh_samples: Whether unknown losses are means over samples, or sums.
            `None`: it is measured.
        note: Called with the records of accumulated gradients.

    Attributes:
        gathered: Its losses that are computed on the whole batch.
    """

    def __init__(
        self,
        model: keras.Model,
        name: str,
        strategy: tf.distribute.Strategy,
        replicas: Replicas,
        weigh_samples: bool | None,
        note: Callable[[Sequence[BatchRecord]], None],
    ):
        self._model = model
        self._name = name
        self._strategy = strategy
        self._replicas = replicas
        self._weigh_samples = weigh_samples
        self._note = note
        self._is_custom = keras_compat.is_custom_step(model, name)
        self._is_measured = self._is_custom or keras_compat.keeps_own_state(
            model
        )
        self._count = replicas.group.size * len(replicas.devices)
        self._trains = name == "train_step"
        self._metrics = SharedMetricState(model, replicas, strategy)
        self._returns_metrics = logs.are_metric_results(model, name)
        self._results: Mapping[Path, MetricResult] = {}
        self._measure: Callable[[], Reductions] = Reductions
        self.gathered: Mapping[int, GatheredLoss] = {}

    def run(
        self,
        call_for_each_replica: Callable[..., Any],
        fn: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Runs `fn` on every replica, as `call_for_each_replica` does."""
        # On data[replica]:
        #   [1] shares[replica], and a spare sample for those without one
        #   [2] losses and metrics of the model replaced
        #   [3] a custom step is measured: which values are means, which sums?
        #   [4] every replica in its own thread:
        #       [4a] borrow the spare sample
        #       [4b] Keras: forward, loss, backprop, sum of gradients, update
        #       [4c] forget the spare sample
        #   [5] state[replica] -> that of one model
        #   [6] logs[replica] -> as of one device
        data, *rest = args
        data = divided(data, self._replicas)
        shares, spare = self._shares(data)  # [1]
        with contextlib.ExitStack() as stack:
            for block in self._replaced():  # [2]
                stack.enter_context(block)
            fn = keras_compat.plain(fn, self._model, self._name)
            self._measure = partial(self._measured, fn, data)
            known = self._known if self._is_measured else Reductions()  # [3]
            reductions = known if self._is_custom else Reductions()
            state = SharedState(self._model, self._replicas, known)
            current = self._current_step(reductions, shares, state)
            stack.enter_context(hooks.taking_part(current))
            on = partial(
                self._on_replica, current, fn, spare, keras_config.settings()
            )
            stack.enter_context(self._errors_explained(known))
            outputs = call_for_each_replica(  # [4]
                _do_not_convert(on), (shares.of_replicas(), data, *rest), kwargs
            )
        state.agree(shares)  # [5]
        self._metrics.agree(shares)
        return logs.of_one_device(  # [6]
            outputs,
            self._results,
            shares,
            reductions,
            self._replicas,
            self._group_of_logs(),
            static_samples(data, self._replicas),
        )

    @contextlib.contextmanager
    def _errors_explained(self, known: Reductions) -> Iterator[None]:
        """Adds to an error of a step that failed on a few samples too."""
        try:
            yield
        except Exception as error:
            if known.failure and hasattr(error, "add_note"):
                error.add_note(warn.PARTS)
            raise

    def _shares(self, data: Any) -> tuple[BatchShares, Any]:
        """The shares of a batch, and a spare sample if some may be empty."""
        keras_config.make_generator_of_unseeded(self._strategy)
        shares = shares_of_batch(
            data,
            self._replicas,
            counts_weights=keras_losses.divides_by_weights(self._model),
        )
        if shares.share is None:
            return shares, None
        return shares, empty_replica.spare_sample(data, self._replicas)

    def _on_replica(
        self,
        current: CurrentStep,
        fn: Callable[..., Any],
        spare: Any,
        settings: dict[str, Any],
        shares: tuple[Any, Any, Any],
        data: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The logs of one replica."""
        keras_config.take_over(settings)
        this = Replica(*shares, num_replicas=self._count)
        with replica.running(this, current):
            current.begin_replica()
            if this.has_samples is None:
                return self._shown(current, fn(data, *args, **kwargs))
            before = empty_replica.state(self._model)
            data = empty_replica.with_a_sample(  # [4a]
                data, this.has_samples, spare
            )
            outputs = fn(data, *args, **kwargs)  # [4b]
            outputs = self._shown(current, outputs)
            empty_replica.restore(this.has_samples, before)  # [4c]
            return outputs

    def _shown(self, current: CurrentStep, outputs: Any) -> Any:
        """The logs of a replica, in which results of metrics are found."""
        if self._returns_metrics:
            self._results = metrics.results_of_keras(outputs)
        else:
            self._results = metrics.results_among(outputs)
        return current.shown(outputs, self._results)

    def _group_of_logs(self) -> ProcessGroup:
        """The workers whose samples the logs are of."""
        group = self._replicas.group
        if not self._trains and self._returns_metrics:
            # Keras takes those of an epoch from the metrics; no step waits.
            return ProcessGroup(group.gradient_ops)
        return group

    @cached_property
    def _known(self) -> Reductions:
        """The measurement of this step, or the user's declaration."""
        return self._measure()

    def _measured(self, fn: Callable[..., Any], data: Any) -> Reductions:
        if self._weigh_samples is not None:
            return Reductions.given(is_sum=not self._weigh_samples)
        found = measurement.reductions_of(
            self._model, self._name, fn, data, self._strategy, self._replicas
        )
        if self._trains:
            warn.of_reductions(self._model, found, is_custom=self._is_custom)
        elif self._is_custom:
            warn.of_shown(self._model, found)
        return found

    def _current_step(
        self, reductions: Reductions, shares: BatchShares, state: SharedState
    ) -> CurrentStep:
        """What takes part in the code of the step on every replica."""
        sums = SynchronizedSums(self._replicas, shares.has_samples)
        gradients = None
        if self._trains:
            optimizer = getattr(self._model, "optimizer", None)
            gradients = GradientsOfTheBatch(
                self._replicas,
                reductions,
                sums,
                shares.on_host,
                is_custom=self._is_custom,
                accumulates=not self._is_custom
                and keras_compat.accumulates(optimizer),
                note=self._note,
            )
        return CurrentStep(
            self._model, reductions, gradients, sums, state, self._replicas
        )

    def _replaced(
        self,
    ) -> Iterator[contextlib.AbstractContextManager[Any]]:
        """The replacements in the model while the step runs."""
        losses = LossOfTheReplica(
            self._model,
            self._replicas,
            lambda: self._known,
            is_known=self._weigh_samples is not None,
            reads=self._weigh_samples is None
            and self._trains
            and not self._is_custom
            and keras_compat.has_custom_forward_pass(self._model),
        )
        self.gathered = losses.gathered
        yield keras_losses.compiled_losses_replaced(
            self._model, losses.compiled
        )
        yield keras_losses.added_losses_of_each_thread(self._model)
        for name, method in keras_compat.inlined_functions(self._model):
            yield shadowed(self._model, {name: method})
        for owner, methods in (*losses.shadows(), *self._metrics.shadows()):
            yield shadowed(owner, methods)


def predict(
    model: keras.Model,
    replicas: Replicas,
    call_for_each_replica: Callable[..., Any],
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Runs a `predict_step` on every replica; returns one row per sample.

    Some layers cannot run on an empty batch, so an empty replica runs on a
    sample that it borrows, and returns no row for it.

    Args:
        model: The model whose step it is.
        replicas: The replicas of this worker.
        call_for_each_replica: Calls a function on every replica.
        fn: The step.
        args: Its arguments, the batch first.
        kwargs: Likewise.

    Raises:
        ValueError: If an output is one number for all samples.
    """
    count = replicas.group.size * len(replicas.devices)
    if count == 1:
        return call_for_each_replica(fn, args, kwargs)
    data, *rest = args
    data = divided(data, replicas)
    of_replicas = replicas_with_samples(data, replicas)
    spare = None
    if of_replicas is not None:
        spare = empty_replica.spare_sample(data, replicas)
    step = CurrentStep(model, Reductions())
    settings = keras_config.settings()

    @_do_not_convert
    def on_replica(
        has_samples: Any, data: Any, *args: Any, **kwargs: Any
    ) -> Any:
        keras_config.take_over(settings)
        this = Replica(has_samples=has_samples, num_replicas=count)
        with replica.running(this, step):
            step.begin_replica()
            if has_samples is None:
                return _with_rows(fn(data, *args, **kwargs))
            data = empty_replica.with_a_sample(data, has_samples, spare)
            return keras.tree.map_structure(
                partial(empty_replica.rows_if, has_samples),
                _with_rows(fn(data, *args, **kwargs)),
            )

    with hooks.taking_part(step):
        return call_for_each_replica(
            on_replica, (of_replicas, data, *rest), kwargs
        )


def _with_rows(outputs: Any) -> Any:
    """The outputs, each of which must have one row for each sample."""
    for path, output in keras.tree.flatten_with_path(outputs):
        if tf.TensorShape(output.shape).rank == 0:
            raise ValueError(
                "Outputs of `predict` have one row for each sample, since "
                "those of all replicas are joined. Received: one number for "
                f"a batch in outputs{list(path) or ''}. Return a value for "
                "each sample and reduce what `predict` returns, or compute "
                "it with `evaluate`, in a metric."
            )
    return outputs
