"""Metrics whose state is not a sum, such as a maximum.

TensorFlow adds up what the replicas have gathered when a metric is read. A few
made-up samples tell whether that is right for a custom metric: is its state
after all of them the sum of those after each half? If it is the larger or the
smaller of the two instead, the replicas agree on that after each step, and
reading takes it from the first. Else a warning says so.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import facts, first_batch, replica, warn
from keras_allreduce.one_device.probe import Failure, probe
from keras_allreduce.one_device.replicas import Replicas

SUM, MAXIMUM, MINIMUM, SAME, OTHER = "sum", "max", "min", "same", "other"


class SharedMetricState:
    """The states of custom metrics that a step updates.

    Args:
        model: The model.
        replicas: The replicas of this worker.
        strategy: Their strategy.
    """

    def __init__(
        self,
        model: keras.Model,
        replicas: Replicas,
        strategy: tf.distribute.Strategy,
    ):
        self._model = model
        self._kinds = facts.of(model).metrics
        self._replicas = replicas
        self._strategy = strategy
        self._updated: dict[int, Any] = {}

    def shadows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """`update_state` of each metric that is not Keras's own."""
        for metric in keras_compat.custom_metrics(self._model):
            update = partial(self._update, metric, metric.update_state)
            yield metric, {"update_state": update}

    def _update(
        self, metric: Any, update: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not replica.is_measured() and metric not in self._kinds:
            self._kinds[metric] = self._measured(metric, update, args, kwargs)
            if OTHER in self._kinds[metric] or (
                self._is_extreme(metric) and self._replicas.group.size > 1
            ):
                warn.of_metric(self._model, metric)
        self._updated[id(metric)] = metric
        return update(*args, **kwargs)

    def agree(self) -> None:
        """Gives all replicas the largest or smallest of their states."""
        for metric in self._updated.values():
            if self._replicas.group.size > 1 or not self._is_extreme(metric):
                continue
            for kind, variable in zip(
                self._kinds[metric], metric.variables, strict=True
            ):
                distribute.read_from_first(variable.value)
                if kind != SAME:
                    self._assign_extreme(kind, variable.value)

    def _assign_extreme(self, kind: str, variable: Any) -> None:
        parts = variable.values
        with tf.device("/cpu:0"):
            reduce = tf.reduce_max if kind == MAXIMUM else tf.reduce_min
            value = reduce(tf.stack([tf.identity(part) for part in parts]), 0)
        for part, device in zip(parts, self._replicas.devices, strict=True):
            with tf.device(device):
                part.assign(value)

    def _is_extreme(self, metric: Any) -> bool:
        kinds = self._kinds.get(metric, [])
        return set(kinds) <= {MAXIMUM, MINIMUM, SAME} and bool(
            {MAXIMUM, MINIMUM} & set(kinds)
        )

    def _measured(
        self, metric: Any, update: Callable[..., Any], args: Any, kwargs: Any
    ) -> list[str]:
        """How the states of parts of a batch go together, by variable."""
        variables = [variable.value for variable in metric.variables]

        def run(part: Any, _rows: slice) -> tuple[list[Any], list[Any]]:
            with (
                self._strategy.scope(),
                tf.distribute.ReplicaContext(self._strategy, 0),
            ):
                before = [tf.identity(variable) for variable in variables]
                try:
                    metric.reset_state()
                    start = [variable.numpy() for variable in variables]
                    update(*part[0], **part[1])
                    return start, [variable.numpy() for variable in variables]
                finally:
                    for variable, value in zip(variables, before, strict=True):
                        variable.assign(value)

        example = keras.tree.map_structure(first_batch.made_up, (args, kwargs))
        found = probe(run, example)
        if isinstance(found, Failure):
            return []
        starts, wholes = found.whole
        rest = found.first[1], found.second[1]
        return [
            _kind(*each) for each in zip(starts, wholes, *rest, strict=True)
        ]


def _kind(start: Any, whole: Any, first: Any, second: Any) -> str:
    def is_near(value: Any) -> bool:
        return bool(np.allclose(whole, value, rtol=1e-3, equal_nan=True))

    if not np.any(start) and is_near(first + second):
        return SUM
    if is_near(first) and is_near(second):
        return SAME
    if is_near(np.maximum(first, second)):
        return MAXIMUM
    if is_near(np.minimum(first, second)):
        return MINIMUM
    # A mean over batches, in which each replica counts as one.
    return SUM if is_near((first + second) / 2) else OTHER
