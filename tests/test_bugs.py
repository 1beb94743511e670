"""Regressions: each test says what once went wrong.

A bug's test stands here if nobody would think of the case without the story;
cases that belong to a module's own rules stand with the module.
"""

import tensorflow as tf
from graph_walk import ops_of_type

from keras_allreduce import BatchAllReduce, internals

GPUS = ["/device:GPU:0", "/device:GPU:1"]


def test_a_rare_dtype_is_launched_when_it_is_ready():
    """Buckets that never filled up were closed in the order they were opened.

    With one float16 gradient in the middle of a float32 model, the float32
    bucket (opened by the last layer, complete with the first) was planned
    before it. NCCL launches packs in the order of the plan, so the float16
    pack, ready long before, waited for the end of backprop.
    """
    dtypes = [tf.float32, tf.float16, tf.float32]
    with tf.Graph().as_default() as graph:
        gradients = []
        for dtype in dtypes:
            replicas = []
            for device in GPUS:
                with tf.device(device):
                    replicas.append(tf.compat.v1.placeholder(dtype, [2]))
            gradients.append(internals.PerReplica(tuple(replicas)))
        BatchAllReduce("nccl").batch_reduce(
            tf.distribute.ReduceOp.SUM, [(g, g) for g in gradients]
        )
    launched = [
        op.inputs[0].dtype for op in ops_of_type(graph, "NcclAllReduce")
    ]
    assert launched == [tf.float16, tf.float16, tf.float32, tf.float32]
