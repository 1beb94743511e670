"""What is seeded alike where Keras reads a `PyDataset`."""

import random

import keras
import numpy as np
import pytest

import keras_allreduce
from keras_allreduce.compat import keras_calls
from keras_allreduce.workers.calls import _Seeds
from keras_allreduce.workers.data_fingerprint import state_of_unseeded_numpy
from keras_allreduce.workers.fingerprint import Fingerprint


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return np.zeros([2, 1]), np.zeros([2, 1])


class Spy(keras_allreduce.AllReduceStrategy):
    """Keeps Keras's iterators over the epochs."""

    def __init__(self):
        super().__init__(["CPU:0"])
        self.iterators = []

    def experimental_distribute_dataset(self, dataset, options=None):
        self.iterators.append(keras_calls.current_call().epoch_iterator)
        return super().experimental_distribute_dataset(dataset, options)


@pytest.fixture(scope="module")
def iterators():
    """Keras's own, of a `PyDataset`, of one it shuffles, and of arrays."""
    spy = Spy()
    with spy.scope():
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(Data(), shuffle=False, verbose=0)
    model.fit(Data(), shuffle=True, verbose=0)
    model.fit(np.zeros([2, 1]), np.zeros([2, 1]), verbose=0)
    return dict(
        zip(("plain", "shuffled", "arrays"), spy.iterators, strict=True)
    )


def offers(random_states, numpy_states):
    return [
        Fingerprint({}, offer={"state of random": r, "state of numpy": n})
        for r, n in zip(random_states, numpy_states, strict=True)
    ]


SEEDED = {
    "nobody has seeded NumPy": ("plain", "aa", "bc", False, True),
    "one has seeded NumPy": ("plain", "aa", ["b", ""], False, False),
    "all have seeded NumPy": ("plain", "aa", ["", ""], False, False),
    "the state of NumPy is set": ("plain", "aa", "bb", False, False),
    "Keras shuffles": ("shuffled", "ab", "cc", True, False),
    "Keras shuffles alike": ("shuffled", "aa", "cc", False, False),
    "arrays": ("arrays", "ab", "cd", False, False),
}


@pytest.mark.parametrize("name", SEEDED)
def test_what_nobody_has_seeded_is_seeded_alike(name, iterators):
    data, randoms, numpys, python, numpy = SEEDED[name]
    seeds = _Seeds.agreed(iterators[data], offers(randoms, numpys), 3)
    assert (seeds.python, seeds.numpy) == (python, numpy)


def test_epochs_have_other_seeds_and_workers_the_same():
    kept = random.getstate(), np.random.get_state()
    try:
        drawn = []
        for _ in range(2):
            seeds = _Seeds(random.Random(3), python=True, numpy=True)
            for _ in range(2):
                seeds.seed()
                drawn.append((random.random(), np.random.random()))
        assert drawn[:2] == drawn[2:]
        assert len({each for pair in drawn for each in pair}) == 4
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def test_a_script_that_seeds_numpy_is_known():
    generator = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937())
        assert state_of_unseeded_numpy()
        np.random.seed(3)
        assert not state_of_unseeded_numpy()
    finally:
        np.random.set_bit_generator(generator)
