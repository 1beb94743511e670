"""A replica without samples leaves no trace."""

import keras
import numpy as np
from five_devices import DEVICES
from linear_model import X, Y, compiled, linear

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
