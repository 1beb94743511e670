"""Each replica draws random numbers of its own, reproducibly."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

import keras_allreduce

ONES = np.ones([3, 64], "float32")


class MaskTrainer(keras.Model):
    """Shows in its logs what each replica's random layer made of ones."""

    def __init__(self, layer):
        super().__init__()
        self.random = layer
        self.out = keras.layers.Dense(1)

    def call(self, x, training=False):
        return self.out(self.random(x, training=training))

    def train_step(self, data):
        x, _ = data
        self.masks = self.random(x, training=True)
        return {"mask": self.masks}


def masks(model, strategy):
    """One row per replica, as one step of the strategy draws them."""

    def split(context):
        return ONES[context.replica_id_in_sync_group :][:1]

    x = strategy.experimental_distribute_values_from_function(split)
    logs = strategy.run(model.train_step, args=((x, x),))
    (rows,) = strategy.experimental_local_results(logs["mask"])
    return rows.numpy()


def make(layer, seed=1):
    keras.utils.set_random_seed(seed)
    strategy = keras_allreduce.AllReduceStrategy(
        DEVICES[:3], weigh_samples=False
    )
    with strategy.scope():
        model = MaskTrainer(layer())
        model.compile("sgd", "mse")
        model(ONES)
    return model, strategy


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.Dropout(0.5),
        lambda: keras.layers.GaussianNoise(1.0),
        lambda: keras.layers.AlphaDropout(0.5),
        lambda: keras.Sequential([keras.layers.Dropout(0.5)]),
        lambda: keras.layers.Dropout(0.5, seed=11),
    ],
    ids=["dropout", "noise", "alpha dropout", "nested", "own seed"],
)
def test_replicas_draw_different_masks(layer):
    rows = masks(*make(layer))
    assert len({row.tobytes() for row in rows}) == 3


@pytest.mark.slow
def test_the_seed_of_keras_reproduces_all_masks():
    def dropout():
        return keras.layers.Dropout(0.5)

    first, again = masks(*make(dropout, 5)), masks(*make(dropout, 5))
    other = masks(*make(dropout, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.slow
def test_steps_draw_different_masks():
    model, strategy = make(lambda: keras.layers.Dropout(0.5))
    assert (masks(model, strategy) != masks(model, strategy)).any()


@pytest.mark.slow
def test_replica_0_draws_what_one_device_draws():
    model, strategy = make(lambda: keras.layers.Dropout(0.5))
    row = masks(model, strategy)[0]
    keras.utils.set_random_seed(1)
    alone = MaskTrainer(keras.layers.Dropout(0.5))
    alone(ONES)
    expected = alone.train_step((tf.constant(ONES[:1]), None))["mask"]
    np.testing.assert_array_equal(row, expected.numpy()[0])


@pytest.mark.slow
def test_the_state_is_all_in_the_variables_of_the_model():
    # Keras keeps it there, and leaves it out of saved files on one device
    # too. Whoever copies the variables has all replicas' masks.
    def dropout():
        return keras.layers.Dropout(0.5)

    model, strategy = make(dropout)
    masks(model, strategy)
    state = [variable.numpy() for variable in model.variables]
    expected = masks(model, strategy)
    restored, strategy = make(dropout, seed=9)
    for variable, value in zip(restored.variables, state, strict=True):
        variable.assign(value)
    np.testing.assert_array_equal(masks(restored, strategy), expected)
