"""What TensorFlow has put into XLA's programs, read from the graphs it ran."""

import collections
import pathlib
import tempfile
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from five_devices import DEVICES

import keras_allreduce

HEAVY = ("MatMul", "Conv")


@dataclass(frozen=True)
class Clustered:
    """Ops of the functions that ran, by type, before and after clustering.

    Attributes:
        traced: Ops in the functions as they were traced.
        outside: Ops outside of XLA's programs when they ran.
        programs: Number of programs.
    """

    traced: collections.Counter
    outside: collections.Counter
    programs: int

    @classmethod
    def of(cls, run):
        """Calls `run`, which has to trace what it is about."""
        with tempfile.TemporaryDirectory() as folder:
            _forget_traces()
            writer = tf.summary.create_file_writer(folder)
            tf.summary.trace_on(graph=True)
            run()
            with writer.as_default():
                tf.summary.trace_export("graphs", step=0)
            writer.close()
            (file,) = pathlib.Path(folder).iterdir()
            return cls._read(file)

    @classmethod
    def _read(cls, file):
        traced, outside = collections.Counter(), collections.Counter()
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found = tf.compat.v1.RunMetadata.FromString(
                    value.tensor.string_val[0]
                )
                for each in found.function_graphs:
                    before = each.pre_optimization_graph
                    for function in before.library.function:
                        traced.update(node.op for node in function.node_def)
                    outside.update(
                        node.op for node in each.post_optimization_graph.node
                    )
        return cls(traced, outside, outside["_XlaRun"])

    @property
    def share(self):
        """Share of the matmuls and convolutions that are in programs."""
        return 1 - _heavy(self.outside) / _heavy(self.traced)


def _forget_traces():
    """Drops what others have traced: Keras's TensorBoard may leave it on."""
    with tf.summary.create_noop_writer().as_default():
        tf.summary.trace_off()
        tf.summary.trace_on(graph=True)
        tf.summary.trace_export("others", step=0)


def _heavy(ops):
    return sum(
        count
        for name, count in ops.items()
        if any(heavy in name for heavy in HEAVY)
    )


def trained(replicas=2, steps=2, **compiled):
    """A model that was trained for some steps under a strategy."""
    strategy = keras_allreduce.AllReduceStrategy(
        DEVICES[:replicas], fit_log=False
    )
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(8, "relu"),
                keras.layers.Dense(1),
            ]
        )
        model.compile("adam", "mse", **compiled)
    x = np.random.default_rng(0).normal(size=[4 * steps, 6])
    model.fit(x, x[:, :1], batch_size=4, verbose=0)
    return model
