"""The logs of a step are those of one device."""

import keras
import numpy as np
import tensorflow as tf
from five_devices import DEVICES
from linear_model import X, Y, compiled, linear

import keras_allreduce


def test_step_logs_are_means_over_samples():
    class Logs(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.losses = []

        def on_train_batch_end(self, batch, logs=None):
            self.losses.append(logs["loss"])

    def losses(strategy):
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = compiled(linear())
        logs = Logs()
        model.fit(
            X, Y, batch_size=3, shuffle=False, verbose=0, callbacks=[logs]
        )
        return logs.losses

    np.testing.assert_allclose(
        losses(keras_allreduce.AllReduceStrategy(DEVICES[:2])),
        losses(tf.distribute.get_strategy()),
        rtol=1e-6,
    )
