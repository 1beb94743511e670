"""Numbers what a step asks for, in the order in which it asks.

All replicas ask in one order, and so does the step where it is measured: the
keys tell which measurement is that of which value.
"""

from typing import Any

import tensorflow as tf

from keras_allreduce.compat import gradient_tape
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.natures import Key


def gradient(tape: tf.GradientTape, sources: Any) -> Key | None:
    """The key of a gradient; `None` if it is not one of variables.

    Nor has one that is itself differentiated.
    """
    if not keras_compat.are_variables(
        sources
    ) or gradient_tape.is_recorded_by_another(tape):
        return None
    return "gradient", replica.current().next_call("gradient")


def update() -> Key:
    """The key of an update by an optimizer."""
    return "apply", replica.current().next_call("apply")


def metric(updated: Any) -> Key:
    """The key of a value that goes into a metric."""
    return "metric", updated.name, replica.current().next_call(updated.name)


def state(variable: Any) -> Key:
    """The key of a variable that a replica assigns on its own."""
    return "state", variable.name, replica.current().next_call("state")
