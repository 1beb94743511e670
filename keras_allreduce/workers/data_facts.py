"""States what must be the same of the data that is passed to Keras.

Every worker reads the data whole and in the same order, and trains on its part
of each batch. Where that is not so, some samples are trained twice and others
never, and nothing shows it.
"""

import random
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import datasets, keras_calls
from keras_allreduce.workers.checksum import checksum, combined

REMEDY = (
    "Every worker reads the same data in the same order, and takes its part "
    "of each batch: pass the same on all workers. For data that you have "
    "divided yourself pass a `tf.data.Dataset` with `AutoShardPolicy.OFF`."
)

_MOST_ROWS = 64
_MOST_BYTES = 2**20


def steps_of_epochs(asked: int | None, batches: int | None) -> str:
    """How many steps Keras makes in the epochs of `fit`, as a message says it.

    Keras counts batches across epochs: a data set of 5 that is asked for 2
    steps gives 2, 2 and 1, and begins again.

    Args:
        asked: `steps_per_epoch`, or `None`.
        batches: Batches of the data set, or `None` if not known.
    """
    if asked is None:
        return "not known" if batches is None else str(batches)
    if batches is None or batches % asked == 0:
        return str(asked)
    if batches < asked:
        return str(batches)
    number = batches // asked + 1
    return f"{asked}, but {batches % asked} in epoch {number}"


def facts(epoch_iterator: Any, dataset: Any) -> dict[str, str]:
    """What must be the same of the data of one call.

    Args:
        epoch_iterator: Keras's, of `fit`, `evaluate` or `predict`.
        dataset: The `tf.data.Dataset` that Keras has made of the data.
    """
    arrays = keras_calls.arrays(epoch_iterator)
    if arrays is not None:
        lengths = {len(array) if array.ndim else 0 for array in arrays}
        return {
            "number of samples": str(max(lengths, default=0)),
            "arrays": combined(map(sampled_checksum, arrays)),
        }
    if datasets.is_read_whole(dataset):
        seeds = datasets.seeds_of_shuffles(dataset)
        if any(seed == (0, 0) for seed in seeds):
            _warn_of_order("shuffles without a seed")
        elif seeds:
            return {"seeds of shuffles": str(seeds)}
        if not datasets.is_deterministic(dataset):
            _warn_of_order("is not deterministic (`deterministic=False`)")
    return {}


def checksum_of_first_batch(epoch_iterator: Any) -> str:
    """A checksum of the first batch of a generator; of other data, of none."""
    leaves = keras.tree.flatten(keras_calls.first_batch(epoch_iterator))
    return combined(
        sampled_checksum(leaf if hasattr(leaf, "shape") else np.asarray(leaf))
        for leaf in leaves
    )


def warn_of_first_batches() -> None:
    """Warns that generators of the workers begin with different batches."""
    _warn_of_order(
        "comes from a generator, whose first batch is not the same on all "
        "workers"
    )


def sampled_checksum(array: Any) -> str:
    """A checksum of the shape, the dtype and up to 64 rows of an array.

    Args:
        array: A `numpy.ndarray`, `tf.Tensor` or anything with a shape.
    """
    about = f"{array.shape} {array.dtype if hasattr(array, 'dtype') else ''}"
    kind = combined([about])
    length = int(array.shape[0]) if len(array.shape) else 0
    if not length or not isinstance(array, np.ndarray | tf.Tensor):
        return kind
    row = np.asarray(array[:1])
    rows = max(2, min(_MOST_ROWS, _MOST_BYTES // max(1, row.nbytes)))
    chosen = np.unique(np.linspace(0, length - 1, rows).astype(np.int64))
    part = (
        array[chosen]
        if isinstance(array, np.ndarray)
        else tf.gather(array, chosen).numpy()
    )
    return combined([kind, checksum(np.asarray(part))])


def state_of_random() -> str:
    """A checksum of the state of Python's `random`."""
    return combined([repr(random.getstate())])


def _warn_of_order(why: str) -> None:
    warnings.warn(
        "All workers must read the same samples in the same order, or some "
        "are trained twice and others never. Received: a data set that "
        f"{why}. Pass `seed=` to `shuffle`, call "
        "`keras.utils.set_random_seed` with the same number on all workers "
        "before you make the data, or divide the data yourself and set "
        "`AutoShardPolicy.OFF`.",
        stacklevel=2,
    )
