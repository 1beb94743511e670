"""The bucket plan, as pure Python."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_allreduce.reduce.buckets import (
    MOST_PARTS,
    Bucket,
    GradientSpec,
    balance,
    parts_of,
    plan_buckets,
)


def floats(*nbytes):
    return [GradientSpec("float32", size) for size in nbytes]


def indices(buckets):
    return [bucket.indices for bucket in buckets]


def test_the_last_layer_comes_first():
    assert indices(plan_buckets(floats(8, 8, 8, 8), 16)) == [(3, 2), (1, 0)]


def test_a_bucket_is_filled_to_the_last_byte():
    assert indices(plan_buckets(floats(8, 4, 4), 16)) == [(2, 1, 0)]
    assert indices(plan_buckets(floats(8, 4, 4), 15)) == [(2, 1), (0,)]


def test_a_bucket_has_one_dtype():
    gradients = [
        GradientSpec("float32", 4),
        GradientSpec("float16", 2),
        GradientSpec("float32", 4),
        GradientSpec("float16", 2),
    ]
    assert plan_buckets(gradients, 64) == [
        Bucket((3, 1), "float16", 4),
        Bucket((2, 0), "float32", 8),
    ]


def test_a_full_bucket_of_one_dtype_leaves_the_other_open():
    gradients = [
        GradientSpec("float32", 8),
        GradientSpec("float16", 2),
        GradientSpec("float32", 8),
        GradientSpec("float32", 8),
        GradientSpec("float16", 2),
    ]
    assert indices(plan_buckets(gradients, 16)) == [(3, 2), (4, 1), (0,)]


def test_the_first_bucket_is_smaller():
    buckets = plan_buckets(floats(8, 8, 8, 8, 8), 16, first_bytes_per_pack=8)
    assert indices(buckets) == [(4,), (3, 2), (1, 0)]


def test_a_gradient_over_the_first_capacity_may_be_the_first_bucket():
    buckets = plan_buckets(floats(4, 4, 12), 16, first_bytes_per_pack=8)
    assert indices(buckets) == [(2,), (1, 0)]


def test_a_gradient_larger_than_the_pack_travels_alone():
    buckets = plan_buckets(floats(4, 17, 4), 16)
    assert indices(buckets) == [(1,), (2, 0)]


def test_a_gradient_of_the_size_of_the_pack_does_not_wait_for_others():
    assert indices(plan_buckets(floats(4, 16, 4), 16)) == [(2,), (1,), (0,)]


def test_a_gradient_above_alone_above_travels_alone():
    buckets = plan_buckets(floats(4, 9, 4, 8), 64, alone_above=8)
    assert indices(buckets) == [(1,), (3, 2, 0)]


def test_a_larger_alone_above_does_not_raise_the_capacity():
    buckets = plan_buckets(floats(4, 20, 4), 16, alone_above=64)
    assert indices(buckets) == [(1,), (2, 0)]


def test_an_empty_gradient_travels_with_its_neighbours():
    assert indices(plan_buckets(floats(8, 0, 8), 16)) == [(2, 1, 0)]


def test_only_empty_gradients_still_make_a_bucket():
    assert plan_buckets(floats(0, 0), 16) == [Bucket((1, 0), "float32", 0)]


def test_a_gradient_of_unknown_size_travels_alone():
    buckets = plan_buckets(floats(4, None, 4, None), 64)
    assert buckets == [
        Bucket((3,), "float32", None),
        Bucket((1,), "float32", None),
        Bucket((2, 0), "float32", 8),
    ]


def test_no_gradients_make_no_bucket():
    assert plan_buckets([], 16) == []


GRADIENTS = st.lists(
    st.builds(
        GradientSpec,
        st.sampled_from(["float16", "float32", "int32"]),
        st.none() | st.sampled_from([0, 2, 4]) | st.integers(0, 200),
    ),
    max_size=40,
)
SIZES = st.integers(1, 150)


@given(GRADIENTS, SIZES, st.none() | SIZES, st.none() | st.integers(0, 150))
def test_every_plan_is_a_partition_that_keeps_the_rules(
    gradients, capacity, first, alone_above
):
    buckets = plan_buckets(gradients, capacity, first, alone_above)

    planned = [index for bucket in buckets for index in bucket.indices]
    assert sorted(planned) == list(range(len(gradients)))
    completed = [bucket.indices[-1] for bucket in buckets]
    assert completed == sorted(completed, reverse=True)
    for bucket in buckets:
        sizes = [gradients[index].nbytes for index in bucket.indices]
        assert {gradients[i].dtype for i in bucket.indices} == {bucket.dtype}
        assert list(bucket.indices) == sorted(bucket.indices, reverse=True)
        if len(sizes) > 1:
            assert None not in sizes
            assert sum(sizes) == bucket.nbytes
            assert bucket.nbytes <= max(capacity, first or 0)
            assert alone_above is None or max(sizes) <= alone_above


@pytest.mark.parametrize(
    "capacities",
    [{"bytes_per_pack": 0}, {"bytes_per_pack": -1}]
    + [{"bytes_per_pack": 8, "first_bytes_per_pack": size} for size in (0, -4)],
    ids=["zero", "negative", "first zero", "first negative"],
)
def test_a_capacity_must_be_positive(capacities):
    with pytest.raises(ValueError, match=r"must be positive\. Received: bytes"):
        plan_buckets(floats(4), **capacities)


def test_balance_gives_the_largest_pack_to_the_idlest_owner():
    assert balance([1, 8, 4, 3], 2) == [1, 0, 1, 1]


def test_balance_counts_unknown_and_empty_packs_as_work():
    assert sorted(balance([None, 0, None, 0], 2)) == [0, 0, 1, 1]


@given(st.lists(st.integers(1, 1000), min_size=1), st.integers(1, 6))
def test_no_owner_has_more_than_the_largest_pack_above_another(sizes, owners):
    load = [0] * owners
    for size, owner in zip(sizes, balance(sizes, owners), strict=True):
        load[owner] += size
    assert max(load) - min(load) <= max(sizes)


def packs_of(*sizes):
    """Packs of one gradient each, of the last variable first."""
    last = len(sizes) - 1
    return [
        Bucket((last - number,), "float32", size)
        for number, size in enumerate(sizes)
    ]


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


@given(st.lists(st.none() | st.integers(0, 10**9), min_size=1, max_size=60))
def test_every_gradient_is_in_one_part_in_the_order_of_backprop(sizes):
    parts = parts_of(packs_of(*sizes))
    assert 1 <= len(parts) <= MOST_PARTS
    assert sum(parts, ()) == tuple(reversed(range(len(sizes))))
