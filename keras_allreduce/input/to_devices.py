"""GPUs: parts are prefetched to each, by functions that are traced once.

The functions of one spec serve all data sets of that spec.
"""

from typing import Any

from keras_allreduce.compat.datasets import Source
from keras_allreduce.compat.multi_device import DeviceFunctions

# Specs of a program: those of `fit`, `evaluate` and `predict` of some models.
_MAX_SPECS = 32
_functions: dict[tuple[tuple[str, ...], str, str], DeviceFunctions] = {}


def make(dataset: Any, source: Source) -> Any:
    """Makes an iterator that prefetches to the devices of one worker.

    Args:
        dataset: The `tf.data.Dataset` of parts, as it is to be read.
        source: Where it is read, and for which devices.
    """
    key = tuple(source.devices), source.host, repr(dataset.element_spec)
    functions = _functions.get(key)
    if functions is None:
        while len(_functions) >= _MAX_SPECS:
            _functions.pop(next(iter(_functions)))
        functions = DeviceFunctions(source.devices, source.host, dataset)
        _functions[key] = functions
    return functions.make(dataset, source)
