"""Runs a step to measure it, and leaves no trace of that.

The step is traced into a function of its own, so that nothing it changes is
lost sight of: each variable that the function uses is put back. Ops that are
noticed outside (print, Python, tables, queues, files) are left out. Optimizers
update nothing, layers that normalize over the batch use their moving
statistics. A step that Keras runs eagerly runs eagerly here too.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import (
    graphs,
    keras_config,
    keras_losses,
)
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import hooks
from keras_allreduce.one_device.hooks import shadowed
from keras_allreduce.one_device.recorder import ValueRecorder, WholeBatch
from keras_allreduce.one_device.reduction import Key
from keras_allreduce.one_device.replica import Replica
from keras_allreduce.one_device.shared_state import PythonNumbers

# Elements of all gradients of a call that are looked at.
_ELEMENTS = 2**15
# How far a counter is moved on. One step later it can be divided by much.
_STEPS = 9_999


class Trial:
    """A step that runs as one device would, on a part of an example.

    Args:
        model: The model whose step it is.
        step: The step; gets a batch, returns logs.
        strategy: The strategy of the model.

    Attributes:
        keys: The keys of the values that a call returns.
        communicates: Whether the step sums or gathers over replicas itself.
        ends, terms: See `ValueRecorder`.
        is_random: Whether it draws random numbers; `None` if that is not known,
            as of a step that runs eagerly.
    """

    def __init__(
        self,
        model: keras.Model,
        step: Callable[[Any], Any],
        strategy: tf.distribute.Strategy,
    ):
        self._model = model
        self._step = step
        self._strategy = strategy
        self._device = strategy.extended.worker_devices[0]
        self._settings = keras_config.settings()
        # A loss may be measured while Keras goes through what layers added.
        self._losses = keras_losses.added_losses(model)
        self._pythons_random = random.getstate(), np.random.get_state()
        self._numbers = PythonNumbers(model)
        self._batch: Any = None
        self._run: Any = None
        self._state = _State()
        self.keys: list[Key] = []
        self.communicates = False
        self.ends: dict[Key, str | None] = {}
        self.terms: dict[Key, Key] = {}
        self.is_random: bool | None = None

    def __call__(self, batch: Any, rows: slice) -> list[np.ndarray]:
        """The values of a batch.

        Args:
            batch: The whole example first, then parts of it.
            rows: Which rows of the example it has.
        """
        if self._batch is None:
            self._batch = WholeBatch(rows.stop, self._device)
        if self._run is None:
            keras_config.take_over(self._settings)
            self._run = (
                self._eager() if self._is_eager() else self._traced(batch)
            )
        count = rows.stop - rows.start
        share = tf.constant(count / self._batch.size, tf.float32)
        results = self._run(batch, share, tf.constant(rows.start))
        self._state.put_back()
        self._numbers.put_back()
        return [_some_of(each.numpy()) for each in results]

    def move(self, *, counters: bool) -> bool:
        """Moves the state of the step, so that the next calls start from there.

        A term that is 0 at first, and a moving average that starts from 0,
        show their kind then.

        Args:
            counters: Whether counters of steps are moved too, far on.

        Returns:
            Whether there is anything to move.
        """
        trained = {
            id(part.handle)
            for variable in self._model.trainable_variables
            for part in _parts(variable)
        }
        with tf.init_scope():
            return self._state.move(trained, counters=counters)

    def put_back(self) -> None:
        """Puts back all that the step has changed."""
        with tf.init_scope():
            self._state.restore()
        self._numbers.put_back()
        keras_losses.put_back_losses(self._model, self._losses)
        random.setstate(self._pythons_random[0])
        np.random.set_state(self._pythons_random[1])

    def _keep(self, variable: Any) -> None:
        """A variable is about to be assigned; a trace tells which by itself."""
        if tf.executing_eagerly():
            for part in _parts(variable):
                self._state.add(part.handle, part.dtype)

    def _is_eager(self) -> bool:
        return bool(getattr(self._model, "run_eagerly", False))

    def _traced(self, batch: Any) -> Callable[..., list[tf.Tensor]]:
        with self._as_replica():
            traced = tf.function(
                tf.autograph.experimental.do_not_convert(self._record),
                autograph=False,
            ).get_concrete_function(
                keras.tree.map_structure(_spec, batch),
                tf.TensorSpec([]),
                tf.TensorSpec([], tf.int32),
            )
        for handle, dtype in graphs.captured_variables(traced):
            if not self._batch.owns(handle):
                self._state.add(handle, dtype)
        self.is_random = graphs.is_random(traced)
        return graphs.without_outside_effects(traced)

    def _eager(self) -> Callable[..., list[tf.Tensor]]:
        for variable in (
            *keras_compat.all_variables(self._model),
            *self._model.metrics_variables,
        ):
            for part in _parts(variable):
                self._state.add(part.handle, part.dtype)

        def run(*arguments: Any) -> list[tf.Tensor]:
            with self._as_replica():
                return self._record(*arguments)

        return run

    @contextlib.contextmanager
    def _as_replica(self) -> Iterator[None]:
        with (
            self._strategy.scope(),
            tf.distribute.ReplicaContext(self._strategy, 0),
            tf.device(self._device),
        ):
            yield

    def _record(
        self, batch: Any, share: tf.Tensor, start: tf.Tensor
    ) -> list[tf.Tensor]:
        self._batch.begin(share, start)
        recorder = ValueRecorder(self._model, self._batch, self._keep)
        this = Replica(share=share, recorder=recorder)
        with (
            hooks.taking_part(recorder, this),
            _moving_statistics_used(self._model),
        ):
            recorder.record_logs(self._step(batch))
            recorder.record_states()
        found = recorder.of_graph(this.graph)
        self.keys[:] = found
        self.communicates = recorder.communicates
        self.ends, self.terms = recorder.ends, recorder.terms
        return list(found.values())


class _State:
    """The values of all variables that a step uses."""

    def __init__(self) -> None:
        self._handles: dict[int, Any] = {}
        self._original: dict[int, tf.Tensor] = {}
        self._current: dict[int, tf.Tensor] = {}

    def add(self, handle: Any, dtype: tf.DType) -> None:
        """The step uses a variable, which has its value from before it."""
        if id(handle) not in self._handles:
            value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
            self._handles[id(handle)] = handle
            self._original[id(handle)] = self._current[id(handle)] = value

    def move(self, but: set[int], *, counters: bool) -> bool:
        """Moves all but some variables away from their original values."""
        rng = np.random.default_rng(0)
        moved = dict(self._original)
        for key, value in self._original.items():
            if key not in but and not _is_seed(value):
                moved[key] = _moved(value, rng, counters=counters)
        is_new = any(moved[key] is not self._current[key] for key in moved)
        self._current = moved
        self.put_back(seeds_too=True)
        return is_new

    def put_back(self, *, seeds_too: bool = False) -> None:
        """Assigns the values; without seeds, the next round draws others."""
        for key, value in self._current.items():
            if seeds_too or not _is_seed(value):
                tf.raw_ops.AssignVariableOp(
                    resource=self._handles[key], value=value
                )

    def restore(self) -> None:
        """Assigns the original values."""
        self._current = dict(self._original)
        self.put_back(seeds_too=True)


def _moved(value: tf.Tensor, rng: Any, *, counters: bool) -> tf.Tensor:
    """A value a little larger; a counter far on; others as they are."""
    if value.dtype.is_integer and not value.shape.rank and value.dtype.size > 2:
        return value + _STEPS if counters else value
    if not value.dtype.is_floating:
        return value
    number = tf.cast(value, tf.float64).numpy()
    by = rng.uniform(0.05, 0.25, number.shape) * (0.5 + np.abs(number))
    return tf.cast(number + by, value.dtype)


def _parts(variable: Any) -> list[Any]:
    """The first replica's part of a variable, of Keras or TensorFlow."""
    value = getattr(variable, "value", variable)
    if callable(value):
        value = variable
    if isinstance(value, tf.distribute.DistributedValues):
        value = value.values[0]
    return [value] if hasattr(value, "handle") else []


