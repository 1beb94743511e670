"""How far weights of two workers are apart, and what counts as rounding."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce.workers import weight_fingerprint


@pytest.mark.parametrize(
    ("own", "chiefs", "off"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 0.5),
        ([0.0, 1e-9], [0.0, 0.0], np.inf),
        ([np.nan, 3.0], [np.nan, 2.0], 0.5),
        ([np.inf, 3.0], [np.inf, 2.0], 0.5),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([np.inf, 2.0], [-np.inf, 2.0], np.inf),
        ([], [], 0.0),
        (np.array([1, 2]), np.array([1, 3]), np.inf),
        (np.array(3), np.array(3), 0.0),
    ],
)
def test_a_difference_is_a_part_of_the_largest_number(own, chiefs, off):
    def array(numbers):
        kind = None if isinstance(numbers, np.ndarray) else "float32"
        return np.asarray(numbers, kind)

    assert (
        weight_fingerprint.relative_difference(array(own), array(chiefs)) == off
    )


def test_what_counts_as_rounding_depends_on_the_dtype():
    assert weight_fingerprint.rounding(np.dtype("float64")) < 1e-13
    assert 1e-5 < weight_fingerprint.rounding(np.dtype("float32")) < 1e-4
    assert weight_fingerprint.rounding(tf.bfloat16.as_numpy_dtype) == 1 / 16
    assert weight_fingerprint.rounding(np.dtype("int64")) == 0


def test_weights_and_the_state_of_optimizers_are_compared():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    model.layers[0].bias.trainable = False
    of_optimizer = {variable.path for variable in model.optimizer.variables}
    assert len(of_optimizer) == 4  # Two momenta, rate and iterations.
    weights = {weight.path for weight in model.weights}
    for compared, expected in (
        (weight_fingerprint.all_of(model), weights),
        (weight_fingerprint.trained(model), {model.layers[0].kernel.path}),
    ):
        paths = {variable.path for variable in compared}
        assert paths == expected | of_optimizer
