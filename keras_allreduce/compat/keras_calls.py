"""Assumptions about Keras's `fit`, `evaluate` and `predict` and their data.

One value per thread says which call runs, which step of a model, and which
variable is made. `keras_door.py` sets it where Keras enters; the epochs of a
data set are those of its adapter, whose `on_epoch_begin` Keras calls.
"""

import contextlib
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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

from keras_allreduce.compat import distribute

# On an error that has ended `fit`.
_IN_CALLBACK = "_keras_allreduce_in_callback"

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
        kind: Name of the method; `"evaluate in fit"` of the validation.
        model: The model.
        epoch: Number of the epoch of `fit`, from 1; `None` before the first.
        epochs: Number of the last epoch.
        is_first_epoch: Whether it is the first that this `fit` trains.
        epoch_iterator: Keras's iterator over the epochs, while it is made.
        seen: Further facts that Keras has shown of the call.
    """

    kind: str
    model: keras.Model
    epoch: int | None = None
    epochs: int | None = None
    is_first_epoch: bool = False
    epoch_iterator: Any = None
    seen: list[str] = field(default_factory=list)

    @property
    def is_nested(self) -> bool:
        """Whether it runs within another, as the validation of `fit`."""
        return " in " in self.kind

    @property
    def steps(self) -> tuple[int | None, int | None]:
        """Steps of an epoch that were asked for, and batches of the data set.

        Each `None` if not known. To be called while the iterator is made.
        """
        iterator = self.epoch_iterator
        return iterator.steps_per_epoch, iterator.data_adapter.num_batches

    def __str__(self) -> str:
        if self.epoch is None:
            return self.kind
        return f"{self.kind}, epoch {self.epoch} of {self.epochs}"


_CONSTANTS = {
    keras.initializers.Zeros: "zeros",
    keras.initializers.Ones: "ones",
}


class _Thread(threading.local):
    call: KerasCall | None = None
    metrics_read: list[Any] | None = None
    step: tuple[keras.Model, str] | None = None
    variable: keras.Variable | None = None
    value: Any = None
    initializer: Any = None


_thread = _Thread()


@contextlib.contextmanager
def _with(**values: Any) -> Iterator[None]:
    """This thread has other values in the block."""
    before = {name: getattr(_thread, name) for name in values}
    vars(_thread).update(values)
    try:
        yield
    finally:
        vars(_thread).update(before)


def current_call() -> KerasCall | None:
    """The call of Keras that runs in this thread, or `None`."""
    return _thread.call


@contextlib.contextmanager
def during(kind: str, model: keras.Model) -> Iterator[list[str]]:
    """A call runs in the block; yields the facts that Keras shows of it."""
    outer = _thread.call
    made = KerasCall(kind, model)
    if outer is not None and kind != "fit":
        outer_kinds = [
            each for each in outer.kind.split(" in ") if each != kind
        ]
        made = replace(
            outer,
            kind=" in ".join([kind, *outer_kinds]),
            model=model,
            epoch_iterator=None,
            seen=[],
        )
    try:
        with _with(call=made):
            yield made.seen
    except Exception as error:
        if kind == "fit":
            _tag(error)
        raise


def _tag(error: Exception) -> None:
    """Notes on an error that has ended `fit` whether the script raised it.

    Data is read in other threads, so an error that has passed through no code
    of the script comes from a callback.
    """
    modules = {
        frame.f_globals.get("__name__")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    }
    with contextlib.suppress(AttributeError):  # A class may have slots.
        setattr(error, _IN_CALLBACK, "__main__" not in modules)


def is_raised_in_callback(error: BaseException) -> bool:
    """Whether an error has ended `fit`, and is not of the script's own code.

    Only the `fit` of models under our strategies is known.
    """
    return bool(getattr(error, _IN_CALLBACK, False))


def running_step(
    model: keras.Model, name: str
) -> contextlib.AbstractContextManager[None]:
    """Keras runs a step of a model in the block."""
    return _with(step=(model, name))


def current_step() -> tuple[keras.Model, str] | None:
    """The model whose step Keras runs in this thread, and its name."""
    return _thread.step


def making_variable(
    variable: keras.Variable, value: Any
) -> contextlib.AbstractContextManager[None]:
    """Keras makes a variable of a value in the block."""
    return _with(variable=variable, value=value)


def initializing(initializer: Any) -> contextlib.AbstractContextManager[None]:
    """Keras makes a variable with an initializer in the block."""
    return _with(initializer=initializer)


def path_of_new_variable() -> str | None:
    """Path of the variable that Keras is making; `None` if it makes none."""
    return None if _thread.variable is None else str(_thread.variable.path)


def constant_of(initial_value: Any) -> str | None:
    """Describes the value of a new variable if its initializer alone says it.

    Args:
        initial_value: Of the variable, as TensorFlow hands it on.

    Returns:
        Such as `"zeros of float32 [3]"`; `None` for any other initializer than
        Keras's zeros and ones, and for a value that a creator of the user's
        has put in place of Keras's.
    """
    constant = _CONSTANTS.get(type(_thread.initializer))
    variable = _thread.variable
    if constant is None or variable is None:
        return None
    if initial_value is not _thread.value:
        return None
    return f"{constant} of {variable.dtype} {list(variable.shape)}"


def begin_epoch(callbacks: Any, epoch: int) -> None:
    """The callbacks of the current `fit` hear that an epoch begins."""
    call = _thread.call
    if call is None or call.kind != "fit":
        return
    if getattr(callbacks, "model", None) not in (None, call.model):
        return  # Those of a loop of the user's, in a callback.
    params = getattr(callbacks, "params", None) or {}
    _thread.call = replace(
        call,
        epoch=epoch + 1,
        epochs=params.get("epochs"),
        is_first_epoch=call.epoch is None,
    )


def making(epoch_iterator: Any) -> contextlib.AbstractContextManager[None]:
    """Keras makes an iterator over epochs in the block."""
    call = _thread.call
    if call is None:
        return contextlib.nullcontext()
    call.seen.append("iterator")
    # Only in the block: it would keep the data of the call.
    return _with(call=replace(call, epoch_iterator=epoch_iterator))


def epoch_iterator_class() -> Any:
    """The class of Keras that has data sets distributed, if it is there.

    Keras makes one in each call, and gives the strategy the data set alone.
    """
    try:
        from keras.src.backend.tensorflow.trainer import TFEpochIterator
    except ImportError:
        return None
    return TFEpochIterator


def reading_metrics(
    model: keras.Model,
) -> contextlib.AbstractContextManager[None]:
    """Keras reads all metrics of a model in the block."""
    values = [
        getattr(variable, "value", None) for variable in model.metrics_variables
    ]
    read = list(filter(distribute.is_summed_when_read, values))
    return _with(metrics_read=read)


def metrics_being_read() -> list[Any] | None:
    """The variables of the metrics that Keras is reading in this thread.

    Those that are summed when they are read, in one list for each reading;
    `None` if Keras is reading none.
    """
    return _thread.metrics_read


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
        begin()
        own_class.on_epoch_begin(owner())

    def on_epoch_end() -> None:
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


def first_samples(epoch_iterator: Any, count: int) -> Any:
    """Some samples of the arrays that were passed to Keras, or its first batch.

    In the structure of a batch; `None` of data that has to be read.
    """
    adapter = getattr(epoch_iterator, "data_adapter", None)
    if not isinstance(adapter, _ArrayDataAdapter):
        return first_batch(epoch_iterator)
    try:
        rows = keras.tree.map_structure(
            lambda leaf: None if leaf is None else leaf[:count], adapter._inputs
        )
        sliceable = _convert_to_sliceable(rows, target_backend="tensorflow")
        return keras.tree.lists_to_tuples(
            keras.tree.map_structure(
                lambda leaf: None if leaf is None else leaf[:count], sliceable
            )
        )
    except (IndexError, TypeError, ValueError):
        return None  # Sparse matrices of SciPy, for example.


def shuffled_arrays(epoch_iterator: Any) -> tuple[Any, int, int] | None:
    """The arrays that Keras is to shuffle in every epoch.

    Returns:
        The structure of a batch, of whole tensors, their length and the samples
        in a batch. `None` if Keras does not shuffle them as a whole, as with
        `shuffle="batch"`, and for sparse and ragged ones.
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
    return tensors, adapter._num_samples, adapter._batch_size


def shuffles_in_python(epoch_iterator: Any) -> bool:
    """Whether Keras shuffles a `PyDataset`, by Python's own `random`."""
    adapter = getattr(epoch_iterator, "data_adapter", None)
    return bool(
        getattr(adapter, "shuffle", False)
        and not isinstance(adapter, _ArrayDataAdapter)
    )