def _some_of(value: np.ndarray) -> np.ndarray:
    return value[:: max(1, len(value) // _ELEMENTS)]


def _is_seed(value: tf.Tensor) -> bool:
    """Whether a variable is the state of a random generator."""
    return value.dtype in (tf.uint32, tf.uint64) or (
        value.dtype == tf.int64 and value.shape.rank == 1
    )


@contextlib.contextmanager
def _moving_statistics_used(model: keras.Model) -> Iterator[None]:
    """No layer normalizes by the statistics of the batch in the block."""

    def shadow(call: Callable[..., Any]) -> Callable[..., Any]:
        def without_training(
            inputs: Any,
            training: Any = None,  # noqa: ARG001 - Keras passes it.
            **kwargs: Any,
        ) -> Any:
            return call(inputs, training=False, **kwargs)

        return without_training

    with contextlib.ExitStack() as stack:
        for layer in keras_compat.batch_statistics_layers(model):
            stack.enter_context(shadowed(layer, {"call": shadow(layer.call)}))
        yield


def _spec(value: Any) -> Any:
    """The type of a part of a batch, with any number of samples."""
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) == 0:
        return tf.convert_to_tensor(value) if value is not None else None
    shape = [None, *shape[1:]]
    if isinstance(value, tf.SparseTensor):
        return tf.SparseTensorSpec(shape, value.dtype)
    if isinstance(value, tf.RaggedTensor):
        return tf.RaggedTensorSpec(
            shape, value.dtype, value.ragged_rank, value.row_splits.dtype
        )
    return tf.TensorSpec(shape, value.dtype)
