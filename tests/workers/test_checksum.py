"""A checksum depends on every bit of an array, and on nothing else."""

import numpy as np
import pytest

from keras_allreduce.workers.fingerprint import checksum, combined


@pytest.mark.parametrize("size", [1, 7, 512, 4096, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
def test_any_element_that_changes_changes_it(size, dtype):
    array = np.arange(size).astype(dtype)
    whole = checksum(array)
    assert whole == checksum(array.copy())
    for index in {0, size // 2, size - 1}:
        other = array.copy()
        other[index] = 77 - other[index]
        assert checksum(other) != whole, index


def test_elements_that_change_places_change_it():
    array = np.arange(100_000, dtype="float32")
    assert checksum(array[::-1]) != checksum(array)
    assert checksum(np.roll(array, 1)) != checksum(array)


def test_numbers_that_are_not_finite_count_as_others_do():
    array = np.zeros([1000], "float32")
    with_nan = array.copy()
    with_nan[500] = np.nan
    assert checksum(with_nan) == checksum(with_nan.copy())
    assert checksum(with_nan) != checksum(array)


def test_texts_have_one_too():
    assert checksum(np.array(["a", "b"], object)) != checksum(
        np.array(["a", "c"], object)
    )


def test_the_order_of_several_counts():
    assert combined(["a", "b"]) != combined(["b", "a"])
