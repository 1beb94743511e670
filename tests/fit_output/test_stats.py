"""The cost of the all-reduce, on intervals drawn by hand."""

import math

import numpy as np
import pytest

from keras_allreduce.fit_output.stats import ReduceStats, measure, merge

GB = 10**9

# Intervals in seconds, [ready, done] of each pack, and the answer: seconds
# under way, and of those exposed.
ONE_STEP = {
    # |----|
    "one pack": ([[0, 4]], 4, 4),
    # |-------|
    #     |-------|
    "overlapping packs": ([[0, 2], [1, 4]], 4, 3),
    # |---|
    #         |---|
    "a gap": ([[0, 1], [5, 6]], 2, 1),
    # |---|
    #     |---|
    "end to end": ([[0, 2], [2, 4]], 4, 2),
    # |-----------|
    #     |---|
    "one inside the other": ([[0, 10], [1, 2]], 10, 9),
    # |---|
    #   |---|
    #             |---|
    #               |-------|
    "two groups": ([[0, 2], [1, 3], [6, 8], [7, 11]], 8, 4),
    "the same interval": ([[1, 3], [1, 3]], 2, 2),
    # Backprop ends before nothing is left to hide behind.
    "all done when the last is ready": ([[0, 2], [1, 2], [3, 3]], 2, 0),
    "a result before its gradient": ([[3, 2]], 0, 0),
    "one result before its gradient": ([[3, 2], [4, 6]], 2, 2),
}


def times(*steps):
    """`ready` and `done` of steps of `[ready, done]` per pack."""
    both = np.array(steps, dtype=float)
    return both[:, :, 0], both[:, :, 1]


def stats(steps, all_reduce_ms, exposed_ms, nbytes=100):
    return ReduceStats(steps, all_reduce_ms, exposed_ms, 2, nbytes, 2)


@pytest.mark.parametrize("order", [1, -1], ids=["as drawn", "reversed"])
@pytest.mark.parametrize(
    ("packs", "under_way", "exposed"), ONE_STEP.values(), ids=ONE_STEP.keys()
)
def test_a_step_is_measured_as_drawn(packs, under_way, exposed, order):
    measured = measure(*times(packs[::order]), nbytes=7, num_replicas=3)
    assert measured == ReduceStats(
        steps=1,
        all_reduce_ms=under_way * 1000.0,
        exposed_ms=exposed * 1000.0,
        num_packs=len(packs),
        nbytes=7,
        num_replicas=3,
    )


def test_the_means_are_over_steps():
    measured = measure(
        *times([[0, 2], [1, 4]], [[10, 11], [15, 16]]),
        nbytes=None,
        num_replicas=2,
    )
    assert measured.steps == 2
    assert measured.all_reduce_ms == 3000.0
    assert measured.exposed_ms == 2000.0
    assert measured.overlap == pytest.approx(1 / 3)


def test_overlap_is_the_hidden_share():
    assert stats(1, 4.0, 3.0).overlap == 0.25
    assert stats(1, 4.0, 0.0).overlap == 1.0
    assert stats(1, 4.0, 4.0).overlap == 0.0


@pytest.mark.parametrize(
    ("num_replicas", "gbps"), [(1, 0.0), (2, 2.0), (4, 3.0), (5, 3.2)]
)
def test_bandwidth_is_the_bus_bandwidth_of_nccl_tests(num_replicas, gbps):
    # 8 GB in 4 seconds.
    ready, done = times([[0, 4]])
    measured = measure(ready, done, 8 * GB, num_replicas)
    assert measured.all_reduce_gbps == pytest.approx(gbps)


def test_bandwidth_is_not_guessed_without_a_size():
    assert math.isnan(stats(1, 4.0, 3.0, nbytes=None).all_reduce_gbps)


def test_nothing_under_way_has_no_overlap_and_no_bandwidth():
    measured = stats(1, 0.0, 0.0)
    assert math.isnan(measured.overlap)
    assert math.isnan(measured.all_reduce_gbps)


def test_no_step_has_no_means():
    none = np.zeros([0, 2])
    measured = measure(none, none, nbytes=8, num_replicas=2)
    assert (measured.steps, measured.num_packs) == (0, 2)
    assert math.isnan(measured.all_reduce_ms)
    assert math.isnan(measured.exposed_ms)
    assert math.isnan(measured.overlap)
    assert math.isnan(measured.all_reduce_gbps)


def test_merged_means_weigh_every_step_the_same():
    merged = merge(stats(1, 8.0, 4.0), stats(3, 4.0, 0.0))
    assert merged == stats(4, 5.0, 1.0)


def test_measuring_in_parts_is_measuring_at_once():
    steps = [[[i, i + 2.0], [i + 1, i + 3.5 + i % 3]] for i in range(7)]
    parts = None
    for part in (steps[:1], steps[1:4], steps[4:]):
        ready, done = times(*part)
        parts = merge(parts, measure(ready, done, 8, 2))
    ready, done = times(*steps)
    at_once = measure(ready, done, 8, 2)
    assert parts.steps == at_once.steps
    assert parts.all_reduce_ms == pytest.approx(at_once.all_reduce_ms)
    assert parts.exposed_ms == pytest.approx(at_once.exposed_ms)


def test_merging_with_nothing_changes_nothing():
    nothing = stats(0, float("nan"), float("nan"))
    some = stats(2, 3.0, 1.0)
    assert merge(None, some) is some
    assert merge(nothing, some) is some
    assert merge(some, nothing) is some


def test_merging_keeps_the_plan_of_the_later():
    later = ReduceStats(1, 2.0, 1.0, num_packs=9, nbytes=None, num_replicas=4)
    merged = merge(stats(1, 4.0, 3.0), later)
    assert merged == ReduceStats(2, 3.0, 2.0, 9, None, 4)
