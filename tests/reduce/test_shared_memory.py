"""Sums of replicas that share their memory."""

import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce.reduce import shared_memory


def address(tensor):
    return np.asarray(memoryview(tensor)).ctypes.data


@pytest.mark.parametrize("num_replicas", range(1, 6))
def test_every_replica_gets_the_plain_sum_of_each_pack(num_replicas):
    packs = [
        [
            tf.range(size, dtype=tf.float32) * (replica + 1) + replica
            for replica in range(num_replicas)
        ]
        for size in (0, 1, 7, 13)
    ]
    reduced = shared_memory.all_reduce(packs, DEVICES[:num_replicas])
    for pack, replicas in zip(packs, reduced, strict=True):
        plain = sum(tensor.numpy() for tensor in pack)
        assert len(replicas) == num_replicas
        for replica in replicas:
            np.testing.assert_array_equal(replica.numpy(), plain)


def test_terms_are_added_in_the_order_of_the_replicas():
    # 1e8 + 1 is 1e8 in float32: only this order gives 1.
    terms = [tf.constant(x) for x in (1e8, -1e8, 1.0)]
    (replicas,) = shared_memory.all_reduce([terms], DEVICES[:3])
    assert [replica.numpy() for replica in replicas] == [1.0, 1.0, 1.0]


def test_all_replicas_hold_the_same_buffer():
    shared = shared_memory.share(tf.range(1000), DEVICES[:3])
    assert len({address(tensor) for tensor in shared}) == 1


def test_each_replica_gets_its_result_on_its_own_device():
    pack = [tf.ones([2]), tf.ones([2])]
    (replicas,) = shared_memory.all_reduce([pack], DEVICES[:2])
    assert [r.device[-5:].upper() for r in replicas] == ["CPU:0", "CPU:1"]


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


def test_a_pack_may_have_a_size_unknown_while_tracing():
    @tf.function(input_signature=[[tf.TensorSpec(None, tf.float32)] * 2])
    def reduce(pack):
        return shared_memory.all_reduce([pack], DEVICES[:2])[0]

    for shape in ([], [0], [2, 3]):
        for replica in reduce([tf.ones(shape), tf.ones(shape)]):
            np.testing.assert_array_equal(replica.numpy(), np.full(shape, 2.0))
