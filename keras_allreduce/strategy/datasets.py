"""Distributes data sets; copies arrays of Python, and shuffles them alike."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras_calls, runtime
from keras_allreduce.compat.datasets import (
    ends_in_batch,
    ends_in_one_step,
    first_dimension,
    yields_arrays_of_python,
)
from keras_allreduce.compat.keras_calls import KerasCall
from keras_allreduce.input.dataset import know_steps, own
from keras_allreduce.one_device import shares
from keras_allreduce.one_device.replica import Replicas

_do_not_convert = tf.autograph.experimental.do_not_convert


def distribute(
    dataset: Any, split: Callable[[Any], Any], num_replicas: int
) -> Any:
    """Distributes `dataset`; arrays from Python are copied first.

    TensorFlow takes the memory of arrays from Python as its own and, once a
    batch is split, writes results into it: the arrays of a generator or a
    PyDataset would change under the user.

    Args:
        dataset: A `tf.data.Dataset`.
        split: Distributes a data set, each batch split over the replicas.
        num_replicas: Number of replicas of all workers.

    Raises:
        ValueError: If Keras has it distributed, and a part of its batches has
            no samples to split.
    """
    call = keras_calls.current_call()
    changes: list[Callable[[Any], Any]] = []
    if num_replicas > 1 and call is not None:
        spec = getattr(dataset, "element_spec", None)
        _check_batches(spec)
        if any(_is_optional(part) for part in tf.nest.flatten(spec)):
            changes.append(_without_optionals)
        is_of_arrays = keras_calls.arrays(call.epoch_iterator) is not None
        if not is_of_arrays and not _has_known_rows(dataset):
            changes.append(_with_rows_checked)
    if yields_arrays_of_python(dataset):
        changes.append(_copied)
    if changes:
        dataset = dataset.map(partial(_changed, changes))
    return own(split(dataset))


@_do_not_convert
def _changed(changes: Sequence[Callable[[Any], Any]], *batch: Any) -> Any:
    """All changes of a batch, in the one `map` that they cost."""
    for change in changes:
        batch = change(batch)
    return batch if len(batch) > 1 else batch[0]


def _check_batches(spec: Any) -> None:
    """Raises if a part of a batch cannot be split over the replicas."""
    for path, part in keras.tree.flatten_with_path(spec):
        if isinstance(part, tf.TensorSpec) and part.shape.rank == 0:
            where = "".join(f"[{key!r}]" for key in path)
            raise ValueError(
                f"{shares.ROWS} Received: one number for all samples in "
                f"batch{where}. Repeat it for every sample, "
                "`tf.fill([tf.shape(x)[0]], number)`, or keep it in a "
                "variable of the model."
            )


def _is_optional(part: Any) -> bool:
    return isinstance(part, tf.OptionalSpec | tf.experimental.Optional)


def _without_optionals(batch: Any) -> Any:
    """A batch with `None` where Keras has put an optional in its place.

    An optional cannot be split. Keras makes `None` of it before its step.
    """
    return tf.nest.map_structure(
        lambda part: None if _is_optional(part) else part, batch
    )


def _has_known_rows(dataset: Any) -> bool:
    """Whether all parts of a batch are known to have one length."""
    spec = getattr(dataset, "element_spec", None)
    sizes = {
        part.shape[0]
        for part in tf.nest.flatten(spec)
        if isinstance(part, _TENSORS) and part.shape.rank
    }
    is_known = len(sizes) == 1 and sizes != {None}
    return is_known or len(tf.nest.flatten(spec)) < 2 or ends_in_batch(dataset)


def _with_rows_checked(batch: Any) -> Any:
    """A batch whose parts are of one length, or an error.

    What splits a batch splits each of its parts on its own.
    """
    first, *rest = (
        first_dimension(part)
        for part in tf.nest.flatten(batch)
        if part is not None
    )
    checks = [
        tf.debugging.assert_equal(
            size,
            first,
            message=f"{shares.ROWS} Received: parts of these lengths. "
            f"{shares.ROWS_REMEDY}",
        )
        for size in rest
    ]
    with tf.control_dependencies(checks):
        return tf.nest.map_structure(
            lambda part: part if part is None else tf.identity(part), batch
        )


_TENSORS = tf.TensorSpec | tf.SparseTensorSpec | tf.RaggedTensorSpec


def share_steps(
    dataset: Any,
    steps: tuple[int | None, int | None] | None,
    distributed: Any,
    replicas: Replicas,
) -> None:
    """Has no worker asked for data if all know when theirs ends.

    To be called on all workers.

    Args:
        dataset: A `tf.data.Dataset`.
        steps: Steps of an epoch that Keras was asked for, and batches of the
            data set, the same on all workers; `None`: Keras does not ask.
        distributed: The distributed data set that came of it.
        replicas: Sums over the workers.
    """
    if steps is None or replicas.group.size == 1:
        return
    known = tf.constant(int(ends_in_one_step(dataset, steps[1])))
    total = replicas.group.all_reduce(known, "steps are known")
    if int(total) == replicas.group.size:
        know_steps(distributed)


def _copied(batch: Any) -> Any:
    """A batch that has memory of its own."""

    def copy(tensor: Any) -> Any:
        if tensor is None or not (
            tensor.dtype.is_floating or tensor.dtype.is_integer
        ):
            return tensor
        return tf.raw_ops.DeepCopy(x=tensor)

    return tf.nest.map_structure(copy, batch, expand_composites=True)


def shuffled_alike(
    dataset: Any,
    call: KerasCall,
    begin_call: Callable[[KerasCall, Any], int | None],
) -> Any:
    """Returns the data of Keras in an order that all workers have.

    Args:
        dataset: The data set that Keras has made.
        call: The call of Keras that has it distributed.
        begin_call: Compares the call of Keras and its data set with the other
            workers; returns a number that all of them have, if there is one.

    Returns:
        `dataset`, unless Keras shuffles arrays in an order that no seed
        determines.
    """
    seed = begin_call(call, dataset)
    if seed is None or runtime.has_global_seed():
        return dataset
    arrays = keras_calls.shuffled_arrays(call.epoch_iterator)
    return dataset if arrays is None else shuffled(*arrays, seed)


def shuffled(
    tensors: Any, num_samples: int, batch_size: int, seed: int
) -> tf.data.Dataset:
    """Returns batches of all samples, in every epoch in another order.

    One seed gives one order on all workers.

    Args:
        tensors: Structure of tensors whose first dimension is `num_samples`.
        num_samples: Number of samples.
        batch_size: Samples in a batch; the last may have fewer.
        seed: Of the orders of all epochs.

    Returns:
        A data set of structures like `tensors`.
    """

    @_do_not_convert
    def order(epoch_seed: tf.Tensor) -> tf.data.Dataset:
        indices = tf.random.experimental.stateless_shuffle(
            tf.range(num_samples, dtype=tf.int64), [epoch_seed, epoch_seed]
        )
        return tf.data.Dataset.from_tensor_slices(indices).batch(batch_size)

    @_do_not_convert
    def gather(indices: tf.Tensor) -> Any:
        return tf.nest.map_structure(
            lambda tensor: (
                None if tensor is None else tf.gather(tensor, indices)
            ),
            tensors,
        )

    seeds = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
    return (
        seeds.take(1)
        .flat_map(order)
        .map(gather, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(_options())
    )


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    # The state is that of the seeds, which workers share.
    options.experimental_external_state_policy = (
        tf.data.experimental.ExternalStatePolicy.IGNORE
    )
    return options
