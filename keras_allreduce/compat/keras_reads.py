"""What Keras reads between its steps: batches for their shapes, and metrics.

Keras gives the strategy no sign of either, so the calling frames are read.
Where a frame is not found, everything is read as TensorFlow does it.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import tensorflow as tf

# From a variable up to the method that reads all metrics: 20 in Keras 3.15.
_MAX_FRAMES = 60


def knows_its_shapes() -> bool:
    """Whether Keras looks at the shapes of a batch that it does not need.

    Before `fit` and `evaluate` it takes a batch to build what is not built
    yet, and takes it also if there is nothing. To be called where a data set
    is iterated.
    """
    for frame in _frames():
        if frame.f_code.co_name == "_maybe_symbolic_build":
            return _is_built(frame.f_locals.get("self"))
    return False


def _is_built(model: Any) -> bool:
    try:
        return all(
            part is None or part.built
            for part in (
                *model._flatten_layers(),
                model._compile_metrics,
                model._compile_loss,
            )
        )
    except AttributeError:
        return False


def metrics_being_read() -> tuple[FrameType, list[Any]] | None:
    """The variables of all metrics, if Keras is reading the metrics.

    Returns:
        The frame that reads them, and the distributed variables that are
        summed when they are read; `None` if it is not Keras that reads.
    """
    for frame in _frames():
        if frame.f_code.co_name == "get_metrics_result":
            model = frame.f_locals.get("self")
            variables = [
                getattr(variable, "value", None)
                for variable in getattr(model, "metrics_variables", ())
            ]
            return frame, [each for each in variables if _is_sum(each)]
    return None


def _is_sum(variable: Any) -> bool:
    return (
        isinstance(variable, tf.distribute.DistributedValues)
        and getattr(variable, "synchronization", None)
        == tf.VariableSynchronization.ON_READ
        and getattr(variable, "aggregation", None) == tf.VariableAggregation.SUM
    )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is not None:
            yield frame
            frame = frame.f_back
