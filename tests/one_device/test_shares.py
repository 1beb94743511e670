"""The share of each replica in a batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from hypothesis import given
from hypothesis import strategies as st

import keras_allreduce
from keras_allreduce.one_device.shares import (
    BatchShares,
    divided,
    shares_of,
    shares_of_batch,
)
from keras_allreduce.reduce.process_group import ProcessGroup


def constants(*values):
    return [tf.constant(value, tf.float32) for value in values]


def distributed(*parts):
    """A distributed value of two replicas."""
    return STRATEGY.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group]
    )


def of(data, counts_weights=False):
    return shares_of_batch(
        data, STRATEGY.extended, counts_weights=counts_weights
    )


STRATEGY = keras_allreduce.AllReduceStrategy(DEVICES[:2])
ALONE = STRATEGY.extended.group


class TwoWorkers(ProcessGroup):
    """The other one has 12 samples."""

    size = 2

    def all_reduce(self, value, name):
        return value + 12


OF_TWO_WORKERS = SimpleNamespace(
    group=TwoWorkers(ALONE.gradient_ops),
    devices=STRATEGY.extended.devices,
    local_values=STRATEGY.extended.local_values,
)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=8))
def test_shares_are_those_of_the_samples(counts):
    shares = np.asarray(shares_of(constants(*counts), ALONE))
    expected = np.asarray(counts) * len(counts) / max(1, sum(counts))
    np.testing.assert_allclose(shares, expected, rtol=1e-6)


def test_shares_may_be_those_of_one_worker_among_several():
    shares = shares_of(constants(3, 1), TwoWorkers(ALONE.gradient_ops))
    np.testing.assert_array_equal(shares, [0.75, 0.25])


def test_a_batch_without_distributed_values_has_no_shares():
    data = (tf.ones([4, 1]), tf.ones([4, 1]))
    assert of(data) == BatchShares()


def test_equal_parts_need_no_scale():
    x = distributed(tf.ones([2, 1]), tf.ones([2, 1]))
    shares = of((x, x))
    assert shares == BatchShares()


def test_equal_parts_of_a_batch_may_be_uneven_over_all_workers():
    """A function that is called with a batch is traced with its shapes."""

    @tf.function
    def shares(x):
        return shares_of_batch(x, OF_TWO_WORKERS, counts_weights=False).on_host

    x = distributed(tf.ones([3, 1]), tf.ones([3, 1]))
    # 3 of 6 + 12 samples, times 4 replicas.
    np.testing.assert_allclose(shares(x), [2 / 3, 2 / 3], rtol=1e-6)


def test_equal_parts_that_a_function_reads_are_equal_on_all_workers():
    data = tf.data.Dataset.from_tensor_slices(tf.ones([12, 1]))
    batches = data.batch(6, drop_remainder=True)
    found = []

    @tf.function
    def read(iterator):
        @tf.function
        def step(x):
            found.append(
                shares_of_batch(x, OF_TWO_WORKERS, counts_weights=False)
            )

        step(next(iterator))

    read(iter(STRATEGY.experimental_distribute_dataset(batches)))
    assert found == [BatchShares()]


@pytest.mark.parametrize("counts_weights", [False, True])
def test_uneven_parts_have_shares_and_maybe_a_correction(counts_weights):
    x = distributed(tf.ones([3, 1]), tf.ones([1, 1]))
    weights = distributed(tf.fill([3], 1.0), tf.fill([1], 9.0))
    shares = of((x, x, weights), counts_weights=counts_weights)
    np.testing.assert_array_equal(shares.on_host, [1.5, 0.5])
    np.testing.assert_array_equal(shares.share.values, [1.5, 0.5])
    np.testing.assert_array_equal(shares.has_samples.values, [True, True])
    if counts_weights:
        # Times the share: 2 * 3 / 12 and 2 * 9 / 12.
        expected = [1 / 3, 3]
        np.testing.assert_allclose(shares.correction.values, expected)
    else:
        assert shares.correction is None


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x,
        lambda x: {"a": x, "b": x},
        lambda x: (x, x, x, x),
        lambda x: (tf.constant(0.5), None, x),
    ],
    ids=["x alone", "dict", "four parts", "constants first"],
)
def test_any_part_of_a_batch_tells_its_size(batch):
    shares = of(batch(distributed(tf.ones([3, 1]), tf.ones([1, 1]))))
    np.testing.assert_array_equal(shares.on_host, [1.5, 0.5])


def test_a_batch_is_divided_as_fit_divides_it():
    x, scalar = np.arange(5.0), tf.constant(2.0)
    found = divided((x, None, scalar), STRATEGY.extended)
    parts = [part.numpy().tolist() for part in found[0].values]
    assert parts == [[0, 1, 2], [3, 4]]
    assert found[1] is None
    assert found[2] is scalar


def test_a_batch_that_is_distributed_is_not_divided():
    x = distributed(tf.ones([3, 1]), tf.ones([1, 1]))
    data = (x, tf.ones([4, 1]))
    assert divided(data, STRATEGY.extended) is data


def test_an_empty_part_has_share_0_and_no_samples():
    x = distributed(tf.ones([3, 1]), tf.ones([0, 1]))
    shares = of((x, x))
    np.testing.assert_array_equal(shares.on_host, [2, 0])
    np.testing.assert_array_equal(shares.has_samples.values, [True, False])
    devices = [part.device for part in shares.share.values]
    assert devices == list(STRATEGY.extended.worker_devices)
