"""IndexedSlices are gathered and stay sparse."""

import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ops_of_type

from keras_allreduce.reduce import sparse


def slices(rows, width=2, table=5):
    """Rows of ones at the indices `rows`, times 1, 2, 3 ..."""
    values = [[float(n)] * width for n in range(1, len(rows) + 1)]
    return tf.IndexedSlices(
        tf.reshape(tf.constant(values, tf.float32), [-1, width]),
        tf.constant(rows, tf.int64),
        tf.constant([table, width], tf.int64),
    )


def dense(gradient):
    return tf.convert_to_tensor(gradient).numpy()


CASES = {
    "one row each": [[1], [3]],
    "the same row": [[1], [1]],
    "a row twice on one replica": [[2, 2], [0]],
    "unequal lengths": [[0, 1, 4], [3]],
    "an empty replica": [[], [1, 2]],
    "all empty": [[], []],
    "three replicas": [[0], [0, 1], [0, 1, 2]],
    "one replica": [[4, 4]],
}


def test_rows_stay_separate_with_those_of_replica_0_first():
    reduced = sparse.all_reduce(
        [slices([3, 1]), slices([1])], DEVICES[:2], DEVICES[1]
    )
    for replica in reduced:
        assert replica.indices.numpy().tolist() == [3, 1, 1]
        assert replica.values.numpy()[:, 0].tolist() == [1.0, 2.0, 1.0]
        assert replica.dense_shape.numpy().tolist() == [5, 2]


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
def test_rows_added_up_are_the_same_gradient(rows):
    gathered = sparse.gather([slices(r) for r in rows], DEVICES[0])
    added = sparse.add_up(gathered)
    np.testing.assert_array_equal(dense(added), dense(gathered))
    indices = added.indices.numpy().tolist()
    assert indices == list(dict.fromkeys(gathered.indices.numpy()))


@pytest.mark.parametrize(
    ("devices", "owner", "is_added_up"),
    [
        (["/device:GPU:0", "/device:GPU:1"], "/device:GPU:1", True),
        # Another worker has another.
        (["/device:GPU:0"], "/device:CPU:0", True),
        (["/device:GPU:0"], "/device:GPU:0", False),
        (["/device:CPU:0", "/device:CPU:1"], "/device:CPU:1", False),
    ],
)
def test_rows_are_added_up_once_for_all_gpus(devices, owner, is_added_up):
    with tf.Graph().as_default() as graph:
        with tf.device(owner):
            gathered = tf.IndexedSlices(
                tf.ones([2, 2]), tf.constant([1, 1]), tf.constant([5, 2])
            )
        for device, shared in zip(
            devices, sparse.share(gathered, devices, owner), strict=True
        ):
            if device != owner:
                assert shared.values.device == device
        added_up = ops_of_type(graph, "UnsortedSegmentSum")
        assert [op.device for op in added_up] == [owner] * is_added_up


def test_a_table_of_unknown_shape_stays_unknown():
    gradient = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]))
    reduced = sparse.all_reduce([gradient] * 2, DEVICES[:2], DEVICES[0])
    for replica in reduced:
        assert replica.dense_shape is None
        assert replica.indices.numpy().tolist() == [0, 0]


def test_each_replica_gets_its_result_on_its_own_device():
    reduced = sparse.all_reduce([slices([1])] * 2, DEVICES[:2], DEVICES[1])
    for index, replica in enumerate(reduced):
        for tensor in (replica.values, replica.indices, replica.dense_shape):
            assert tensor.device.endswith(f"CPU:{index}")


def test_the_owner_does_the_gathering():
    devices = ["/device:CPU:0", "/device:CPU:1"]
    with tf.Graph().as_default() as graph:
        sparse.all_reduce([slices([1])] * 2, devices, devices[1])
    gathers = [op for op in graph.get_operations() if op.type == "ConcatV2"]
    assert [op.device for op in gathers] == ["/device:CPU:1"] * 2
