"""Records the gradients, losses, metrics, logs and states of a step.

On halves of a batch a step continues with the values of the replicas:

    the gradient of variables     that of the whole batch, as their sum is
    the gradient of inputs        the rows of the half in that of the batch

So what follows from them (a norm, a weight that is moved, the gradient there)
is told a mean or a sum as it will be.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import graphs
from keras_allreduce.one_device import metrics, reduction, replica
from keras_allreduce.one_device.reduction import Key
from keras_allreduce.one_device.shared_state import read_outside_of_branches

# Elements of each gradient that are looked at.
_ELEMENTS = 4096


class WholeBatch:
    """Keeps the values of the whole batch, for its halves, in variables.

    Args:
        size: Samples of the whole batch.
        device: Where the step runs.
    """

    def __init__(self, size: int, device: str):
        self.size = size
        self._device = device
        self._variables: dict[Hashable, tf.Variable] = {}
        self._is_whole: Any = None
        self._start: Any = None

    def begin(self, share: tf.Tensor, start: tf.Tensor) -> None:
        """A part of the batch is about to run, from a sample on."""
        self._is_whole = share >= 1.0
        self._start = start

    def owns(self, handle: Any) -> bool:
        """Whether the handle is that of one of its own variables."""
        return any(handle is each.handle for each in self._variables.values())

    def value(self, key: Hashable, own: tf.Tensor) -> tf.Tensor:
        """`own` on the whole batch, and the same value on its halves."""
        kept = self._variable(key, own.shape, own.dtype)
        value = tf.where(self._is_whole, own, kept.read_value())
        kept.assign(value)
        return value

    def rows(self, key: Hashable, own: tf.Tensor) -> tf.Tensor | None:
        """Likewise, of one row per sample; `None` if it is not that."""
        traced = not tf.executing_eagerly()
        if traced and own.shape[0] is not None:
            return None
        kept = self._variable(key, [self.size, *own.shape[1:]], own.dtype)
        count = tf.shape(own)[0]
        rows = kept.read_value()[self._start : self._start + count]
        if not traced and rows.shape[0] != own.shape[0]:
            return None
        value = tf.where(self._is_whole, own, rows)
        kept.assign(
            tf.cond(self._is_whole, lambda: own, lambda: kept.read_value())
        )
        return value

    def _variable(self, key: Hashable, shape: Any, dtype: Any) -> tf.Variable:
        if key not in self._variables:

            def make() -> tf.Variable:
                with tf.device(self._device):
                    return tf.Variable(tf.zeros(shape, dtype), trainable=False)

            # A thread of its own is in no graph, and in no scope.
            with ThreadPoolExecutor(1) as thread:
                self._variables[key] = thread.submit(make).result()
        return self._variables[key]


class ValueRecorder:
    """The current step where it is measured: records its values.

    Args:
        model: The model whose step it is.
        batch: The values of the whole batch.
        keep: Called with each variable that is about to be assigned.

    Attributes:
        model: As above.
        sums: `None`: layers sum nothing over replicas.
        values: The recorded values.
        communicates: Whether the step sums or gathers over replicas itself.
        ends: The kind of a shown value by the op that it ends in; it is known
            to be none if it is computed from the result of a metric.
        terms: The key of the gradient of the sum that a shown value is in.
    """

    sums = None

    def __init__(
        self,
        model: keras.Model,
        batch: WholeBatch,
        keep: Callable[[Any], None],
    ) -> None:
        self.model = model
        self.values: dict[Key, Any] = {}
        self.communicates = False
        self._batch = batch
        self._keep = keep
        self.ends: dict[Key, str | None] = {}
        self.terms: dict[Key, Key] = {}
        self._differentiated: dict[int, tuple[tf.Tensor, Key]] = {}
        self._assigned: list[tuple[Key, Any, tf.Tensor]] = []

    def gradient(
        self,
        gradient: Callable[..., Any],
        tape: tf.GradientTape,
        target: Any,
        sources: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Records gradients of variables, and those of inputs."""
        key = reduction.gradient_key(tape, sources)
        found = gradient(tape, target, sources, *args, **kwargs)
        if key is None:
            return found
        own = tf.nest.flatten(found)
        if key[0] == "gradient":
            self._record_gradients(key, own)
            self._differentiated |= {
                id(each): (each, key) for each in graphs.terms(target)
            }
            kept = [
                self._of_batch((key, i), each) for i, each in enumerate(own)
            ]
        else:
            rows = [self._rows((key, i), each) for i, each in enumerate(own)]
            if any(each is None for each in rows):
                return found
            self._record_rows(key, own)
            if reduction.is_differentiated(tape):
                return found
            kept = rows
        self._record_denominator(key, target)
        return tf.nest.pack_sequence_as(found, kept)

    def apply(
        self,
        _apply: Callable[..., Any],
        _optimizer: Any,
        grads: Any,
        *_args: Any,
        **_kwargs: Any,
    ) -> None:
        """Records the gradients for an optimizer, without applying them."""
        self._record_gradients(reduction.update_key(), list(grads))

    def update_mean(
        self,
        update: Callable[..., Any],
        metric: Any,
        values: Any,
        sample_weight: Any = None,
    ) -> Any:
        """Records one value for all samples that goes into a metric."""
        reduction.have_state_summed(metric)
        key = reduction.metric_key(metric)
        if id(metric) not in replica.current().functions:
            self.record(key, values)
        return update(metric, values, sample_weight=sample_weight)

    update_sum = update_mean

    def update_function(
        self, update: Callable[..., Any], metric: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A function of the whole batch is not measured."""
        replica.current().functions[id(metric)] = args
        return update(metric, *args, **kwargs)

    def metric_result(
        self, result: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Results are not measured, unless a log is computed from them."""
        found = result(*args, **kwargs)
        metrics.note_results(args[0], found)
        return found

    def next_seed(
        self, draw: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Seeds are drawn as ever; the measurement puts them back."""
        with replica.local_update():
            return draw(*args, **kwargs)

    def skip(self, skip: Callable[..., Any], generator: Any, delta: Any) -> Any:
        """A generator of TensorFlow's is about to draw."""
        self._keep(generator.state)
        return skip(generator, delta)

    def all_reduce(
        self,
        _all_reduce: Callable[..., Any],
        _context: tf.distribute.ReplicaContext,
        _reduce_op: Any,
        value: Any,
        **_options: Any,
    ) -> Any:
        """One device has nothing to sum."""
        self.communicates = True
        return value

    def merge_call(
        self, merge_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """There is no other replica."""
        return merge_call(*args, **kwargs)

    def assign(
        self,
        assign: Callable[..., Any],
        variable: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Records the state of a variable that no strategy has made."""
        if self._batch.owns(variable.handle):
            return assign(variable, *args, **kwargs)
        key = reduction.outside_key(variable)
        if key is not None:
            self._note(key, variable)
        return assign(variable, *args, **kwargs)

    def before_assignment(self, variable: Any, value: Any) -> Any:
        """A variable is about to be assigned.

        One with an aggregation says itself how values go together.
        """
        this = replica.current()
        if variable.aggregation != tf.VariableAggregation.NONE:
            self._keep(variable)
        elif id(variable) not in this.assigned:
            this.assigned.add(id(variable))
            self._note(reduction.state_key(variable), variable)
        return value

    def _note(self, key: Key, variable: Any) -> None:
        self._keep(variable)
        before = read_outside_of_branches(variable)
        self._assigned.append((key, variable, before))

    def record_states(self) -> None:
        """Records the assigned values of the step, and those before."""
        for key, variable, before in self._assigned:
            if before.dtype.is_floating or before.dtype.is_integer:
                both = [
                    _projected(each, tf.float64)
                    for each in (before, variable.read_value())
                ]
                self.values[key] = tf.concat(both, axis=0)

    def of_graph(self, graph: Any) -> dict[Key, Any]:
        """The recorded values, but not those within a conditional."""
        return {
            key: value
            for key, value in self.values.items()
            if graph is None or value.graph is graph
        }

    def record(self, key: Key, value: Any) -> None:
        """Records a value, if it is one number for all samples."""
        value = tf.convert_to_tensor(value)
        if value.shape.rank == 0:
            self._record(key, value)

    def record_logs(self, logs: Any) -> None:
        """Records the result of the step, but not the results of metrics."""
        results = metrics.results_among(logs)
        noted = replica.current().metric_results.values()
        known = [each.value for each in noted]
        for path, value in keras.tree.flatten_with_path(logs):
            if path in results or not _is_number(value):
                continue
            value = tf.convert_to_tensor(value)  # Or a variable of Keras.
            if not value.shape.is_fully_defined():
                continue
            key = reduction.log_key(path, value.dtype)
            self._record(key, value)
            if graphs.depends_on(value, known):
                self.ends[key] = reduction.COMPARES

    def _record(self, key: Key, value: tf.Tensor) -> None:
        if not (value.dtype.is_floating or value.dtype.is_integer):
            return
        self.values[key] = tf.reshape(tf.cast(value, tf.float32), [-1])
        self._record_denominator(key, value)
        self.ends[key] = reduction.OF_OP.get(graphs.last_reduction(value))
        if id(value) in self._differentiated:
            _, self.terms[key] = self._differentiated[id(value)]

    def _record_denominator(self, key: Key, target: Any) -> None:
        divided_by = graphs.denominator(target)
        if divided_by is not None:
            self.values[reduction.denominator_key(key)] = tf.reshape(
                tf.cast(divided_by, tf.float32), [1]
            )

    def _record_gradients(self, key: Key, gradients: Any) -> None:
        parts = [
            _projected(each)
            for each in tf.nest.flatten(gradients)
            if each is not None
        ]
        if parts:
            self.values[key] = tf.concat(parts, axis=0)

    def _record_rows(self, key: Key, gradients: list[Any]) -> None:
        rows = [
            tf.reshape(tf.cast(each, tf.float32), [tf.shape(each)[0], -1])
            for each in gradients
        ]
        joined = tf.concat([each[:, :_ELEMENTS] for each in rows], axis=1)
        self.values[key] = tf.reshape(joined, [-1])

    def _of_batch(self, key: Hashable, own: Any) -> Any:
        if not isinstance(own, tf.Tensor) or not own.shape.is_fully_defined():
            return own  # `None`, or sparse.
        return self._batch.value(key, own)

    def _rows(self, key: Hashable, own: Any) -> Any:
        if not isinstance(own, tf.Tensor) or not own.shape.rank:
            return None
        return self._batch.rows(key, own)


def _is_number(value: Any) -> bool:
    """Whether a log is a tensor, a variable of Keras, or a Python float."""
    return bool(tf.is_tensor(value)) or isinstance(value, float)


def _projected(gradient: Any, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """Some numbers that are linear in a gradient, as a vector."""
    if isinstance(gradient, tf.IndexedSlices):
        rows = tf.reshape(gradient.values, [tf.size(gradient.indices), -1])
        angles = tf.cast(gradient.indices, tf.float32)[:, tf.newaxis]
        gradient = tf.reduce_sum(
            tf.cast(rows, tf.float32) * tf.cos(angles), axis=0
        )
    flat = tf.reshape(tf.cast(gradient, dtype), [-1])
    step = max(1, (flat.shape[0] or 1) // _ELEMENTS)
    return flat[::step]
