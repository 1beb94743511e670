"""However many samples, batches and replicas: trained as on one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_allreduce import AllReduceStrategy

pytestmark = pytest.mark.slow

MOST_SAMPLES = 12


def trained(strategy, samples, batch_size, weighted):
    """Weights and losses of an epoch of `samples` samples."""
    keras.utils.clear_session(free_memory=False)
    rng = np.random.default_rng(3)
    with strategy.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(2)])
        # The first step of Adam would hide a wrong scale of the gradients.
        model.compile(keras.optimizers.SGD(0.1, momentum=0.5), "mse")
    model.set_weights([np.ones([2, 2]), np.zeros([2])])
    x, y, weights = (
        rng.normal(size=size)[:samples]
        for size in ([MOST_SAMPLES, 2], [MOST_SAMPLES, 2], [MOST_SAMPLES])
    )
    history = model.fit(
        *(x, y),
        batch_size=batch_size,
        sample_weight=1 + weights**2 if weighted else None,
        shuffle=False,
        verbose=0,
    )
    return [*model.get_weights(), history.history["loss"]]


@settings(max_examples=6)
@example(samples=7, batch_size=3, replicas=2, weighted=True)
@given(
    samples=st.integers(1, MOST_SAMPLES),
    batch_size=st.integers(1, MOST_SAMPLES),
    replicas=st.integers(2, 3),
    weighted=st.booleans(),
)
def test_an_epoch_trains_as_on_one_device(
    samples, batch_size, replicas, weighted
):
    ours, one = (
        trained(strategy, samples, batch_size, weighted)
        for strategy in (
            AllReduceStrategy(DEVICES[:replicas]),
            tf.distribute.get_strategy(),
        )
    )
    for got, expected in zip(ours, one, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
