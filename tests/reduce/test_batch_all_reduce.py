"""Every algorithm equals the plain sum, whoever calls it and from where."""

import functools
import operator

import numpy as np
import pytest
import tensorflow as tf
from distributed_values import (
    DTYPES,
    gradient,
    local,
    per_replica,
    sparse_value,
)
from five_devices import DEVICES

from keras_allreduce import BatchAllReduce
from keras_allreduce.reduce import algorithms

SUM = tf.distribute.ReduceOp.SUM
MEAN = tf.distribute.ReduceOp.MEAN
HOST_ALGORITHMS = algorithms.runnable(DEVICES)
# Uneven, so that no number of ranks from 2 to 5 divides them all.
SHAPES = [[], [1], [7], [2, 3], [0], [13], [5, 1, 1], [0, 4], [2]]
# Of float32: the last gradients fill packs of 32 bytes, [13] travels alone.
BYTES_PER_PACK = 32


def gradients(num_replicas, dtype=tf.float32, step=1, shapes=SHAPES):
    return [
        per_replica(
            [gradient(shape, r, dtype, step) for r in range(num_replicas)]
        )
        for shape in shapes
    ]


def to_themselves(values):
    return [(value, value) for value in values]


def plain_sum(value):
    # Not `sum`, whose 0 makes NumPy 1 choose another dtype for scalars.
    return functools.reduce(operator.add, [v.numpy() for v in value.values])


def assert_everywhere(result, expected, num_replicas):
    """`result` has `expected` on each replica, in dtype and shape too."""
    expected = np.asarray(expected)
    assert len(local(result)) == num_replicas
    for index, replica in enumerate(local(result)):
        assert replica.numpy().dtype == expected.dtype
        assert replica.device.endswith(f"CPU:{index}")
        np.testing.assert_array_equal(replica.numpy(), expected)


class TestEveryAlgorithm:
    @pytest.fixture(params=HOST_ALGORITHMS)
    def op(self, request):
        return BatchAllReduce(request.param, BYTES_PER_PACK)

    @pytest.fixture(params=range(1, 6), ids=lambda n: f"{n} replicas")
    def num_replicas(self, request):
        return request.param

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
    def test_a_batch_equals_the_plain_sum(self, op, num_replicas, dtype):
        values = gradients(num_replicas, dtype)
        results = op.batch_reduce(SUM, to_themselves(values))
        for result, value in zip(results, values, strict=True):
            assert_everywhere(result, plain_sum(value), num_replicas)

    @pytest.mark.parametrize(
        "dtype",
        [tf.float16, tf.bfloat16, tf.float32, tf.complex64],
        ids=lambda dtype: dtype.name,
    )
    def test_a_batch_equals_the_plain_mean(self, op, num_replicas, dtype):
        values = gradients(num_replicas, dtype, step=num_replicas)
        results = op.batch_reduce(MEAN, to_themselves(values))
        for result, value in zip(results, values, strict=True):
            total = plain_sum(value)
            mean = total / np.asarray(num_replicas, total.dtype)
            assert_everywhere(result, mean, num_replicas)

    def test_a_graph_gives_what_eager_mode_gives(self, op, num_replicas):
        values = gradients(num_replicas)

        @tf.function
        def reduce():
            results = op.batch_reduce(SUM, to_themselves(values))
            return [local(result) for result in results]

        for replicas, value in zip(reduce(), values, strict=True):
            assert len(replicas) == num_replicas
            for replica in replicas:
                np.testing.assert_array_equal(replica.numpy(), plain_sum(value))

    def test_mixed_dtypes_come_back_in_their_places(self, op, num_replicas):
        values = [
            per_replica([gradient([3], r, dtype) for r in range(num_replicas)])
            for dtype in DTYPES + DTYPES
        ]
        results = op.batch_reduce(SUM, to_themselves(values))
        for result, value in zip(results, values, strict=True):
            assert_everywhere(result, plain_sum(value), num_replicas)

    def test_all_replicas_get_the_same_bits(self, op, num_replicas):
        # Sums of these depend on the order of their terms.
        rng = np.random.default_rng(0)
        values = [
            per_replica(
                [
                    tf.constant(rng.normal(size=size) * 10.0**r, tf.float32)
                    for r in range(num_replicas)
                ]
            )
            for size in (13, 3, 1)
        ]
        for result in op.batch_reduce(SUM, to_themselves(values)):
            bits = {replica.numpy().tobytes() for replica in local(result)}
            assert len(bits) == 1

    @pytest.mark.parametrize("shape", [[], [7], [0]], ids=str)
    def test_a_single_value_is_reduced_too(self, op, num_replicas, shape):
        (value,) = gradients(num_replicas, shapes=[shape])
        result = op.reduce(SUM, value, value)
        assert_everywhere(result, plain_sum(value), num_replicas)


