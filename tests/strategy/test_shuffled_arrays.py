"""Arrays in one order on all workers, another in each epoch."""

import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce.strategy.datasets import shuffled

pytestmark = pytest.mark.slow


def epochs(count, seed=5, num_samples=22, batch_size=8):
    data = shuffled(
        {"x": tf.range(num_samples), "y": (2 * tf.range(num_samples), None)},
        num_samples,
        batch_size,
        seed,
    )
    return [list(data) for _ in range(count)]


def orders(found):
    return [
        np.concatenate([batch["x"] for batch in epoch]).tolist()
        for epoch in found
    ]


def test_every_epoch_has_every_sample_once():
    for order in orders(epochs(3)):
        assert sorted(order) == list(range(22))


def test_every_epoch_has_an_order_of_its_own():
    first, second, third = orders(epochs(3))
    assert first != second != third != first


def test_one_seed_gives_one_order_of_all_epochs():
    assert orders(epochs(3)) == orders(epochs(3))
    assert orders(epochs(1)) != orders(epochs(1, seed=6))


def test_samples_stay_together_in_batches_of_the_size():
    (epoch,) = epochs(1)
    assert [len(batch["x"]) for batch in epoch] == [8, 8, 6]
    for batch in epoch:
        np.testing.assert_array_equal(batch["y"][0], 2 * batch["x"])


@pytest.mark.parametrize("num_samples", [1, 8])
def test_few_samples_are_one_batch(num_samples):
    (epoch,) = epochs(1, num_samples=num_samples)
    assert [len(batch["x"]) for batch in epoch] == [num_samples]
