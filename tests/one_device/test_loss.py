"""The loss of each replica is scaled by its share of the batch."""

import numpy as np
import pytest
from five_devices import DEVICES
from linear_model import X, Y, compiled, linear

import keras_allreduce


@pytest.mark.parametrize(("value", "row"), [(np.nan, 0), (np.inf, 4)])
def test_a_real_nan_or_inf_on_any_replica_stays_visible(value, row):
    x = X.copy()
    x[row] = value
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = compiled(linear())
    model.fit(x, Y, batch_size=5, verbose=0)
    assert not np.isfinite(model.get_weights()[0]).any()
