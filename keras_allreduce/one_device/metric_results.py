"""Results of metrics in the logs of a step, over all samples so far.

On a replica a metric knows the samples of that replica, and a root, an area or
a ratio of its parts is not the mean of theirs. So where a step returns the
result of a metric, it is computed anew after the step, from the state that all
replicas have gathered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.one_device import replica

Path = tuple[Any, ...]


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


def note(metric: keras.metrics.Metric, results: Any) -> None:
    """A replica has asked a metric for its results."""
    noted = replica.current().metric_results
    for path, value in keras.tree.flatten_with_path(results):
        # A metric may return the result of another one.
        noted[id(value)] = MetricResult(metric, path, value)


def of_keras(outputs: Any) -> dict[Path, MetricResult]:
    """The results that Keras's own step returns: of all metrics, by name."""
    returned = {path for path, _ in keras.tree.flatten_with_path(outputs)}
    by_name = {
        each.path or (each.metric.name,): each
        for each in replica.current().metric_results.values()
    }
    return {path: by_name[path] for path in by_name if path in returned}


def among(outputs: Any) -> dict[Path, MetricResult]:
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
