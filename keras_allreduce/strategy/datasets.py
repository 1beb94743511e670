"""Distributes data sets whose arrays belong to Python."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import datasets


def distribute(dataset: Any, stock: Callable[[Any], Any]) -> Any:
    """Distributes `dataset`; arrays from Python are copied first.

    TensorFlow takes the memory of arrays from Python as its own and, once a
    batch is split, writes results into it: the arrays of a generator or a
    PyDataset would change under the user.

    Args:
        dataset: A `tf.data.Dataset`.
        stock: Distributes a data set as TensorFlow does.
    """
    if not datasets.yields_arrays_of_python(dataset):
        return stock(dataset)
    return datasets.SpecFirstDataset.convert_in_place(
        stock(dataset.map(_copied))
    )


@tf.autograph.experimental.do_not_convert
def _copied(*element: Any) -> Any:
    def copy(tensor: tf.Tensor) -> tf.Tensor:
        if tensor.dtype.is_floating or tensor.dtype.is_integer:
            return tf.raw_ops.DeepCopy(x=tensor)
        return tensor

    copies = tf.nest.map_structure(copy, element, expand_composites=True)
    return copies if len(copies) > 1 else copies[0]
