"""What workers compare of an epoch is what Keras makes of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce.workers.data_facts import steps_of_epochs


class Count(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps = []

    def on_epoch_begin(self, epoch, logs=None):
        self.steps.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.steps[-1] += 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("asked", "batches", "made", "said"),
    [
        (None, 3, [3, 3, 3, 3], "3"),
        (2, 4, [2, 2, 2, 2], "2"),
        (4, 2, [2, 2, 2, 2], "2"),
        (2, 5, [2, 2, 1, 2], "2, but 1 in epoch 3"),
        (2, None, [2, 2, 2, 2], "2"),
    ],
)
def test_the_steps_of_epochs_are_those_that_keras_makes(
    asked, batches, made, said
):
    data = tf.data.Dataset.from_tensor_slices(
        (np.zeros([batches or 1, 2]), np.zeros([batches or 1, 1]))
    ).batch(1)
    if batches is None:
        data = data.repeat()
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    count = Count()
    model.fit(
        data, steps_per_epoch=asked, epochs=4, verbose=0, callbacks=[count]
    )
    assert count.steps == made
    assert steps_of_epochs(asked, batches) == said


def test_an_epoch_of_unknown_length_says_so():
    assert steps_of_epochs(None, None) == "not known"