def test_the_mean_of_integers_is_a_float():
    value = per_replica([tf.constant([1, 2]), tf.constant([2, 4])])
    assert_everywhere(
        BatchAllReduce().reduce(MEAN, value, value), [1.5, 3.0], 2
    )


class TestDestinations:
    @pytest.fixture(params=HOST_ALGORITHMS)
    def op(self, request):
        return BatchAllReduce(request.param)

    @pytest.fixture
    def value(self):
        return per_replica([tf.constant([1.0, 2.0]), tf.constant([3.0, 6.0])])

    def test_one_of_the_devices_gets_a_tensor(self, op, value):
        result = op.reduce(SUM, value, DEVICES[1])
        assert isinstance(result, tf.Tensor)
        assert result.device.endswith("CPU:1")
        assert result.numpy().tolist() == [4.0, 8.0]

    def test_another_device_gets_a_tensor(self, op, value):
        result = op.reduce(MEAN, value, DEVICES[4])
        assert result.device.endswith("CPU:4")
        assert result.numpy().tolist() == [2.0, 4.0]

    def test_a_variable_says_where(self, op, value):
        with tf.device(DEVICES[2]):
            variable = tf.Variable([0.0, 0.0])
        result = op.reduce(SUM, value, variable)
        assert result.device.endswith("CPU:2")
        assert result.numpy().tolist() == [4.0, 8.0]
        assert variable.numpy().tolist() == [0.0, 0.0]

    def test_other_devices_get_a_mirrored_value(self, op, value):
        others = per_replica([tf.zeros([])] * 3)
        result = op.reduce(SUM, value, others)
        assert_everywhere(result, np.array([4, 8], "float32"), 3)

    def test_a_batch_may_have_destinations_of_all_kinds(self, op, value):
        pairs = [
            (value, DEVICES[3]),
            (value, value),
            (value, per_replica([tf.zeros([])] * 3)),
            (value, DEVICES[0]),
            (value, value),
        ]
        results = op.batch_reduce(SUM, pairs)
        for index in (0, 3):
            assert results[index].numpy().tolist() == [4.0, 8.0]
        for index, copies in ((1, 2), (2, 3), (4, 2)):
            expected = np.array([4, 8], "float32")
            assert_everywhere(results[index], expected, copies)

    def test_rows_can_be_summed_elsewhere(self, op):
        value = sparse_value([[1, 1], [3]])
        result = op.reduce(SUM, value, DEVICES[4])
        assert isinstance(result, tf.IndexedSlices)
        assert result.values.device.endswith("CPU:4")
        np.testing.assert_array_equal(dense(result), [0, 3, 0, 1, 0])

    def test_one_value_can_be_broadcast(self, op):
        result = op.broadcast(tf.constant([5.0]), per_replica([0.0] * 3))
        assert_everywhere(result, np.array([5], "float32"), 3)

    def test_one_value_can_be_copied_to_one_device(self, op):
        result = op.broadcast(tf.constant([5.0]), DEVICES[3])
        assert result.device.endswith("CPU:3")

    def test_a_plain_tensor_counts_as_one_replica(self, op):
        with tf.device(DEVICES[0]):
            tensor = tf.constant([5.0])
        assert op.reduce(SUM, tensor, DEVICES[2]).numpy().tolist() == [5.0]


def dense(slices):
    return tf.convert_to_tensor(slices).numpy()


SPARSE = {
    "apart": ([[0], [1]], [1, 1, 0, 0, 0]),
    "the same": ([[1], [1]], [0, 2, 0, 0, 0]),
    "twice on one replica": ([[2, 2], [0]], [1, 0, 3, 0, 0]),
    "unequal": ([[0, 1, 4], [1]], [1, 3, 0, 0, 3]),
    "one replica empty": ([[], [4]], [0, 0, 0, 0, 1]),
}


