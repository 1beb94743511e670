"""A step of Keras on all replicas leaves no trace but that of one device."""

from threading import Thread

import keras
import numpy as np
import pytest
from five_devices import DEVICES
from linear_model import X, Y, compiled, linear

import keras_allreduce
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Replica


def test_the_state_of_a_replica_ends_with_its_step():
    outside = replica.current()
    with replica.running(Replica(share=0.5)):
        assert replica.current() == Replica(share=0.5)
        with replica.running(Replica(share=2.0)):
            assert replica.current() == Replica(share=2.0)
        assert replica.current().share == 0.5
    assert replica.current() is outside
    assert outside == Replica()


def test_the_state_of_a_replica_ends_with_a_step_that_fails():
    with pytest.raises(KeyError), replica.running(Replica(share=0.5)):
        raise KeyError
    assert replica.current() == Replica()


def test_each_thread_has_its_own_replica():
    seen = []
    with replica.running(Replica(share=0.5)):
        thread = Thread(target=lambda: seen.append(replica.current()))
        thread.start()
        thread.join()
    assert seen == [Replica()]


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


class Batches(keras.metrics.Metric):
    """Counts the batches in which there was a sample above 5."""

    def __init__(self):
        super().__init__(name="batches")
        self.count = self.add_weight(initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        found = keras.ops.any(y_true > 5)
        self.count.assign_add(keras.ops.cast(found, "float32"))

    def result(self):
        return self.count * 1.0


def test_an_empty_replica_forgets_what_the_borrowed_sample_did_to_metrics():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:3])
    with strategy.scope():
        model = compiled(linear(), metrics=["mae", Batches()])
    # Two replicas have a sample each, and the third borrows the first, 7.
    y = np.array([[7.0], [1.0]])
    model.fit(X[:2], y, batch_size=3, shuffle=False, verbose=0)
    mae = next(m for m in model.metrics[1].metrics if m.name == "mae")
    batches = model.metrics[1].metrics[-1]
    assert [float(p) for p in mae.count.value.values] == [1, 1, 0]
    assert [float(p) for p in batches.count.value.values] == [1, 0, 0]


@pytest.mark.parametrize(("value", "row"), [(np.nan, 0), (np.inf, 4)])
def test_a_real_nan_or_inf_on_any_replica_stays_visible(value, row):
    x = X.copy()
    x[row] = value
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = compiled(linear())
    model.fit(x, Y, batch_size=5, verbose=0)
    assert not np.isfinite(model.get_weights()[0]).any()
