"""The share of each replica in a batch."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import DEVICES

import keras_allreduce
from keras_allreduce.one_device.rules import Rule
from keras_allreduce.one_device.shares import (
    BatchShares,
    shares_of,
    shares_of_batch,
)


def constants(*values):
    return [tf.constant(value, tf.float32) for value in values]


def distributed(*parts):
    """A distributed value of two replicas."""
    return STRATEGY.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group]
    )


STRATEGY = keras_allreduce.AllReduceStrategy(DEVICES[:2])


def test_shares_have_mean_1():
    shares = shares_of(constants(3, 1))
    np.testing.assert_array_equal(shares, [1.5, 0.5])


def test_shares_of_nothing_are_0():
    np.testing.assert_array_equal(shares_of(constants(0, 0)), [0, 0])


def test_shares_may_be_those_of_one_worker_among_several():
    shares = shares_of(constants(3, 1), total=tf.constant(16.0), count=4)
    np.testing.assert_array_equal(shares, [0.75, 0.25])


def test_a_batch_without_distributed_values_has_no_shares():
    data = (tf.ones([4, 1]), tf.ones([4, 1]))
    rule = Rule("samples")
    assert shares_of_batch(data, rule, STRATEGY.extended) == BatchShares()


def test_equal_parts_need_no_scale():
    x = distributed(tf.ones([2, 1]), tf.ones([2, 1]))
    shares = shares_of_batch((x, x), Rule("samples"), STRATEGY.extended)
    assert shares == BatchShares()


@pytest.mark.parametrize(
    ("kind", "corrections"),
    [
        ("samples", None),
        ("as_is", None),
        # Times the share, the sum of the weights: 2 * 6 / 8 and 2 * 2 / 8.
        ("sample_weights", [1, 1]),
        # Times the share, 1.
        ("sum", [2 / 3, 2]),
    ],
)
def test_uneven_parts_have_shares_and_the_correction_of_the_rule(
    kind, corrections
):
    x = distributed(tf.ones([3, 1]), tf.ones([1, 1]))
    weights = distributed(tf.fill([3], 2.0), tf.fill([1], 2.0))
    shares = shares_of_batch((x, x, weights), Rule(kind), STRATEGY.extended)
    np.testing.assert_array_equal(shares.on_host, [1.5, 0.5])
    np.testing.assert_array_equal(shares.share.values, [1.5, 0.5])
    np.testing.assert_array_equal(shares.has_samples.values, [True, True])
    if corrections is None:
        assert shares.correction is None
    else:
        np.testing.assert_allclose(shares.correction.values, corrections)


def test_an_empty_part_has_share_0_and_no_samples():
    x = distributed(tf.ones([3, 1]), tf.ones([0, 1]))
    shares = shares_of_batch((x, x), Rule("samples"), STRATEGY.extended)
    np.testing.assert_array_equal(shares.on_host, [2, 0])
    np.testing.assert_array_equal(shares.has_samples.values, [True, False])
    devices = [part.device for part in shares.share.values]
    assert devices == list(STRATEGY.extended.worker_devices)
