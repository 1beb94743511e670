"""The current step, as the code that it runs meets it."""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import graphs, keras_losses
from keras_allreduce.one_device import (
    metrics,
    reduction,
    replica,
    warn,
    whole_batch,
)
from keras_allreduce.one_device.empty_replica import SynchronizedSums
from keras_allreduce.one_device.gradients import GradientsOfTheBatch
from keras_allreduce.one_device.reduction import (
    MAX,
    MEAN,
    MIN,
    RATIO,
    SUM,
    Key,
    Reductions,
)
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shared_state import PythonNumbers, SharedState
from keras_allreduce.one_device.shares import extreme, scaled_ratio
from keras_allreduce.reduce.packing import scale


class CurrentStep:
    """Takes part in the calls of a step, so that it sees one device.

    `replica.current_step()` is it in every thread that runs a part of the
    step. It takes part in the methods of `hooks`, and the strategy asks it.

    Args:
        model: The model whose step it is.
        reductions: Tells means from sums.
        gradients: Sums gradients; `None` where no variable is trained.
        sums: The sums that layers make over the replicas; `None` if they are
            TensorFlow's.
        state: The variables that replicas assign on their own; `None` if
            nothing becomes of them.
        replicas: The replicas of this worker; `None` where nothing is shown.

    Attributes:
        model: As above.
        sums: As above.
    """

    def __init__(
        self,
        model: keras.Model,
        reductions: Reductions,
        gradients: GradientsOfTheBatch | None = None,
        sums: SynchronizedSums | None = None,
        state: SharedState | None = None,
        replicas: Replicas | None = None,
    ):
        self.model = model
        self.sums = sums
        self._reductions = reductions
        self._gradients = gradients
        self._state = state
        self._replicas = replicas
        self._numbers = PythonNumbers(model)

    def begin_replica(self) -> None:
        """A replica is about to run the step."""
        self._numbers.put_back()

    def before_assignment(self, variable: Any, value: Any) -> Any:
        """A replica is about to assign to its own part of a variable.

        Returns:
            The value, so that its mean or sum over the replicas, if that is
            the aggregation of the variable, is that over samples.
        """
        if not replica.sees_one_device():
            return value
        if variable.aggregation == tf.VariableAggregation.NONE:
            if self._state is not None:
                self._state.note(variable)
            return value
        return aggregated(variable, value)

    def gradient(
        self, gradient: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """See `GradientsOfTheBatch.gradient`."""
        if self._gradients is None:
            return gradient(*args, **kwargs)
        return self._gradients.gradient(gradient, *args, **kwargs)

    def apply(
        self, apply: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """See `GradientsOfTheBatch.apply`."""
        if self._gradients is None:
            return apply(*args, **kwargs)
        return self._gradients.apply(apply, *args, **kwargs)

    def shown(self, logs: Any, results: Container[Any]) -> Any:
        """Logs whose mean over the replicas, by samples, is the batch's.

        Args:
            logs: Those of this replica.
            results: Paths of the results of metrics, which stay as they are.
        """
        if self._replicas is None:
            return logs
        flat = []
        for path, value in keras.tree.flatten_with_path(logs):
            if path not in results and tf.is_tensor(value):
                value = tf.convert_to_tensor(value)
                key = reduction.log_key(path, value.dtype)
                kind = self._kind(key, value)
                if kind != SUM or self._reductions.losses is not None:
                    value = self._of_batch(value, kind)
            flat.append(value)
        return keras.tree.pack_sequence_as(logs, flat)

    def _kind(self, key: Key, value: Any) -> str:
        """How a shown value of the batch follows from those of replicas."""
        given = self._reductions.losses
        if given is None:
            return self._reductions.of(*key).kind
        if id(value) in replica.current().differentiated:
            return given.kind
        # Nothing was measured.
        return reduction.OF_OP.get(graphs.last_reduction(value), MEAN)

    def _of_batch(self, value: Any, kind: str) -> Any:
        """A value whose mean over the replicas, by samples, is the batch's."""
        if kind == SUM and value.dtype.is_floating:
            return scale(value, replica.current().inverse_weight())
        if self._replicas is None:
            return value
        if kind == RATIO:
            return scaled_ratio(value, self._replicas)
        if kind in (MAX, MIN):
            return extreme(value, self._replicas, is_max=kind == MAX)
        return value

    def all_reduce(
        self,
        all_reduce: Callable[..., Any],
        context: tf.distribute.ReplicaContext,
        reduce_op: Any,
        value: Any,
        **options: Any,
    ) -> Any:
        """Gradients of the tape are the sum already."""
        if replica.current().has_summed(value):
            return value
        return all_reduce(context, reduce_op, value, **options)

    def merge_call(
        self, merge_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The other replicas run in the meantime."""
        numbers = PythonNumbers(self.model)
        merged = merge_call(*args, **kwargs)
        numbers.put_back()
        return merged

    def assign(
        self,
        assign: Callable[..., Any],
        variable: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """All replicas assign to a variable that no strategy has made."""
        key = reduction.outside_key(variable)
        found = self._reductions.found.get(key) if key else None
        if found is not None and not found.adds_up:
            warn.of_outside_variable(self.model, variable.name)
        return assign(variable, *args, **kwargs)

    def update_mean(
        self,
        update: Callable[..., Any],
        metric: Any,
        values: Any,
        sample_weight: Any = None,
    ) -> Any:
        """A mean over batches, where each batch counts once as on one device.

        One value for all samples of a replica counts with its share.
        """
        this = replica.current()
        reduction.have_state_summed(metric)
        key = reduction.metric_key(metric)
        if _rank(values) == 0 and _rank(sample_weight) in (None, 0):
            if id(metric) in this.functions and self._replicas is not None:
                call = partial(keras_losses.call_function, metric)
                y_true, y_pred = this.functions[id(metric)]
                values = whole_batch.loss_of_batch(
                    call, y_true, y_pred, None, self._replicas
                )
            else:
                values = tf.convert_to_tensor(values)
                values = self._of_batch(values, self._kind(key, values))
            if sample_weight is None:
                sample_weight = this.share
        return update(metric, values, sample_weight=sample_weight)

    def update_function(
        self,
        update: Callable[..., Any],
        metric: Any,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
    ) -> Any:
        """A mean of what a function returns.

        If that is one number for a batch, it is that of the whole batch.
        """
        if self._replicas is not None and (
            not keras_losses.has_function_of_samples(metric, y_pred)
        ):
            given = y_true, y_pred
            if whole_batch.may_gather(self._replicas, *given):
                replica.current().functions[id(metric)] = given
            else:
                nbytes = whole_batch.bytes_of_a_sample(*given)
                warn.of_large_loss(self.model, metric.name, nbytes)
        return update(metric, y_true, y_pred, sample_weight=sample_weight)

    def update_sum(
        self,
        update: Callable[..., Any],
        metric: Any,
        values: Any,
        sample_weight: Any = None,
    ) -> Any:
        """A sum over batches, to which each batch is added once."""
        reduction.have_state_summed(metric)
        key = reduction.metric_key(metric)
        if _rank(values) == 0:
            values = tf.convert_to_tensor(values)
            kind = self._kind(key, values)
            if kind != SUM:
                weight = replica.current().weight
                values = scale(self._of_batch(values, kind), weight)
        return update(metric, values, sample_weight=sample_weight)

    def metric_result(
        self, result: Callable[..., Any], metric: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The result on this replica; see `metrics.py`."""
        found = result(metric, *args, **kwargs)
        metrics.note_results(metric, found)
        return found

    def next_seed(
        self, draw: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A seed that no other replica has; replica 0 has Keras's."""
        with replica.local_update():
            seed = draw(*args, **kwargs)
        context = tf.distribute.get_replica_context()
        number = tf.cast(context.replica_id_in_sync_group, seed.dtype)
        # Far apart, for any seeds of the layers of the model.
        return seed + number * tf.constant([1_000_003, 0], seed.dtype)

    def skip(self, skip: Callable[..., Any], *args: Any) -> Any:
        """TensorFlow's generators draw other numbers on each replica."""
        return skip(*args)


def aggregated(variable: Any, value: Any) -> Any:
    """The value of a replica for a variable that aggregates, by its samples."""
    this = replica.current()
    if this.share is None:
        return value
    value = tf.convert_to_tensor(value, variable.dtype)
    if variable.aggregation == tf.VariableAggregation.MEAN:
        return scale(value, this.share)
    if variable.aggregation == tf.VariableAggregation.SUM:
        return tf.where(this.has_samples, value, tf.zeros_like(value))
    return value


def _rank(value: Any) -> int | None:
    """Rank of a tensor or a number; `None` if it is not known, or no value."""
    if value is None:
        return None
    shape = value.shape if tf.is_tensor(value) else np.shape(value)
    return tf.TensorShape(shape).rank
