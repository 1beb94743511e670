"""What makes N replicas equal one device under Keras's own steps.

A mean over a batch is not the mean of the means over its parts unless the
parts are equal; clipping the parts does not clip the sum; and a seed that all
replicas share gives all of them the same dropout mask. Keras leaves all three
to the strategy, and a strategy sees neither loss nor optimizer. So while a
step of Keras runs (or is traced), the methods of this model's objects that
decide about them are shadowed by those below. Afterwards the objects are as
they were; no class is touched.

    Keras's step                 shadowed by
    model.compute_loss           Step.compute_loss   empty replica: 0
    loss_metric.update_state     Step.update_loss_metric
    optimizer.scale_loss         Step.scale_loss     times share of the batch
    optimizer.apply              Step.apply          all-reduce, then Keras's:
                                                     finite check, accumulate,
                                                     clip, update
    seed_generator.next          Step.next_seed      another one per replica
    statistics.assign            Step.note_update    then one mean for all
                                                     workers
"""

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import (
    empty_replica,
    moving_statistics,
    update,
    weighing,
)
from keras_allreduce.one_device.shadowing import shadowed
from keras_allreduce.reduce import scaling

_thread = threading.local()
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


class Step:
    """One run (or trace) of a step of Keras on all replicas.

    Args:
        model: The model whose step it is.
        name: `"train_step"` or `"test_step"`.
        strategy: Its strategy.
        weigh_samples: See `weighing.find_rule`.
        note: Called with the records of accumulated gradients.

    Attributes:
        layers_sum: Whether a layer has summed over the replicas.
        weights_of_gradients: What the gradients of each replica here are to
            be times before they are summed; empty: nothing.
    """

    def __init__(
        self,
        model: keras.Model,
        name: str,
        strategy: Any,
        weigh_samples: bool | None,
        note: Callable[..., None],
    ):
        self._model = model
        self._strategy = strategy
        self._note = note
        self._rule = weighing.find_rule(model, name, weigh_samples)
        self._weigh_gradients = weigh_samples is True
        # TensorFlow leaves values of a worker's only replica as they are.
        self._alone_on_worker = len(strategy.extended.worker_devices) == 1
        self._has_samples: Any = None
        self.layers_sum = False
        self.weights_of_gradients: Sequence[tf.Tensor] = ()
        self._host_shares: Sequence[tf.Tensor] = ()
        self._trains_on_workers = (
            name == "train_step" and strategy.extended.num_workers > 1
        )
        self._updated: dict[int, Any] = {}
        # In a step that is not Keras's own this cannot be known.
        self._in_backprop = getattr(type(model), name) is not getattr(
            keras.Model, name
        )
        # Where the logs are the results of the metrics, as Keras has it, they
        # can be taken again without what an empty replica has seen.
        self._keras_logs = all(
            getattr(type(model), method) is getattr(keras.Model, method)
            for method in (name, "compute_metrics")
        )
        self._may_weigh_gradients = self._can_weigh_gradients()
        if self._rule.doubt and name == "train_step":
            self._warn(weighing.doubt_of_rule(self._rule))

    def run(
        self,
        call_for_each_replica: Callable[..., Any],
        fn: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Runs `fn` on every replica, as `call_for_each_replica` does."""
        data, *rest = args
        shares, corrections = self._shares(data)
        has_samples = self._has_samples
        spare = None
        if shares is not None:
            spare = keras.tree.map_structure(self._spare_sample, data)

        @tf.autograph.experimental.do_not_convert
        def on_replica(
            weights: Any, has_samples: Any, data: Any, *args: Any, **kw: Any
        ) -> tuple[Any, Any]:
            _thread.share, _thread.correction = weights
            _thread.has_samples = has_samples
            _thread.scaled = False
            try:
                if has_samples is None or self._rule.kind == "as_is":
                    return fn(data, *args, **kw), None
                before = empty_replica.state(self._model)
                data = empty_replica.with_a_sample(data, has_samples, spare)
                outputs = fn(data, *args, **kw)
                empty_replica.restore(has_samples, before)
                if not self._keras_logs:
                    return outputs, None
                return self._model.get_metrics_result(), self._samples_seen()
            finally:
                _thread.share = _thread.correction = None
                _thread.has_samples = None

        with contextlib.ExitStack() as stack:
            for owner, methods in self._shadows():
                stack.enter_context(shadowed(owner, methods))
            outputs, seen = call_for_each_replica(
                on_replica,
                ((shares, corrections), has_samples, data, *rest),
                kwargs,
            )
        if self._updated:
            moving_statistics.share(
                list(self._updated.values()), shares, self._strategy
            )
        devices = self._strategy.extended.worker_devices
        return weighing.logs(outputs, seen, devices, self._values)

    # The shares ----------------------------------------------------------

    def _shares(self, data: Any) -> tuple[Any, Any]:
        """Per replica: its share of the batch, and the correction to it.

        `None` stands for 1 on every replica.
        """
        inputs, sample_weight = weighing.parts(data)
        replicas = self._values(inputs)
        if not replicas:
            return None, None
        with tf.device("/cpu:0"):
            sizes = weighing.sizes(
                replicas, self._strategy.extended.num_workers
            )
            # Known without the other workers: no forward pass waits for them.
            self._has_samples = sizes and self._place([n > 0 for n in sizes])
            shares = sizes and self._strategy.extended.shares_of(sizes)
            self._host_shares = shares or ()
            goal = self._goal(sample_weight, shares)
            return self._place(shares), self._place(goal)

    def _goal(
        self, sample_weight: Any, shares: list[tf.Tensor] | None
    ) -> list[tf.Tensor] | None:
        """What the loss is times beside the share, per replica.

        Keras weighs each replica's loss by its samples in the mean it shows,
        and `scale_loss` does in the gradients. Where something else than the
        number of samples counts, the correction is common to both.
        """
        goal: list[tf.Tensor] | None = None
        if self._rule.kind == "sum" and shares is not None:
            goal = [tf.ones([]) for _ in shares]
        elif self._rule.kind == "sample_weights":
            weights = self._values(sample_weight)
            if weights:
                goal = self._strategy.extended.shares_of(
                    [tf.reduce_sum(tf.cast(w, tf.float32)) for w in weights]
                )
        if goal is None or shares is None:
            return goal
        return [
            tf.math.divide_no_nan(wanted, share)
            for wanted, share in zip(goal, shares, strict=True)
        ]

    def _place(self, values: Sequence[tf.Tensor] | None) -> Any:
        """One value on the device of each replica; `None` stays `None`."""
        if values is None:
            return None
        placed = []
        devices = self._strategy.extended.worker_devices
        for value, device in zip(values, devices, strict=True):
            with tf.device(device):
                placed.append(tf.identity(value))
        return distribute.PerReplica(tuple(placed))

    def _values(self, value: Any) -> Sequence[Any]:
        if isinstance(value, tf.distribute.DistributedValues):
            return self._strategy.experimental_local_results(value)
        if value is not None and self._alone_on_worker:
            return (value,)
        return ()

    def _can_weigh_gradients(self) -> bool:
        """Whether nothing but synchronized layers needs a weighed loss."""
        optimizers = update.optimizers_of(self._model)
        return (
            self._trains_on_workers
            and not (tf.executing_eagerly() or self._in_backprop)
            and self._rule.kind == "samples"
            and not any(map(update.accumulates, optimizers))
        )

    # What is shadowed ----------------------------------------------------

    def _shadows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        model = self._model
        compute = functools.partial(self.compute_loss, model.compute_loss)
        yield model, {"compute_loss": compute}
        for metric in keras_compat.loss_metrics(model):
            yield (
                metric,
                {
                    "update_state": functools.partial(
                        self.update_loss_metric, metric.update_state
                    )
                },
            )
        for optimizer in update.optimizers_of(model):
            yield (
                optimizer,
                {
                    "scale_loss": functools.partial(
                        self.scale_loss, optimizer.scale_loss
                    ),
                    "apply": functools.partial(self.apply, optimizer),
                },
            )
            inner = getattr(optimizer, "inner_optimizer", None)
            if inner is not None:
                yield (
                    inner,
                    {"apply": functools.partial(update.update, inner.apply)},
                )
        for generator in keras_compat.seed_generators(model):
            yield (
                generator,
                {"next": functools.partial(self.next_seed, generator.next)},
            )
        if self._trains_on_workers:
            for variable in empty_replica.moving_statistics(model):
                note = functools.partial(self.note_update, variable)
                yield variable, {"assign": note}

    def compute_loss(
        self,
        keras_compute_loss: Callable[..., Any],
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        **training: Any,
    ) -> Any:
        """The loss of this replica; 0 on an empty one."""
        loss = keras_compute_loss(x, y, y_pred, sample_weight, **training)
        if self._rule.kind == "as_is":
            return loss
        if _thread.has_samples is not None:
            loss = scaling.scale(loss, _thread.has_samples)
        scalar = weighing.returns_one_value(self._rule.suspects, y, y_pred)
        if scalar is not None:
            self._warn(weighing.doubt_of_scalar(scalar))
            _thread.share = _thread.correction = None
        return scaling.scale(loss, _thread.correction)

    def update_loss_metric(
        self, keras_update: Callable[..., Any], value: Any, sample_weight: Any
    ) -> Any:
        """The loss of one output among several, in the mean that is shown.

        Keras takes the mean over batches where it does not know their size
        in advance; then every replica counts once, with its share.
        """
        if sample_weight is None and self._rule.kind == "samples":
            value = scaling.scale(value, _thread.share)
        return keras_update(value, sample_weight=sample_weight)

    def scale_loss(
        self, keras_scale_loss: Callable[..., Any], loss: Any
    ) -> Any:
        """The loss that is differentiated: weighed by the share of the batch.

        That also weighs what flows between replicas in synchronized layers.
        But backprop waits for the shares of all workers. Without such layers
        the gradients are weighed instead, as they leave, which costs nothing
        where all have as many samples.
        """
        self._in_backprop = True
        if self._rule.kind != "as_is":
            _thread.scaled = True
            if self._may_weigh_gradients and not self.layers_sum:
                if _thread.share is not None:
                    self.weights_of_gradients = self._host_shares
            else:
                loss = scaling.scale(loss, _thread.share)
        return keras_scale_loss(loss)

    def apply(
        self, optimizer: Any, grads: Any, trainable_variables: Any = None
    ) -> Any:
        """Reduces first, so that all that Keras does sees the sum."""
        keras_apply = type(optimizer).apply.__get__(optimizer)
        grads = list(grads)
        if self._weigh_gradients and not _thread.scaled:
            grads = [
                g if g is None else scaling.scale(g, _thread.share)
                for g in grads
            ]
        if not update.already_reduced():
            if trainable_variables is not None:
                trainable_variables = list(trainable_variables)
            grads = update.all_reduce(
                optimizer, grads, trainable_variables, self._note
            )
        if hasattr(optimizer, "inner_optimizer"):
            # Checks all replicas' gradients at once, in a merge_call; its
            # inner optimizer then updates as below.
            return keras_apply(grads, trainable_variables)
        return update.update(keras_apply, grads, trainable_variables)

    def next_seed(
        self, keras_next: Callable[..., Any], ordered: bool = True
    ) -> Any:
        """A seed of this replica's own; replica 0 has Keras's."""
        seed = keras_next(ordered)
        context = tf.distribute.get_replica_context()
        if context is None:
            return seed
        replica = tf.cast(context.replica_id_in_sync_group, seed.dtype)
        # Far apart, whatever seeds the layers of the model were given.
        return seed + replica * tf.constant([1_000_003, 0], seed.dtype)

    def note_update(self, variable: Any, value: Any) -> Any:
        """Assigns as ever; workers then agree on one value."""
        self._updated[id(variable)] = variable
        return type(variable).assign(variable, value)

    # Around the step -----------------------------------------------------

    def _spare_sample(self, value: Any) -> Any:
        """A sample for the replicas that have none."""
        replicas = self._values(value)
        return empty_replica.first_sample(replicas[0]) if replicas else value

    def _samples_seen(self) -> Any:
        """Samples of this replica that the logs are means over."""
        for metric in self._model.metrics:
            if metric.name == "loss" and isinstance(metric, keras.metrics.Mean):
                return tf.convert_to_tensor(metric.count.value)
        return None

    def part_of_replicas_with_samples(self, value: Any) -> Any:
        """A distributed value, with 0 in the place of empty replicas."""
        if self._has_samples is None or self._rule.kind == "as_is":
            return value
        parts = []
        for part, has_samples in zip(
            self._values(value), self._has_samples.values, strict=True
        ):
            with tf.device(has_samples.device):
                parts.append(scaling.scale(part, has_samples))
        return distribute.PerReplica(tuple(parts))

    def part_that_flows_back(self, total: Any) -> Any:
        """A sum over the replicas, with 0 on empty ones if it is a gradient.

        In the forward pass all replicas get the sum: a synchronized layer has
        the same statistics everywhere.
        """
        if not self._in_backprop:
            return total
        return self.part_of_replicas_with_samples(total)

    def _warn(self, doubt: str) -> None:
        if self._model not in _warned:
            _warned.add(self._model)
            warnings.warn(doubt, stacklevel=2)
