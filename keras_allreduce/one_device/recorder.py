"""Records the gradients, losses, metrics and logs of a step."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.one_device import counted, replica
from keras_allreduce.one_device.natures import Key
from keras_allreduce.one_device.shared_state import read_outside_of_branches

# Elements of each gradient that are looked at.
_ELEMENTS = 4096


class ValueRecorder:
    """The current step where it is measured: records its values.

    Attributes:
        model: The model whose step it is.
        sums: `None`: layers sum nothing over replicas.
    """

    sums = None

    def __init__(self, model: keras.Model | None = None) -> None:
        self.model = model
        self.values: dict[Key, Any] = {}
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
        """Records gradients of variables."""
        key = counted.gradient(tape, sources)
        found = gradient(tape, target, sources, *args, **kwargs)
        if key is not None:
            self._record_gradients(key, found)
        return found

    def apply(
        self,
        _apply: Callable[..., Any],
        _optimizer: Any,
        grads: Any,
        *_args: Any,
        **_kwargs: Any,
    ) -> None:
        """Records what an optimizer is to apply, which changes nothing."""
        self._record_gradients(counted.update(), list(grads))

    def update_mean(
        self,
        update: Callable[..., Any],
        metric: Any,
        values: Any,
        sample_weight: Any = None,
    ) -> Any:
        """Records one value for all samples that goes into a metric."""
        self.record(counted.metric(metric), values)
        return update(metric, values, sample_weight=sample_weight)

    update_sum = update_mean

    def next_seed(
        self, draw: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Seeds are drawn as ever; the measurement puts them back."""
        with replica.local_update():
            return draw(*args, **kwargs)

    def all_reduce(
        self,
        _all_reduce: Callable[..., Any],
        _context: tf.distribute.ReplicaContext,
        _reduce_op: Any,
        value: Any,
        **_options: Any,
    ) -> Any:
        """One device has nothing to sum."""
        return value

    def before_assignment(self, variable: Any) -> None:
        """A variable is about to be assigned."""
        this = replica.current()
        if id(variable) not in this.assigned:
            this.assigned.add(id(variable))
            before = read_outside_of_branches(variable)
            self._assigned.append((counted.state(variable), variable, before))

    def record_states(self) -> None:
        """Records by how much the step has changed what it assigned."""
        for key, variable, before in self._assigned:
            if before.dtype.is_floating or before.dtype.is_integer:
                self._record_gradients(key, variable.read_value() - before)

    def of_graph(self, graph: Any) -> dict[Key, Any]:
        """What was recorded, but not within a conditional.

        Gradients stay, which no replica could sum there either.
        """
        return {
            key: value
            for key, value in self.values.items()
            if value.graph is graph or key[0] in ("gradient", "apply")
        }

    def record(self, key: Key, value: Any) -> None:
        """Records a value, if it is one number for all samples."""
        value = tf.convert_to_tensor(value)
        if value.shape.rank == 0 and value.dtype.is_floating:
            self.values[key] = tf.reshape(tf.cast(value, tf.float32), [1])

    def record_logs(self, logs: Any) -> None:
        """Records what the step has returned."""
        for path, value in keras.tree.flatten_with_path(logs):
            if tf.is_tensor(value):
                self.record(("log", *path), value)

    def _record_gradients(self, key: Key, gradients: Any) -> None:
        parts = [
            _projected(each)
            for each in tf.nest.flatten(gradients)
            if each is not None
        ]
        if parts:
            self.values[key] = tf.concat(parts, axis=0)


def _projected(gradient: Any) -> tf.Tensor:
    """Some numbers that are linear in a gradient, as a float32 vector."""
    if isinstance(gradient, tf.IndexedSlices):
        rows = tf.reshape(gradient.values, [tf.size(gradient.indices), -1])
        angles = tf.cast(gradient.indices, tf.float32)[:, tf.newaxis]
        gradient = tf.reduce_sum(
            tf.cast(rows, tf.float32) * tf.cos(angles), axis=0
        )
    flat = tf.reshape(tf.cast(gradient, tf.float32), [-1])
    step = max(1, (flat.shape[0] or 1) // _ELEMENTS)
    return flat[::step]
