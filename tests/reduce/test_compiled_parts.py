"""In how many parts XLA compiles what ends in gradients."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_allreduce.reduce.buckets import Bucket
from keras_allreduce.reduce.compiled_parts import MOST_PARTS, parts_of


def packs_of(*sizes):
    """Packs of one gradient each, of the last variable first."""
    last = len(sizes) - 1
    return [
        Bucket((last - number,), "float32", size)
        for number, size in enumerate(sizes)
    ]


def test_one_pack_is_one_part():
    assert parts_of(packs_of(100)) == [(0,)]


def test_few_large_packs_have_a_part_each():
    assert parts_of(packs_of(100, 100, 100)) == [(2,), (1,), (0,)]


def test_small_packs_share_a_part():
    assert parts_of(packs_of(1, 1, 1, 1000)) == [(3, 2, 1), (0,)]


def test_many_packs_make_no_more_parts_than_the_most():
    parts = parts_of(packs_of(*[10] * 100))
    assert len(parts) == MOST_PARTS
    assert sum(parts, ()) == tuple(reversed(range(100)))


def test_parts_follow_backprop_whatever_the_order_of_the_packs():
    dense = Bucket((3, 1), "float32", 100)
    rows = Bucket((0,), "float32", None)
    last = Bucket((2,), "float32", 100)
    assert parts_of([dense, last, rows]) == [(2,), (3, 1), (0,)]


@pytest.mark.parametrize("sizes", [(None,), (0, 0), (None, 0, None)])
def test_sizes_that_are_not_known_or_nothing(sizes):
    assert sum(parts_of(packs_of(*sizes)), ()) == tuple(
        reversed(range(len(sizes)))
    )


@given(st.lists(st.none() | st.integers(0, 10**9), min_size=1, max_size=60))
def test_every_gradient_is_in_one_part_in_the_order_of_backprop(sizes):
    parts = parts_of(packs_of(*sizes))
    assert 1 <= len(parts) <= MOST_PARTS
    assert sum(parts, ()) == tuple(reversed(range(len(sizes))))
