"""Finds losses whose value for a sample depends on the rest of the batch.

A loss with in-batch negatives returns one value per sample, as Keras wants it,
but a replica has fewer negatives than one device. A few made-up samples tell:
is the loss of the first half of them the first half of the losses of all?
"""

import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

from keras_allreduce.one_device import first_batch, warn

_checked: weakref.WeakSet[Any] = weakref.WeakSet()


def check(model: keras.Model, loss: Any, y_true: Any, y_pred: Any) -> None:
    """Warns, once, if `loss` compares the samples of a batch.

    Args:
        model: The model.
        loss: A `keras.losses.Loss` that returns one value per sample.
        y_true: What it is called with, for shapes and dtypes.
        y_pred: Likewise.
    """
    if loss in _checked:
        return
    _checked.add(loss)
    try:
        # A thread of its own is in no replica, graph or tape.
        with ThreadPoolExecutor(1) as thread:
            differs = thread.submit(_compares, loss, y_true, y_pred).result()
    except Exception:  # noqa: BLE001 - The user's code may raise anything.
        return
    if differs:
        warn.of_comparing(model, f"loss {loss.name!r}", "of made-up samples")


def _compares(loss: Any, y_true: Any, y_pred: Any) -> bool:
    pair = keras.tree.map_structure(
        lambda part: keras.ops.convert_to_tensor(
            first_batch.made_up(part), dtype=loss.dtype
        ),
        (y_true, y_pred),
    )
    _, half, _ = first_batch.halves(pair)
    whole = np.asarray(loss.call(*pair))
    first, again = (np.asarray(loss.call(*half)) for _ in range(2))
    if not np.array_equal(first, again, equal_nan=True):
        return False  # Random.
    return not np.allclose(
        whole[: len(first)], first, rtol=1e-3, atol=1e-6, equal_nan=True
    )
