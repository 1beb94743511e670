"""Metrics over the samples of all replicas: their state and their results.

TensorFlow adds up the state of the replicas when a metric is read. A few
made-up samples tell whether that is right for a variable of a custom metric.
With s(B) its value after a batch B of two halves B1 and B2:

    s(B) = s(B1) + s(B2)           a sum          TensorFlow adds it up
    s(B) = s(B1) = s(B2)           the same       read from the first replica
    s(B) = max(s(B1), s(B2))       an extreme     the replicas agree on it
    s(B) = (s(B1) + s(B2)) / 2     a mean         the replicas agree on it,
                                                  weighted by their samples

They agree after each step, and reading takes it from the first. A mean may be
the last value, a moving average, or a sum of batch means.
Other state is warned about.

On a replica a metric knows the samples of that replica, and a root, an area or
a ratio of its parts is not the mean of theirs. So where a step returns the
result of a metric, it is computed anew after the step, from the state that all
replicas have gathered.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import facts, replica, samples, warn
from keras_allreduce.one_device.reduction import FIRST, MAX, MEAN, MIN, SUM
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.samples import Failure, probe
from keras_allreduce.one_device.shares import BatchShares
from keras_allreduce.reduce.packing import scale
from keras_allreduce.reduce.process_group import all_reduce_max

# Beside the kinds of a `Reduction`.
OTHER = "other"

Path = tuple[Any, ...]


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
            if OTHER in self._kinds[metric]:
                warn.of_metric(self._model, metric)
        self._updated[id(metric)] = metric
        return update(*args, **kwargs)

    def agree(self, shares: BatchShares) -> None:
        """Gives all replicas the state of one device, where it is no sum.

        Args:
            shares: How the batch is divided.
        """
        for metric in self._updated.values():
            kinds = self._kinds.get(metric, [])
            if OTHER in kinds or set(kinds) <= {SUM}:
                continue
            for kind, variable in zip(kinds, metric.variables, strict=True):
                if kind == SUM:
                    continue
                distribute.read_from_first(variable.value)
                if kind != FIRST:
                    self._assign(
                        variable.value,
                        self._agreed(kind, variable.value, shares),
                    )

    def _agreed(
        self, kind: str, variable: Any, shares: BatchShares
    ) -> tf.Tensor:
        """The value of all replicas of all workers."""
        group = self._replicas.group
        with tf.device("/cpu:0"):
            parts = [part.read_value() for part in variable.values]
            if kind == MAX:
                return all_reduce_max(group, tf.reduce_max(tf.stack(parts), 0))
            if kind == MIN:
                least = tf.reduce_min(tf.stack(parts), 0)
                return -all_reduce_max(group, -least)
            parts = [tf.cast(part, tf.float64) for part in parts]
            weights = shares.weights(len(parts))
            total = tf.add_n(list(map(scale, parts, weights)))
            count = group.size * len(parts)
            return group.all_reduce(total / count, "metric")

    def _assign(self, variable: Any, value: tf.Tensor) -> None:
        for part, device in zip(
            variable.values, self._replicas.devices, strict=True
        ):
            with tf.device(device):
                part.assign(tf.cast(value, part.dtype))

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

        # Each by numbers of its own: targets differ from outputs. Negative
        # ones too: a minimum may start from 0.
        given = args, kwargs
        states: list[list[tuple[Any, ...]]] = []
        for sign in (1, -1):
            example = keras.tree.pack_sequence_as(
                given,
                [
                    samples.made_up(leaf, seed, sign)
                    for seed, leaf in enumerate(keras.tree.flatten(given))
                ],
            )
            found = probe(run, example)
            if not isinstance(found, Failure):
                (start, whole), (_, first), (_, second) = found
                states.append(
                    list(zip(start, whole, first, second, strict=True))
                )
        return [_kind(each) for each in zip(*states, strict=True)]


def _kind(states: Sequence[tuple[Any, ...]]) -> str:
    """How a variable of parts goes together: start, whole, first, second."""
    told = [
        each
        for each in states
        if any(not np.array_equal(part, each[0]) for part in each[1:])
    ]
    possible = [_possible(*each) for each in told or states[:1]]
    for kind in possible[0]:
        if all(kind in each for each in possible):
            return kind
    return OTHER


def _possible(start: Any, whole: Any, first: Any, second: Any) -> list[str]:
    def is_near(value: Any) -> bool:
        return bool(np.allclose(whole, value, rtol=1e-3, equal_nan=True))

    is_so = {
        SUM: not np.any(start) and is_near(first + second),
        FIRST: is_near(first) and is_near(second),
        MAX: is_near(np.maximum(first, second)),
        MIN: is_near(np.minimum(first, second)),
        MEAN: is_near((first + second) / 2),
    }
    return [kind for kind, so in is_so.items() if so]


@dataclass(frozen=True)
class MetricResult:
    """A result that a step has asked a metric for.

    Attributes:
        metric: The metric.
        path: Where the value is in what `metric.result()` returns.
        value: The value on this replica.
    """

    metric: keras.metrics.Metric
    path: Path
    value: Any


def note_results(metric: keras.metrics.Metric, results: Any) -> None:
    """A replica has asked a metric for its results."""
    noted = replica.current().metric_results
    for path, value in keras.tree.flatten_with_path(results):
        # A metric may return the result of another one.
        noted[id(value)] = MetricResult(metric, path, value)


def results_of_keras(outputs: Any) -> dict[Path, MetricResult]:
    """The results that Keras's own step returns: of all metrics, by name."""
    returned = {path for path, _ in keras.tree.flatten_with_path(outputs)}
    by_name = {
        each.path or (each.metric.name,): each
        for each in replica.current().metric_results.values()
    }
    return {path: by_name[path] for path in by_name if path in returned}


def results_among(outputs: Any) -> dict[Path, MetricResult]:
    """The results of metrics that a replica returns, by where they are."""
    noted = replica.current().metric_results
    found = {
        path: noted.get(id(value))
        for path, value in keras.tree.flatten_with_path(outputs)
    }
    return {path: each for path, each in found.items() if each is not None}


class GatheredStates:
    """The states of metrics, gathered over all replicas.

    Args:
        results: Results of the metrics whose states are needed.
    """

    def __init__(self, results: Mapping[Path, MetricResult]):
        self._results = results
        self._metrics = list(
            {id(each.metric): each.metric for each in results.values()}.values()
        )
        self._variables = [
            variable.value
            for metric in self._metrics
            for variable in metric.variables
        ]

    def local_sums(self) -> list[tf.Tensor]:
        """Values that are still to be summed over the workers, on the host."""
        with tf.device("/cpu:0"):
            return [
                tf.add_n([part.read_value() for part in variable.values])
                for variable in self._variables
                if distribute.is_summed_when_read(variable)
            ]

    def results(self, sums: Sequence[tf.Tensor]) -> dict[Path, Any]:
        """The results, over the samples of all replicas.

        Args:
            sums: `local_sums`, summed over the workers.
        """
        left = iter(sums)
        states = iter(
            [
                next(left)
                if distribute.is_summed_when_read(variable)
                else distribute.read_first(variable)
                for variable in self._variables
            ]
        )
        found: dict[int, dict[Path, Any]] = {}
        with tf.device("/cpu:0"):
            for metric in self._metrics:
                state = [next(states) for _ in metric.variables]
                result = metric.stateless_result(state)
                found[id(metric)] = dict(keras.tree.flatten_with_path(result))
        return {
            path: found[id(each.metric)][each.path]
            for path, each in self._results.items()
        }
