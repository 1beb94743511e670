"""Records the gradients, losses, metrics and logs of a step."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import gradient_tape
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.natures import Key

# Elements of each gradient that are looked at.
_ELEMENTS = 4096


class ValueRecorder:
    """Takes part in a step that is measured, and records its values."""

    def __init__(self) -> None:
        self.values: dict[Key, Any] = {}

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
        is_inner = gradient_tape.is_recorded_by_another(tape)
        found = gradient(tape, target, sources, *args, **kwargs)
        if keras_compat.are_variables(sources) and not is_inner:
            number = replica.current().next_call("gradient")
            self._record_gradients(("gradient", number), found)
        return found

    def apply(
        self,
        _apply: Callable[..., Any],
        _optimizer: Any,
        grads: Any,
        trainable_variables: Any = None,
    ) -> None:
        """Records what an optimizer is to apply, which changes nothing."""
        number = replica.current().next_call("apply")
        self._record_gradients(("apply", number), list(grads))

    def update_mean(
        self,
        update: Callable[..., Any],
        metric: Any,
        values: Any,
        sample_weight: Any = None,
    ) -> Any:
        """Records one value for all samples that goes into a metric."""
        number = replica.current().next_call(metric.name)
        self.record(("metric", metric.name, number), values)
        return update(metric, values, sample_weight=sample_weight)

    update_sum = update_mean

    def next_seed(
        self, draw: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Seeds are drawn as ever; the measurement puts them back."""
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
