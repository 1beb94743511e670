"""What is seeded alike where Keras reads a `PyDataset`."""

import random
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_allreduce.workers.calls import _Seeds
from keras_allreduce.workers.data_fingerprint import state_of_unseeded_numpy
from keras_allreduce.workers.fingerprint import Fingerprint


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return np.zeros([2, 1]), np.zeros([2, 1])


def iterator(x, shuffle=False):
    from keras.src.trainers.data_adapters import get_data_adapter

    return SimpleNamespace(data_adapter=get_data_adapter(x, shuffle=shuffle))


def offers(random_states, numpy_states):
    return [
        Fingerprint({}, offer={"state of random": r, "state of numpy": n})
        for r, n in zip(random_states, numpy_states, strict=True)
    ]


SEEDED = {
    "nobody has seeded NumPy": (iterator(Data()), "aa", "bc", False, True),
    "one has seeded NumPy": (iterator(Data()), "aa", ["b", ""], False, False),
    "all have seeded NumPy": (iterator(Data()), "aa", ["", ""], False, False),
    "the state of NumPy is set": (iterator(Data()), "aa", "bb", False, False),
    "Keras shuffles": (iterator(Data(), True), "ab", "cc", True, False),
    "Keras shuffles alike": (iterator(Data(), True), "aa", "cc", False, False),
    "arrays": (iterator(np.zeros([2, 1])), "ab", "cd", False, False),
}


@pytest.mark.parametrize("name", SEEDED)
def test_what_nobody_has_seeded_is_seeded_alike(name):
    epochs, randoms, numpys, python, numpy = SEEDED[name]
    seeds = _Seeds.agreed(epochs, offers(randoms, numpys), 3)
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
