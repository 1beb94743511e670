"""Fingerprints of the data that is passed to Keras.

Every worker reads the data whole and in the same order, and trains on its part
of each batch. Where that is not so, some samples are trained twice and others
never, and nothing shows it.
"""

import pickle
import random
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import datasets, keras_calls
from keras_allreduce.workers.fingerprint import Fingerprint, checksum, combined

REMEDY = (
    "Every worker reads the same data in the same order, and takes its part "
    "of each batch: pass the same on all workers. For data that you have "
    "divided yourself pass a `tf.data.Dataset` with `AutoShardPolicy.OFF`."
)

FIRST_BATCH, TARGETS = "first batch", "its targets"
"""Names of what `of_batch` returns."""

SHARDS = "shards"
"""Name of what `shards` returns."""

_MOST_ROWS = 64
_MOST_BYTES = 2**20
_MOST_VALUES = 4096


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


def facts_of(epoch_iterator: Any, dataset: Any) -> dict[str, str]:
    """Facts of the data of one call that must be the same.

    Args:
        epoch_iterator: Keras's, of `fit`, `evaluate` or `predict`.
        dataset: The `tf.data.Dataset` that Keras has made of the data.
    """
    arrays = keras_calls.arrays(epoch_iterator)
    if arrays is not None:
        lengths = {len(array) if array.ndim else 0 for array in arrays}
        return {
            "number of samples": str(max(lengths, default=0)),
            "batch size": str(keras_calls.batch_size_of_arrays(epoch_iterator)),
            "arrays": combined(map(sampled_checksum, arrays)),
        }
    if not datasets.is_read_whole(dataset):
        return {}
    facts = {"batch size": str(datasets.batch_sizes(dataset))}
    seeds = datasets.seeds_of_shuffles(dataset)
    if any(seed == (0, 0) for seed in seeds):
        _warn_of_order("shuffles without a seed")
    elif seeds:
        return facts | {"seeds of shuffles": str(seeds)}
    if not datasets.is_deterministic(dataset):
        _warn_of_order("is not deterministic (`deterministic=False`)")
    return facts


def shards(dataset: Any) -> dict[str, str]:
    """The `shard`s of a data set that is divided again, for `are_shards`.

    Args:
        dataset: The `tf.data.Dataset` that Keras has made of the data.
    """
    return {SHARDS: str(datasets.shards_of(dataset))}


def are_shards(found: Sequence[Fingerprint]) -> bool:
    """Whether each worker has taken another shard of its data.

    Args:
        found: The fingerprints of all workers, which offer `shards`.
    """
    return len({each.offer.get(SHARDS) for each in found}) > 1


def warn_of_shards() -> None:
    """Warns that a part of each worker's shard is trained on by nobody."""
    warnings.warn(
        "All workers must read the same samples in the same order, and take "
        "their part of each batch. Received: a data set of which each worker "
        "has taken another part with `shard`, so that most of each part is "
        "never read. Remove `shard`, or set `AutoShardPolicy.OFF` in "
        "`with_options`.",
        stacklevel=2,
    )


def of_batch(batch: Any) -> dict[str, str]:
    """Checksums of a batch and of its targets.

    Args:
        batch: As a generator or a `PyDataset` makes it; `None`: there is none.

    Returns:
        For `are_other_samples`; of no targets, or of only one, it is empty.
    """
    targets = None
    if isinstance(batch, tuple) and len(batch) > 1:
        targets = batch[1]
    has_several = any(
        _has_several(_as_array(leaf))
        for leaf in keras.tree.flatten(targets)
        if leaf is not None
    )
    return {
        FIRST_BATCH: "" if batch is None else _of_leaves(batch),
        TARGETS: _of_leaves(targets) if has_several else "",
    }


def are_other_samples(found: Sequence[Fingerprint]) -> bool:
    """Whether first batches of the workers are of other samples.

    Where inputs alone differ they may be the same, changed at random.

    Args:
        found: The fingerprints of all workers, which offer `of_batch`.
    """
    batches = {each.offer.get(FIRST_BATCH, "") for each in found}
    targets = {each.offer.get(TARGETS, "") for each in found}
    if len(batches) == 1 or "" in batches:
        return False
    return len(targets) > 1 or targets == {""}


def _of_leaves(batch: Any) -> str:
    leaves = keras.tree.flatten(batch)
    return combined(
        sampled_checksum(leaf if hasattr(leaf, "shape") else _as_array(leaf))
        for leaf in leaves
    )


def _has_several(array: Any) -> bool:
    """Whether the values of an array differ, as far as its first ones say."""
    values = array.reshape(-1)[:_MOST_VALUES]
    return bool(np.any(values != values[:1]))


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
        leaf = getattr(leaf, "flat_values", None) or leaf.values
    return np.asarray(leaf)


def warn_of_first_batches() -> None:
    """Warns that first batches of the workers are of other samples."""
    _warn_of_order(
        "comes from a generator or a `PyDataset` whose first batch is not the "
        "same on all workers"
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


def state_of_unseeded_numpy() -> str:
    """A checksum of the state of `numpy.random`; empty if somebody seeds it."""
    try:
        generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        is_seeded = generator.seed_seq is None
    except AttributeError:  # NumPy before 1.25 does not tell.
        return ""
    state = pickle.dumps(generator.state)
    return "" if is_seeded else combined([state.hex()])


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
