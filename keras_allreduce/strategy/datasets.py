"""Distributes data sets; copies arrays that belong to Python."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_allreduce.compat.datasets import yields_arrays_of_python
from keras_allreduce.input.dataset import own


def distribute(dataset: Any, stock: Callable[[Any], Any]) -> Any:
    """Distributes `dataset`; arrays from Python are copied first.

    TensorFlow takes the memory of arrays from Python as its own and, once a
    batch is split, writes results into it: the arrays of a generator or a
    PyDataset would change under the user.

    Args:
        dataset: A `tf.data.Dataset`.
        stock: Distributes a data set as TensorFlow does.
    """
    if yields_arrays_of_python(dataset):
        dataset = dataset.map(_copied)
    return own(stock(dataset))


@tf.autograph.experimental.do_not_convert
def _copied(*element: Any) -> Any:
    def copy(tensor: tf.Tensor) -> tf.Tensor:
        if tensor.dtype.is_floating or tensor.dtype.is_integer:
            return tf.raw_ops.DeepCopy(x=tensor)
        return tensor

    copies = tf.nest.map_structure(copy, element, expand_composites=True)
    return copies if len(copies) > 1 else copies[0]
