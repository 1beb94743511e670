"""Host devices read one iterator in turn.

A distributed data set is already split into one part per replica. TensorFlow
hands the parts to an iterator per device, each with threads that copy them
there; on the host there is nothing to copy.

    parts of the batches     0  1  2  0  1  2 ...
    read by replica          0  1  2  0  1  2 ...

A graph runs the reads of one iterator in program order.
"""

from typing import Any

import tensorflow as tf

from keras_allreduce.compat.datasets import Source
from keras_allreduce.compat.iterators import InTurn


def make(dataset: Any, source: Source) -> InTurn:
    """Makes an iterator that the replicas of one worker read in turn.

    Args:
        dataset: The `tf.data.Dataset` of parts, as it is to be read.
        source: Where it is read, and for which devices.
    """
    with tf.device(source.worker):
        return InTurn(iter(dataset), source.devices)
