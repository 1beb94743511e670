"""Ratios: means over what their denominator counts, such as tokens.

With a_r / n_r on replica r, the batch has sum(a) / sum(n): the mean of the
replicas' values, each with its part n_r / sum(n) of all that is counted. The
denominator is seen in the graph of the step.
"""

from typing import Any

import tensorflow as tf

from keras_allreduce.compat import graphs
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.one_device.shares import part_of_sum
from keras_allreduce.reduce.packing import scale


def part_of_batch(value: Any, replicas: Replicas) -> tf.Tensor | None:
    """This replica's part of the denominators of a ratio, in its thread.

    Returns:
        A float32 scalar; `None` where there is no graph to see it in.
    """
    count = graphs.denominator(value)
    if count is None:
        return None
    counted = tf.cast(count, tf.float32)
    return part_of_sum(scale(counted, replica.current().has_samples), replicas)


def scaled(value: Any, replicas: Replicas) -> Any:
    """A ratio, scaled so that its mean by samples is that of the batch."""
    part = part_of_batch(value, replicas)
    if part is None:
        return value
    return scale(value, part * replica.current().inverse_weight())
