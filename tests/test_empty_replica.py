"""A replica without samples leaves no trace."""

import keras
import numpy as np
from five_devices import DEVICES
from linear_model import X, Y, compiled

import keras_allreduce


def test_an_empty_replica_leaves_no_trace_in_moving_statistics():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([2]),
                keras.layers.BatchNormalization(momentum=0.0),
                keras.layers.Dense(1),
            ]
        )
        compiled(model)
    model.fit(X[:1], Y[:1], batch_size=2, verbose=0)
    first, second = model.layers[0].moving_mean.value.values
    np.testing.assert_allclose(first.numpy(), X[0], atol=1e-6)
    np.testing.assert_array_equal(second.numpy(), first.numpy())
