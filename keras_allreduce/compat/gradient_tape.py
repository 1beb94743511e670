"""Assumptions about `tf.GradientTape` and the graphs of functions."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Whether a thread records for any tape has no public name.
from tensorflow.python import pywrap_tfe as _pywrap_tfe

# The handle data of a captured variable has no public name.
from tensorflow.python.ops import handle_data_util as _handle_data_util


def is_recorded_by_another(tape: tf.GradientTape) -> bool:
    """Whether other tapes record what happens in this thread.

    They do where gradients are themselves differentiated.
    """
    if not tape._recording:
        return not _pywrap_tfe.TFE_Py_TapeSetIsEmpty()
    with tape.stop_recording():
        return not _pywrap_tfe.TFE_Py_TapeSetIsEmpty()


def captured_variables(
    concrete: Any,
) -> Iterator[tuple[tf.Tensor, tf.DType]]:
    """Handle and dtype of all variables that a concrete function uses.

    `concrete.variables` leaves out those that it only assigns.
    """
    for captured in concrete.captured_inputs:
        if captured.dtype != tf.resource:
            continue
        data = _handle_data_util.get_handle_data(captured)
        if data is not None and data.is_set and data.shape_and_type:
            dtype = tf.as_dtype(data.shape_and_type[0].dtype)
            if dtype not in (tf.variant, tf.resource):
                yield captured, dtype
