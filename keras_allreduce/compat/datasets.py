"""Private names of distributed data sets."""

from typing import Any

import tensorflow as tf

# What a strategy hands out for a dataset. Only a subclass can tell Keras the
# shapes of a batch without taking one; see `SpecFirstDataset`.
from tensorflow.python.distribute.input_lib import (
    DistributedDataset as _DistributedDataset,
)

from keras_allreduce.compat.keras import keras_asks_for_shapes


def yields_arrays_of_python(dataset: Any) -> bool:
    """Whether the elements of a `tf.data.Dataset` come from Python code.

    There is no public way to look at what a dataset was made of.
    """
    for wrapper in dataset._functions():
        for op in wrapper.function.graph.get_operations():
            if op.type in _OPS_THAT_RUN_PYTHON:
                return True
    return any(yields_arrays_of_python(source) for source in dataset._inputs())


_OPS_THAT_RUN_PYTHON = frozenset(
    {"GeneratorDataset", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
)


class SpecFirstDataset(_DistributedDataset):
    """A distributed dataset that shows Keras its shapes without being read.

    Before the first step of `fit` and `evaluate` Keras takes a batch to learn
    the shapes, and throws it away with all that was read ahead. From a Python
    generator nothing of that comes again.
    """

    def __iter__(self) -> Any:
        """Iterates; for Keras's look at the shapes over an example."""
        if keras_asks_for_shapes():
            example = _example(self.element_spec)
            if example is not None:
                return iter([example])
        return super().__iter__()

    @classmethod
    def convert_in_place(cls, dataset: Any) -> Any:
        """Makes `dataset` one of these, if it is of the class they extend."""
        if type(dataset) is _DistributedDataset:
            dataset.__class__ = cls
        return dataset


def _example(element_spec: Any) -> Any:
    """A batch of two zeros like `element_spec`, `None` if it is too vague."""
    example = []
    for spec in tf.nest.flatten(element_spec):
        value_specs = getattr(spec, "_value_specs", (spec,))
        part = value_specs[0]
        if not isinstance(part, tf.TensorSpec) or not part.shape.rank:
            return None
        inner = part.shape[1:]
        if not inner.is_fully_defined():
            return None
        example.append(tf.zeros([part.shape[0] or 2, *inner], part.dtype))
    return tf.nest.pack_sequence_as(element_spec, example)
