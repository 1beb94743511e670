"""Hints from steps that were drawn by hand: sure and worth it, or none."""

import numpy as np
import pytest

from keras_allreduce.fit_output.hints import Measured, Options, hint
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


def measured(packs, sizes, step_ms=100.0, between_ms=1.0, **more):
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
        **more,
    )


WORKERS = Options(num_workers=2)
# Time goes with the bytes: 10 ms for a MiB.
BY_BYTES = ([[0, 10], [20, 40], [50, 90]], [MIB, 2 * MIB, 4 * MIB])
# Each message takes 30 ms, whatever its size.
BY_MESSAGES = ([[0, 30], [20, 51], [50, 82]], [MIB, 2 * MIB, 4 * MIB])


def test_a_hint_says_what_how_much_and_how_to_hide_it():
    assert hint(measured(*BY_BYTES), WORKERS) == (
        "hint: 40ms of 100ms per step (40%) wait for the all-reduce, and 100% "
        'of its time goes with the bytes. wire_dtype="bfloat16" halves them: '
        "up to 20ms less. (KERAS_ALLREDUCE_HINT=0 hides this line.)"
    )


@pytest.mark.parametrize(
    ("seen", "options", "word"),
    [
        (measured(*BY_BYTES), WORKERS, 'wire_dtype="bfloat16"'),
        (
            measured([[50, 70]], [MIB]),
            Options(bytes_per_pack=MIB),
            "Leave bytes_per_pack out",
        ),
        (
            measured(
                [[40, 41], [50, 80]],
                [MIB, None],
                num_sparse=1,
                tables=[2**16],
            ),
            Options(),
            "sparse_as_dense=True",
        ),
        (
            measured([[0, 1]], [MIB], between_ms=30.0),
            Options(),
            "steps_per_execution",
        ),
        (
            measured(*BY_MESSAGES, lateness_ms=25.0, last_worker=3),
            WORKERS,
            "worker 3 comes last",
        ),
    ],
    ids=["wire", "one pack", "sparse", "between", "straggler"],
)
def test_what_would_help_is_named(seen, options, word):
    assert word in hint(seen, options)


@pytest.mark.parametrize(
    ("seen", "options"),
    [
        (measured([[0, 30]], [MIB], step_ms=1000.0), Options()),
        (measured(*BY_BYTES, step_ms=400.0), WORKERS),
        (measured(*BY_BYTES), Options()),
        (measured(*BY_BYTES), Options(num_workers=2, wire_dtype="bfloat16")),
        (measured(*BY_MESSAGES), WORKERS),
        (measured([[50, 70]], [MIB]), Options()),
        (
            measured(
                [[40, 41], [50, 80]],
                [MIB, None],
                num_sparse=1,
                tables=[100 * MIB],
            ),
            Options(),
        ),
        (
            measured(
                [[40, 41], [50, 80]],
                [MIB, None],
                num_sparse=1,
                tables=[2**16],
            ),
            Options(sparse_as_dense=True),
        ),
        (
            measured([[0, 50], [80, 81]], [MIB, MIB], lateness_ms=25.0),
            WORKERS,
        ),
    ],
    ids=[
        "little of a long step",
        "not worth it",
        "one process",
        "narrow already",
        "messages, not bytes",
        "the default packs",
        "a large table",
        "dense already",
        "lateness that is hidden",
    ],
)
def test_what_is_not_sure_is_not_said(seen, options):
    assert hint(seen, options) is None


def test_the_largest_gain_is_told():
    seen = measured(*BY_BYTES, between_ms=19.0)
    assert "bfloat16" in hint(seen, WORKERS)
    seen = measured(*BY_BYTES, between_ms=21.0)
    assert "steps_per_execution" in hint(seen, WORKERS)


def test_a_few_steps_are_not_enough():
    seen = measured(*BY_BYTES)
    few = Measured(seen.step_ms, 90.0, seen.ready[:4], seen.done[:4], seen.plan)
    assert hint(few, WORKERS) is None


def test_what_would_be_exposed_without_some_packs():
    seen = measured([[40, 41], [50, 80]], [MIB, MIB])
    assert seen.exposed_ms == pytest.approx(30)
    assert seen.exposed_of([0]) == pytest.approx(0)
    assert seen.exposed_of([]) == 0