class TestSparse:
    @pytest.mark.parametrize("algorithm", HOST_ALGORITHMS)
    @pytest.mark.parametrize(
        ("rows", "total"), SPARSE.values(), ids=SPARSE.keys()
    )
    def test_rows_are_gathered_and_stay_sparse(self, algorithm, rows, total):
        value = sparse_value(rows)
        result = BatchAllReduce(algorithm).reduce(SUM, value, value)
        for replica in result.values:
            assert isinstance(replica, tf.IndexedSlices)
            np.testing.assert_array_equal(dense(replica), total)
            # Rows of the same index are for the optimizer to add.
            assert replica.indices.numpy().tolist() == rows[0] + rows[1]

    @pytest.mark.parametrize(
        ("rows", "total"), SPARSE.values(), ids=SPARSE.keys()
    )
    def test_the_mean_is_over_replicas_not_rows(self, rows, total):
        value = sparse_value(rows)
        result = BatchAllReduce().reduce(MEAN, value, value)
        for replica in result.values:
            np.testing.assert_array_equal(dense(replica) * 2, total)

    @pytest.mark.parametrize(
        ("rows", "total"), SPARSE.values(), ids=SPARSE.keys()
    )
    def test_sparse_as_dense_is_a_dense_sum(self, rows, total):
        value = sparse_value(rows)
        op = BatchAllReduce(sparse_as_dense=True)
        result = op.reduce(SUM, value, value)
        assert_everywhere(result, np.array(total, "float32"), 2)

    def test_sparse_and_dense_come_back_in_their_places(self):
        values = [
            sparse_value([[1], [1, 2]]),
            per_replica([tf.constant([1.0]), tf.constant([2.0])]),
            sparse_value([[4], [0]]),
            per_replica([tf.constant([5.0]), tf.constant([6.0])]),
        ]
        results = BatchAllReduce().batch_reduce(SUM, to_themselves(values))
        assert_everywhere(results[1], np.array([3], "float32"), 2)
        assert_everywhere(results[3], np.array([11], "float32"), 2)
        for result, total in (
            (results[0], [0, 2, 2, 0, 0]),
            (results[2], [1, 0, 0, 0, 1]),
        ):
            for replica in result.values:
                np.testing.assert_array_equal(dense(replica), total)


class TestSum:
    """`sum`, which also scales what each replica has."""

    @pytest.fixture(params=[True, False], ids=["graph", "eager"])
    def sum_of(self, request):
        op = BatchAllReduce(bytes_per_pack=BYTES_PER_PACK)

        def sum_of(values, weights=()):
            return [local(total) for total in op.sum(values, weights)]

        return tf.function(sum_of) if request.param else sum_of

    def test_is_the_plain_sum_without_weights(self, sum_of):
        values = gradients(3)
        for total, value in zip(sum_of(values), values, strict=True):
            for replica in total:
                np.testing.assert_array_equal(replica, plain_sum(value))

    def test_scales_each_replica_by_its_weight(self, sum_of):
        values = [
            per_replica([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])]),
            sparse_value([[1], [1, 2]]),
            per_replica([tf.constant(5.0), tf.constant(6.0)]),
        ]
        weights = [tf.constant(0.5), tf.constant(2.0)]
        pair, rows, one = sum_of(values, weights)
        for replica in range(2):
            assert pair[replica].numpy().tolist() == [6.5, 9.0]
            assert dense(rows[replica]).tolist() == [0, 2.5, 4, 0, 0]
            assert one[replica].numpy() == 14.5

    def test_a_weight_of_0_silences_nan(self, sum_of):
        nan = float("nan")
        value = per_replica([tf.constant([1.0]), tf.constant([nan])])
        weights = [tf.constant(2.0), tf.constant(0.0)]
        (total,) = sum_of([value], weights)
        assert [part.numpy().tolist() for part in total] == [[2.0]] * 2

    def test_a_weight_of_1_keeps_nan(self, sum_of):
        nan = float("nan")
        value = per_replica([tf.constant([1.0]), tf.constant([nan])])
        (total,) = sum_of([value], [tf.constant(1.0)] * 2)
        assert np.isnan(total[0].numpy())

    def test_takes_a_tensor_where_there_is_one_replica(self, sum_of):
        with tf.device(DEVICES[0]):
            (total,) = sum_of([tf.constant([3.0])], [tf.constant(2.0)])
        assert [part.numpy().tolist() for part in total] == [[6.0]]
