"""A value times the weight of its replica."""

import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce.reduce import packing


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32])
@pytest.mark.parametrize("weight", [1.0, 0.0, 0.75, 1.3])
def test_weighing_a_pack_is_a_product_rounded_once(dtype, weight):
    rng = np.random.default_rng(0)
    value = tf.cast(rng.normal(size=[3, 50]), dtype)

    @tf.function
    def weigh(value, weight):
        return packing.scale_unless_one(value, weight)

    got = weigh(value, tf.constant(weight))
    assert got.dtype == dtype
    exact = tf.cast(value, tf.float64) * np.float32(weight)
    np.testing.assert_array_equal(got, tf.cast(exact, dtype))


def test_a_pack_that_weighs_nothing_is_0_whatever_is_in_it():
    @tf.function
    def weigh(weight):
        value = tf.constant([[np.nan, np.inf], [1.0, 2.0]])
        return packing.scale_unless_one(value, weight)

    assert not np.any(weigh(tf.constant(0.0)))
    assert np.isnan(weigh(tf.constant(1.0))[0, 0])
    assert np.isnan(weigh(tf.constant(0.5))[0, 0])
