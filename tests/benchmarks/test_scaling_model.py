"""The cost model of benchmarks/scaling_model.py, with numbers by hand."""

import math

import pytest
import scaling_model
from scaling_model import Inside, Link, Point

from keras_allreduce.reduce import cost_model, pack_sizes

MIB = 2**20

# 1 ms a step, 100 MB/s, 1 ns to add up a byte.
LINK = Link(alpha=1e-3, bandwidth=1e8, gamma=1e-9)


INSIDE = Inside(fixed=1e-3, gamma=1e-9)
COSTS = {
    # 2 x 1 ms, 2 x 5 ms for half of a MB, and 0.5 ms to add half of it up.
    "ring of two": (scaling_model.ring_seconds, (10**6, 2, LINK), 12.5),
    # 6 x 1 ms, 6 x 2.5 ms, 0.75 ms.
    "ring of four": (scaling_model.ring_seconds, (10**6, 4, LINK), 21.75),
    # 2 x 1 ms, 2 x 0.1 ms, 0.02 ms.
    "exchange": (scaling_model.exchange_seconds, (10**4, 3, LINK), 2.22),
    "one worker": (scaling_model.workers_seconds, (MIB, 1, LINK), 0.0),
    # Reads each other device once.
    "inside": (scaling_model.inside_seconds, (10**6, 8, INSIDE), 8.0),
    "one device": (scaling_model.inside_seconds, (10**6, 1, INSIDE), 0.0),
    # 2 ms inside, 12.5 ms for the ring of two.
    "hierarchical": (
        scaling_model.hierarchical_seconds,
        (10**6, 2, 2, LINK, INSIDE),
        14.5,
    ),
    "hierarchical, one device each": (
        scaling_model.hierarchical_seconds,
        (10**6, 2, 1, LINK, INSIDE),
        12.5,
    ),
}


@pytest.mark.parametrize(("cost", "of", "ms"), COSTS.values(), ids=COSTS)
def test_a_sum_costs_what_is_computed_by_hand(cost, of, ms):
    assert cost(*of) == pytest.approx(ms / 1e3)


@pytest.mark.parametrize("workers", [2, 3])
def test_small_tensors_are_exchanged_and_larger_ones_go_round(workers):
    small = pack_sizes.small_bytes(workers)
    assert scaling_model.workers_seconds(
        small, workers, LINK
    ) == scaling_model.exchange_seconds(small, workers, LINK)
    assert scaling_model.workers_seconds(
        small + 4, workers, LINK
    ) == scaling_model.ring_seconds(small + 4, workers, LINK)


@pytest.mark.parametrize(
    ("processes", "factor"), [(1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0)]
)
def test_processes_beyond_the_cores_share_them(processes, factor):
    assert scaling_model.crowding(processes, cores=2) == factor


def test_crowded_cores_slow_the_bytes_only_where_they_carry_them():
    crowded = scaling_model.crowded
    assert crowded(LINK, 2.0, by_cores=True) == Link(2e-3, 5e7, 2e-9)
    assert crowded(LINK, 2.0, by_cores=False) == Link(2e-3, 1e8, 2e-9)


@pytest.mark.parametrize("gamma", [0.0, 1e-9])
def test_the_fit_finds_what_made_the_points(gamma):
    link = Link(alpha=7e-4, bandwidth=3e8, gamma=gamma)
    points = [
        Point(nbytes, 2, scaling_model.workers_seconds(nbytes, 2, link))
        for nbytes in (4096, 65536, MIB, 16 * MIB)
    ]
    found = scaling_model.fit_link(points, gamma)
    assert found.alpha == pytest.approx(7e-4)
    assert found.bandwidth == pytest.approx(3e8)


def test_the_fit_inside_finds_what_made_the_points():
    inside = Inside(fixed=5e-5, gamma=2e-10)
    points = [
        Point(
            nbytes,
            devices,
            scaling_model.inside_seconds(nbytes, devices, inside),
        )
        for nbytes in (4096, MIB)
        for devices in (2, 4)
    ]
    found = scaling_model.fit_inside(points)
    assert found.fixed == pytest.approx(5e-5)
    assert found.gamma == pytest.approx(2e-10)


def test_one_point_is_too_few_to_fit():
    with pytest.raises(ValueError, match="from 1 points"):
        scaling_model.fit_link([Point(MIB, 2, 1e-2)])


def test_larger_messages_that_cost_less_are_not_fitted():
    points = [Point(65536, 2, 2e-2), Point(MIB, 2, 1e-3)]
    with pytest.raises(ValueError, match="positive cost"):
        scaling_model.fit_link(points)


def test_all_but_the_last_pack_hides_behind_a_slow_backprop():
    exposed = scaling_model.exposed_seconds(
        4 * MIB, compute=1.0, pack_bytes=MIB, cost=lambda nbytes: 0.1
    )
    assert exposed == pytest.approx(0.1)


def test_packs_queue_where_they_cost_more_than_backprop():
    # Ready at 0.5, 0.6667, 0.8333 and 1; the first starts at 0.5 and each
    # takes 1 s.
    exposed = scaling_model.exposed_seconds(
        4 * MIB, compute=1.0, pack_bytes=MIB, cost=lambda nbytes: 1.0
    )
    assert exposed == pytest.approx(3.5)


def test_packs_overlap_but_for_what_keeps_the_link_busy():
    # Ready as above; each is there 1 s after it began, and the next one can
    # begin after 0.25 s: at 0.5, 0.75, 1.0 and 1.25.
    exposed = scaling_model.exposed_seconds(
        4 * MIB,
        compute=1.0,
        pack_bytes=MIB,
        cost=lambda nbytes: 1.0,
        busy=lambda nbytes: 0.25,
    )
    assert exposed == pytest.approx(1.25)


def test_packs_leave_when_backprop_has_them():
    # Ready at 0.4, 0.4 and 1; the first two end at 0.6 and 0.8.
    exposed = cost_model.exposed_seconds(
        [MIB] * 3, 1.0, lambda nbytes: 0.2, ready=[0.1, 0.1, 1.0]
    )
    assert exposed == pytest.approx(0.2)


def test_a_busy_link_still_carries_all_bytes():
    busy = LINK.busy()
    assert busy.bandwidth == LINK.bandwidth
    assert 0 < busy.alpha < LINK.alpha


def test_the_last_pack_carries_what_is_left():
    sizes = []

    def cost(nbytes):
        sizes.append(nbytes)
        return 0.0

    scaling_model.exposed_seconds(
        5,
        1.0,
        2,
        cost=cost,
        busy=lambda nbytes: 0.0,
    )
    assert sizes == [2, 2, 1]


def test_latency_asks_for_larger_packs():
    def cost(nbytes):
        return scaling_model.ring_seconds(nbytes, 64, LINK)

    # 1 MiB costs 0.15 s, of which 0.13 s are latency.
    assert scaling_model.best_pack(8 * MIB, 0.1, cost) == 8 * MIB


def test_efficiency_is_the_share_of_computing():
    assert scaling_model.efficiency(0.3, 0.1) == pytest.approx(0.75)
    assert scaling_model.efficiency(0.3, 0.0) == 1
    assert math.isclose(scaling_model.efficiency(0.1, 0.1), 0.5)
