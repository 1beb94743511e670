"""Hints from steps that were drawn by hand: sure and worth it, or none."""

from dataclasses import replace

import numpy as np
import pytest

from keras_allreduce.fit_output.hints import Measured, hint
from keras_allreduce.reduce.buckets import Bucket
from keras_allreduce.reduce.plan import ReducePlan

STEPS = 6
MIB = 2**20


def plan(sizes, num_sparse=0):
    """A plan of packs of these sizes; the last `num_sparse` are sparse."""
    dense = len(sizes) - num_sparse
    return ReducePlan(
        num_gradients=2 * dense,
        num_sparse=num_sparse,
        algorithm="shared_memory",
        reason="",
        num_packs=dense,
        nbytes=None if num_sparse else sum(sizes),
        dtypes=("float32",),
        num_replicas=2,
        packs=tuple(
            Bucket((number,), "float32", size)
            for number, size in enumerate(sizes)
        ),
    )


def measured(
    packs, sizes, step_ms=100.0, between_ms=1.0, steps=100, epochs=10, **more
):
    """Steps of packs that are in flight `[from, to]`, in ms."""
    times = np.array([packs] * STEPS, dtype=float) / 1e3
    times += np.arange(STEPS)[:, None, None] * step_ms / 1e3
    num_sparse = more.pop("num_sparse", 0)
    return Measured(
        step_ms,
        between_ms,
        times[:, :, 0],
        times[:, :, 1],
        plan(sizes, num_sparse),
        steps,
        steps * epochs,
        **more,
    )


EXPOSED = ([[0, 10], [20, 40], [50, 90]], [MIB, 2 * MIB, 4 * MIB])


def test_a_hint_says_what_how_much_and_how_to_hide_it():
    assert hint(measured(*EXPOSED, between_ms=30.0)) == (
        "hint: 30ms of 100ms per step (30%, without the first step) pass "
        "between two steps, in Keras and in callbacks. "
        "compile(steps_per_execution=8) pays this once every 8 steps; batch "
        "callbacks then run once per 8 steps. "
        "(KERAS_ALLREDUCE_HINT=0 hides this line.)"
    )


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (
            measured([[50, 70]], [MIB], bytes_per_pack=MIB),
            "Leave bytes_per_pack out",
        ),
        (
            measured(
                [[40, 41], [50, 80]],
                [MIB, None],
                num_sparse=1,
                tables=[2**16],
            ),
            "sparse_as_dense=True",
        ),
        (
            measured([[0, 1]], [MIB], between_ms=30.0),
            "steps_per_execution",
        ),
        (
            measured(*EXPOSED, lateness_ms=25.0, last_worker=3),
            "worker 3 comes last",
        ),
    ],
    ids=["one pack", "sparse", "between", "straggler"],
)
def test_what_would_help_is_named(seen, word):
    assert word in hint(seen)


@pytest.mark.parametrize(
    "seen",
    [
        measured([[0, 30]], [MIB], step_ms=1000.0),
        measured(*EXPOSED),
        measured([[50, 70]], [MIB]),
        measured(
            [[40, 41], [50, 80]],
            [MIB, None],
            num_sparse=1,
            tables=[100 * MIB],
        ),
        measured(
            [[40, 41], [50, 80]],
            [MIB, None],
            num_sparse=1,
            tables=[2**16],
            sparse_as_dense=True,
        ),
        measured([[0, 50], [80, 81]], [MIB, MIB], lateness_ms=25.0),
    ],
    ids=[
        "little of a long step",
        "nothing that can be changed",
        "the default packs",
        "a large table",
        "dense already",
        "lateness that is hidden",
    ],
)
def test_what_is_not_sure_is_not_said(seen):
    assert hint(seen) is None


def test_the_largest_gain_is_told():
    late = {"lateness_ms": 25.0, "last_worker": 3}
    seen = measured(*EXPOSED, between_ms=24.0, **late)
    assert "worker 3 comes last" in hint(seen)
    seen = measured(*EXPOSED, between_ms=30.0, **late)
    assert "steps_per_execution" in hint(seen)


def test_a_few_steps_are_not_enough():
    seen = measured(*EXPOSED)
    few = replace(
        seen, between_ms=90.0, ready=seen.ready[:4], done=seen.done[:4]
    )
    assert hint(replace(seen, between_ms=90.0))
    assert hint(few) is None


@pytest.mark.parametrize(
    ("steps", "per_call", "advised"),
    [
        (100, 1, "steps_per_execution=8)"),
        (7, 1, "steps_per_execution=7)"),
        (100, 2, "steps_per_execution=8)"),
    ],
)
def test_no_more_steps_per_call_are_advised_than_an_epoch_has(
    steps, per_call, advised
):
    seen = measured(
        *EXPOSED, between_ms=60.0, steps=steps, steps_per_call=per_call
    )
    assert advised in hint(seen)


@pytest.mark.parametrize(("steps", "per_call"), [(100, 8), (6, 6), (1, 1)])
def test_as_many_steps_per_call_as_are_advised_are_enough(steps, per_call):
    seen = measured(
        *EXPOSED,
        between_ms=60.0,
        steps=steps,
        epochs=1000,
        steps_per_call=per_call,
    )
    assert hint(seen) is None


@pytest.mark.parametrize(("epochs", "is_said"), [(4, False), (5, True)])
def test_less_than_a_second_of_the_whole_fit_is_not_said(epochs, is_said):
    # 7/8 of 24 ms in each of 10 steps: 0.21 s per epoch.
    seen = measured(*EXPOSED, between_ms=24.0, steps=10, epochs=epochs)
    assert (hint(seen) is not None) == is_said


def test_what_would_be_exposed_without_some_packs():
    seen = measured([[40, 41], [50, 80]], [MIB, MIB])
    assert seen.exposed_ms == pytest.approx(30)
    assert seen.exposed_of([0]) == pytest.approx(0)
    assert seen.exposed_of([]) == 0
