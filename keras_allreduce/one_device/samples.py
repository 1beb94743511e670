"""A few samples of a model's training data, and the user's code run on them."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat.datasets import sparse_rows
from keras_allreduce.one_device import facts

SAMPLES = 16
"""How many samples are kept; a measurement runs on two halves of them."""

_MOST_ELEMENTS = 2**22


@dataclass(frozen=True)
class Failure:
    """The user's code failed on input that it may not expect.

    Attributes:
        reason: The kind and the first line of the error.
    """

    reason: str


def remember(model: keras.Model, batch: Any) -> None:
    """Keeps the first samples of a batch that Keras has shown.

    Args:
        model: The model that is to be trained on it.
        batch: Nested structure of arrays and tensors, samples first.
    """
    try:
        facts.of(model).samples = keras.tree.map_structure(
            _first_samples, batch
        )
    except (TypeError, ValueError, tf.errors.OpError):
        return  # Not samples: others are remembered, or made up.


def like(model: keras.Model, data: Any) -> Any:
    """A few samples with the structure, dtypes and inner shapes of `data`.

    Those that were remembered, if they are like it; else made up: a mean over
    samples is one of any samples.

    Args:
        model: The model.
        data: Nested structure of tensors, of one replica.
    """
    known = facts.of(model).samples
    if known is not None and _are_alike(known, data):
        return known
    return keras.tree.map_structure(made_up, data)


def parts(batch: Any) -> list[tuple[Any, slice]]:
    """An even number of samples, and the first and second half of them.

    Returns:
        Each with the place that its samples have among all.
    """
    sizes = [
        size
        for size in map(_size, keras.tree.flatten(batch))
        if size is not None
    ]
    count = min(sizes, default=0)
    if count < 2:
        batch = keras.tree.map_structure(_twice, batch)
        count = 2
    half = count // 2

    def part(start: int, end: int) -> Any:
        def rows(value: Any) -> Any:
            return value if _size(value) is None else _rows(value, start, end)

        return keras.tree.map_structure(rows, batch)

    places = [slice(0, 2 * half), slice(0, half), slice(half, 2 * half)]
    return [(part(each.start, each.stop), each) for each in places]


def _size(value: Any) -> int | None:
    """Number of samples; `None` for values that all samples share."""
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) == 0 or shape[0] is None:
        return None
    return int(shape[0])


def _rows(value: Any, start: int, end: int) -> Any:
    if isinstance(value, tf.SparseTensor):
        return sparse_rows(value, start, end - start)
    return value[start:end]


def _twice(value: Any) -> Any:
    if _size(value) is None:
        return value
    if isinstance(value, tf.SparseTensor):
        return tf.sparse.concat(0, [value, value])
    return tf.concat([value, value], axis=0)


def _first_samples(value: Any) -> Any:
    if value is None or _size(value) is None:
        return value
    if not isinstance(value, tf.SparseTensor | tf.RaggedTensor):
        value = tf.convert_to_tensor(value[: _count(value)])
        if value.dtype.is_floating and not np.any(value.numpy()):
            # Keras was shown zeros instead of data that can be read only once.
            raise ValueError
        return value
    return _rows(value, 0, min(SAMPLES, int(value.shape[0])))


def _count(value: Any) -> int:
    """How many samples are kept: fewer of large ones."""
    of_one = max(1, int(np.prod(value.shape[1:])))
    return min(SAMPLES, max(2, _MOST_ELEMENTS // of_one))


def _are_alike(known: Any, data: Any) -> bool:
    try:
        keras.tree.assert_same_structure(known, data)
    except (TypeError, ValueError):
        return False
    return all(
        getattr(one, "dtype", None) == getattr(other, "dtype", None)
        and _inner(one).is_compatible_with(_inner(other))
        for one, other in zip(
            keras.tree.flatten(known), keras.tree.flatten(data), strict=True
        )
    )


def _inner(value: Any) -> tf.TensorShape:
    shape = tf.TensorShape(getattr(value, "shape", None))
    return shape[1:] if shape.rank else shape


def made_up(value: Any, seed: int = 0, sign: int = 1) -> Any:
    """Samples of the dtype and inner shape of a tensor.

    Args:
        value: The tensor; other values stay as they are.
        seed: Of the numbers.
        sign: Of floating numbers.
    """
    if not isinstance(value, tf.Tensor) or value.shape.rank is None:
        return value
    inner = [dim or 8 for dim in value.shape[1:].as_list()]
    shape = [SAMPLES // 2, *inner] if value.shape.rank else []
    rng = np.random.default_rng(seed)
    with tf.init_scope():  # Not in a graph that is being traced.
        if value.dtype.is_floating or value.dtype.is_complex:
            return tf.cast(sign * rng.uniform(size=shape), value.dtype)
        if value.dtype == tf.string:
            return tf.constant("a", shape=shape)
        return tf.cast(rng.integers(0, 2, shape), value.dtype)


def probe(
    run: Callable[[Any, slice], Any], example: Any
) -> tuple[Any, Any, Any] | Failure:
    """Calls the user's code on a few samples, and on each half of them.

    A judge compares the three results: `measurement` whether a step's loss is a
    mean or a sum, `metrics` how the state of a metric is reduced.

    Args:
        run: Gets a structure like `example`, and which of the samples it has.
            Called in a thread of its own, where no replica, graph or tape
            takes part.
        example: Nested structure of tensors, samples first.

    Returns:
        The results for all samples, for the first half and for the second.
    """

    def in_thread() -> tuple[Any, Any, Any]:
        whole, first, second = parts(example)
        return run(*whole), run(*first), run(*second)

    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(in_thread).result()
    except Exception as error:  # noqa: BLE001 - The user's code runs here.
        return Failure(f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The first line of an error that gives its reason."""
    lines = map(str.strip, str(error).splitlines())
    return next((line for line in lines if not _NOTHING.match(line)), "")


# What TensorFlow puts before an error of a graph.
_NOTHING = re.compile(
    r"$|Graph execution error|Detected at node|<stack traces|File |"
    r"\d+ root error"
)
