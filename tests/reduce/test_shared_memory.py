"""Sums of replicas that share their memory."""

import numpy as np
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce.reduce import shared_memory


def address(tensor):
    return np.asarray(memoryview(tensor)).ctypes.data


def test_terms_are_added_in_the_order_of_the_replicas():
    # 1e8 + 1 is 1e8 in float32: only this order gives 1.
    terms = [tf.constant(x) for x in (1e8, -1e8, 1.0)]
    (replicas,) = shared_memory.all_reduce([terms], DEVICES[:3])
    assert [replica.numpy() for replica in replicas] == [1.0, 1.0, 1.0]


def test_all_replicas_hold_the_same_buffer():
    shared = shared_memory.share(tf.range(1000), DEVICES[:3])
    assert len({address(tensor) for tensor in shared}) == 1


def test_devices_share_the_sums_by_bytes():
    devices = ["/device:CPU:0", "/device:CPU:1"]
    with tf.Graph().as_default() as graph:
        shared_memory.all_reduce(
            [[tf.ones([size])] * 2 for size in (2, 9, 4, 2)], devices
        )
    sums = [op for op in graph.get_operations() if op.type == "AddN"]
    assert [op.device for op in sums] == [
        "/device:CPU:1",
        "/device:CPU:0",
        "/device:CPU:1",
        "/device:CPU:1",
    ]
