"""Measures whether what a step differentiates and shows is a mean or a sum.

The step runs on a few samples and on their two halves, as one device would,
and `nature` compares what came out. It is traced into a function of its own,
so that nothing it changes is lost sight of: each variable that the function
uses is put back. Optimizers update nothing, layers that normalize over the
batch use their moving statistics.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import gradient_tape, keras_threads
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import (
    first_batch,
    hooks,
    known_natures,
    nature,
)
from keras_allreduce.one_device.natures import Key, Natures
from keras_allreduce.one_device.recorder import ValueRecorder
from keras_allreduce.one_device.replica import Replica
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.one_device.shadowing import shadowed

ROUNDS = 8
"""How often a step with random numbers is measured."""


def natures_of(
    model: keras.Model,
    name: str,
    step: Callable[[Any], Any],
    data: Any,
    strategy: tf.distribute.Strategy,
    replicas: Replicas,
) -> Natures:
    """What a step differentiates and shows, measured unless it is known.

    Args:
        model: The model whose step it is.
        name: The name of the step.
        step: The step; gets a batch, returns logs.
        data: A distributed batch, for its structure.
        strategy: The strategy of the model.
        replicas: Its replicas; all workers go by what the chief finds.
    """
    known = known_natures.find(model, name)
    if known is not None:
        return known
    local = keras.tree.map_structure(
        lambda leaf: (replicas.local_values(leaf) or (leaf,))[0], data
    )
    own = measure(model, step, local, strategy)
    found = Natures.from_json(replicas.group.broadcast_text(own.to_json()))
    known_natures.keep(model, name, found)
    return found


def measure(
    model: keras.Model,
    step: Callable[[Any], Any],
    data: Any,
    strategy: tf.distribute.Strategy,
) -> Natures:
    """Measures a step, without a trace of it.

    Args:
        model: The model whose step it is.
        step: The step; gets a batch, returns logs.
        data: A batch of one replica, for its structure.
        strategy: The strategy of the model.

    Returns:
        What was found, or why nothing was.
    """
    states = random.getstate(), np.random.get_state()
    settings = keras_threads.settings()

    def in_thread() -> Natures:
        keras_threads.take_over(settings)
        with (
            strategy.scope(),
            tf.distribute.ReplicaContext(strategy, 0),
            tf.device(strategy.extended.worker_devices[0]),
        ):
            return _measured(model, step, data)

    try:
        # A thread of its own is in no replica, graph or tape.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(in_thread).result()
    except Exception as error:  # noqa: BLE001 - The user's code runs here.
        lines = str(error).strip().splitlines() or [""]
        return Natures(failure=f"{type(error).__name__}: {lines[0]}")
    finally:
        keras_compat.clear_losses(model)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _measured(
    model: keras.Model,
    step: Callable[[Any], Any],
    data: Any,
) -> Natures:
    whole, *halves = first_batch.halves(first_batch.like(model, data))
    keys: list[Key] = []

    @tf.autograph.experimental.do_not_convert
    def run(batch: Any, share: tf.Tensor) -> list[tf.Tensor]:
        recorder = ValueRecorder(model)
        this = Replica(share=share, recorder=recorder)
        with (
            hooks.taking_part(recorder, this),
            _moving_statistics_used(model),
        ):
            recorder.record_logs(step(batch))
            recorder.record_states()
        found = recorder.of_graph(this.graph)
        keys[:] = found
        return list(found.values())

    traced = tf.function(run, autograph=False).get_concrete_function(
        keras.tree.map_structure(_spec, whole), tf.TensorSpec([])
    )
    found = _rounds(traced, whole, halves)
    return _natures(keys, found, _tolerance(model))


def _natures(
    keys: Sequence[Key],
    found: Sequence[tuple[list[np.ndarray], list[np.ndarray]]],
    tolerance: float,
) -> Natures:
    """The natures of values, from what `_rounds` has returned."""
    wholes, means = (
        list(zip(*each, strict=True)) for each in zip(*found, strict=True)
    )
    of_state = max(tolerance, nature.STATE)
    return Natures(
        {
            key: nature.measured(
                np.stack(one),
                np.stack(other),
                of_state if key[0] == "state" else tolerance,
            )
            for key, one, other in zip(keys, wholes, means, strict=True)
        }
    )


def _tolerance(model: keras.Model) -> float:
    """Relative difference that is rounding."""
    if keras_compat.computes_in_half_precision(model):
        return nature.HALF_PRECISION
    on_gpus = bool(tf.config.list_logical_devices("GPU"))
    if on_gpus and tf.config.experimental.tensor_float_32_execution_enabled():
        return nature.TF32
    return nature.EXACT


def _rounds(
    traced: Any, whole: Any, halves: Sequence[Any]
) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """What a function gave on a batch, and the mean of that on its halves.

    One pair for each round: two if nothing is random.
    """
    state = _State(traced)

    def values(batch: Any, share: float) -> list[np.ndarray]:
        results = traced(batch, tf.constant(share))
        state.put_back(seeds_too=False)
        return [each.numpy() for each in results]

    found: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
    try:
        while len(found) < ROUNDS:
            one = values(whole, 1.0)
            first, second = (values(half, 0.5) for half in halves)
            means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
            found.append((one, means))
            if len(found) == 2 and _are_equal(*found):
                break
    finally:
        state.put_back(seeds_too=True)
    return found


class _State:
    """The values of all variables that a function uses.

    Args:
        traced: A concrete function.
    """

    def __init__(self, traced: Any):
        self._values = [
            (handle, tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype))
            for handle, dtype in gradient_tape.captured_variables(traced)
        ]

    def put_back(self, *, seeds_too: bool) -> None:
        """Assigns the values; without seeds, the next round draws others."""
        for handle, value in self._values:
            if seeds_too or not _is_seed(value):
                tf.raw_ops.AssignVariableOp(resource=handle, value=value)


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


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two rounds gave the same, so that nothing is random."""
    return all(
        np.array_equal(a, b, equal_nan=True)
        for values in zip(one, other, strict=True)
        for a, b in zip(*values, strict=True)
    )
