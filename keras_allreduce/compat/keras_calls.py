"""Assumptions about Keras's `fit`, `evaluate` and `predict` and their data.

Keras tells a strategy neither which call distributes a data set nor when an
epoch begins. Both are read here: the call in the frames of the caller, the
epoch by the data adapter, whose `on_epoch_begin` Keras calls.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# The arrays that were passed to `fit`, and whether it shuffles them.
from keras.src.trainers.data_adapters.array_data_adapter import (
    ArrayDataAdapter as _ArrayDataAdapter,
)

# How Keras makes tensors of arrays, in its own dtypes.
from keras.src.trainers.data_adapters.array_slicing import (
    convert_to_sliceable as _convert_to_sliceable,
)

# What calls `__getitem__` of a `PyDataset`, and looks at each batch of it.
from keras.src.trainers.data_adapters.py_dataset_adapter import (
    PyDatasetAdapter as _PyDatasetAdapter,
)

from keras_allreduce.compat.frames import calling_frames

_CALLS = ("fit", "evaluate", "predict")

# Calls of Keras go through a few decorators and iterators.
_FRAMES = 40

# One of them makes the batches of each pass.
_GENERATORS_OF_PY_DATASETS = (
    "_finite_generator",
    "_infinite_generator",
    "_finite_enqueuer_generator",
    "_infinite_enqueuer_generator",
)


@dataclass(frozen=True)
class KerasCall:
    """A call of `fit`, `evaluate` or `predict` that runs in this thread.

    Attributes:
        name: Name of the method; `"evaluate in fit"` of the validation.
        model: The model.
        epoch: Number of the epoch of `fit` and of its last one, both from 1;
            `None` before the first.
        is_first_epoch: Whether it is the first that this `fit` trains.
        epoch_iterator: Keras's iterator over the epochs, if it reads one now.
    """

    name: str
    model: keras.Model
    epoch: tuple[int, int] | None
    is_first_epoch: bool
    epoch_iterator: Any

    @property
    def is_nested(self) -> bool:
        """Whether it runs within another, as the validation of `fit`."""
        return " in " in self.name

    def __str__(self) -> str:
        if self.epoch is None:
            return self.name
        number, last = self.epoch
        return f"{self.name}, epoch {number} of {last}"


def current_call() -> KerasCall | None:
    """The call of Keras that runs in this thread, or `None`.

    To be called where a strategy distributes a data set, or an epoch begins.
    """
    names: list[str] = []
    model, epoch, is_first, epoch_iterator = None, None, False, None
    for frame in calling_frames(_FRAMES):
        owner = frame.f_locals.get("self")
        if epoch_iterator is None and hasattr(owner, "enumerate_epoch"):
            epoch_iterator = owner
        name = frame.f_code.co_name
        if name not in _CALLS or not isinstance(owner, keras.Model):
            continue
        if name in names or not _is_keras(frame):
            continue
        names.append(name)
        model = model or owner
        if name == "fit" and "epoch" in frame.f_locals:
            local = frame.f_locals
            epoch = local["epoch"] + 1, local["epochs"]
            is_first = local["epoch"] == local.get("initial_epoch")
    if model is None:
        return None
    return KerasCall(" in ".join(names), model, epoch, is_first, epoch_iterator)


def is_py_dataset(epoch_iterator: Any) -> bool:
    """Whether a `PyDataset` was passed to Keras."""
    adapter = getattr(epoch_iterator, "data_adapter", None)
    return isinstance(adapter, _PyDatasetAdapter)


def on_first_batches(epoch_iterator: Any, tell: Callable[[Any], None]) -> None:
    """Has the first batch told of each pass over a `PyDataset`.

    In the thread that makes it, which is a moment before Keras reads it; also
    of the pass that Keras begins only to see shapes.

    Args:
        epoch_iterator: See `KerasCall`; other data is never told.
        tell: Called with the batch.
    """
    adapter = getattr(epoch_iterator, "data_adapter", None)
    if not isinstance(adapter, _PyDatasetAdapter):
        return
    # The adapter holds the data; a cycle would keep it until it is collected.
    owner = weakref.ref(adapter)
    own_class: Any = type(adapter)

    def told(name: str) -> Callable[[], Iterator[Any]]:
        def batches() -> Iterator[Any]:
            for number, batch in enumerate(getattr(own_class, name)(owner())):
                if not number:
                    tell(batch)
                yield batch

        return batches

    for name in _GENERATORS_OF_PY_DATASETS:
        vars(adapter)[name] = told(name)


def on_epochs(
    epoch_iterator: Any, begin: Callable[[], None], end: Callable[[], None]
) -> bool:
    """Calls `begin` and `end` with each epoch, until the call of Keras ends.

    Not for the batch that Keras takes first only to see its shapes.

    Args:
        epoch_iterator: See `KerasCall`.
        begin: Called before the first batch of the epoch is read.
        end: Called after the last batch, unless training was stopped.

    Returns:
        Whether this Keras tells when an epoch begins.
    """
    adapter = getattr(epoch_iterator, "data_adapter", None)
    if not hasattr(adapter, "on_epoch_begin"):
        return False
    # The adapter holds the data; a cycle would keep it until it is collected.
    owner = weakref.ref(adapter)
    own_class: Any = type(adapter)

    def on_epoch_begin() -> None:
        if not _asks_for_shapes():
            begin()
        own_class.on_epoch_begin(owner())

    def on_epoch_end() -> None:
        if not _asks_for_shapes():
            end()
        own_class.on_epoch_end(owner())

    vars(adapter)["on_epoch_begin"] = on_epoch_begin
    vars(adapter)["on_epoch_end"] = on_epoch_end
    return True


def arrays(epoch_iterator: Any) -> list[Any] | None:
    """The arrays that were passed to Keras; `None` if it was another kind."""
    adapter = getattr(epoch_iterator, "data_adapter", None)
    if not isinstance(adapter, _ArrayDataAdapter):
        return None
    leaves = keras.tree.flatten(getattr(adapter, "_inputs", None))
    return [leaf for leaf in leaves if leaf is not None]


def batch_size_of_arrays(epoch_iterator: Any) -> int | None:
    """Samples in a batch of arrays; `None` of all other data."""
    adapter = getattr(epoch_iterator, "data_adapter", None)
    if not isinstance(adapter, _ArrayDataAdapter):
        return None
    return int(adapter._batch_size)


def first_batch(epoch_iterator: Any) -> Any:
    """The first batch of a Python generator; `None` of all other data.

    Keras has taken it to see its shapes, and gives it out again.
    """
    adapter = getattr(epoch_iterator, "data_adapter", None)
    batches = getattr(adapter, "_first_batches", None)
    return batches[0] if batches else None


@dataclass(frozen=True)
class ShuffledArrays:
    """Arrays that Keras is to shuffle in every epoch.

    Attributes:
        tensors: Structure of a batch, of whole tensors.
        num_samples: Length of each.
        batch_size: Samples in a batch.
    """

    tensors: Any
    num_samples: int
    batch_size: int


def shuffled_arrays(epoch_iterator: Any) -> ShuffledArrays | None:
    """The arrays that Keras shuffles as a whole; `None` if it does not.

    `None` too for sparse and ragged ones, and with `shuffle="batch"`.
    """
    adapter = getattr(epoch_iterator, "data_adapter", None)
    if not isinstance(adapter, _ArrayDataAdapter) or not adapter._shuffle:
        return None
    dense = keras.tree.lists_to_tuples(
        _convert_to_sliceable(adapter._inputs, target_backend="tensorflow")
    )
    if adapter._shuffle == "batch" or not all(
        leaf is None or isinstance(leaf, np.ndarray | tf.Tensor)
        for leaf in keras.tree.flatten(dense)
    ):
        return None
    tensors = keras.tree.map_structure(
        lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), dense
    )
    return ShuffledArrays(tensors, adapter._num_samples, adapter._batch_size)


def shuffles_in_python(epoch_iterator: Any) -> bool:
    """Whether Keras shuffles a `PyDataset`, by Python's own `random`."""
    adapter = getattr(epoch_iterator, "data_adapter", None)
    return bool(
        getattr(adapter, "shuffle", False)
        and not isinstance(adapter, _ArrayDataAdapter)
    )


def path_of_new_variable() -> str | None:
    """Path of the variable that Keras is making; `None` if it is not Keras."""
    for frame in calling_frames(_FRAMES):
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.Variable):
            return str(owner.path)
    return None


def _asks_for_shapes() -> bool:
    return any(
        frame.f_code.co_name == "_maybe_symbolic_build"
        for frame in calling_frames(_FRAMES)
    )


def _is_keras(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("keras.")
