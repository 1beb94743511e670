"""Two workers that wait at different places never meet."""

import pytest

from keras_allreduce.workers.place import (
    COMPARISON,
    OUTSIDE,
    STEP,
    Place,
    never_meet,
)

IN_FIT = {"call": "fit, epoch 1 of 5", "calls": (1,), "begun": 1}


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (Place(waits_in=STEP), Place(waits_in=OUTSIDE)),
        (Place(waits_in=OUTSIDE), Place(waits_in=STEP)),
        (Place(waits_in=STEP), Place(waits_in=COMPARISON)),
        (Place(waits_in=STEP), Place(ended=True)),
        (Place(waits_in=COMPARISON), Place(ended=True)),
        (Place(waits_in=STEP), Place(failure=("WorkerError", "why"))),
        # It has ended the call, and works on something else.
        (Place(waits_in=STEP, **IN_FIT), Place(begun=1)),
        # It has ended it, and is in the next.
        (Place(waits_in=STEP, **IN_FIT), Place(calls=(2,), begun=2)),
        # It has ended the inner one of two.
        (
            Place(waits_in=STEP, calls=(1, 2), begun=2),
            Place(calls=(1,), begun=2),
        ),
    ],
)
def test_a_worker_waits_in_vain_for_one_that_cannot_come(own, other):
    assert never_meet(own, other)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (Place(waits_in=STEP), Place(waits_in=STEP)),
        (Place(waits_in=COMPARISON), Place(waits_in=COMPARISON)),
        # It is late.
        (Place(waits_in=STEP, **IN_FIT), Place(**IN_FIT)),
        # It has not yet begun the call.
        (Place(waits_in=COMPARISON, **IN_FIT), Place()),
        # Both train in a custom loop after `fit`.
        (Place(waits_in=STEP, begun=1), Place(begun=1)),
        # It evaluates in a callback, which this one has still to do.
        (Place(waits_in=STEP, **IN_FIT), Place(calls=(1, 2), begun=2)),
    ],
)
def test_a_worker_waits_for_one_that_can_still_come(own, other):
    assert not never_meet(own, other)


def test_a_place_says_what_the_worker_does():
    assert str(Place(waits_in=STEP, **IN_FIT)) == (
        "waits in a step (fit, epoch 1 of 5)"
    )
    assert str(Place(ended=True, **IN_FIT)) == "has ended its script"
    assert str(Place(**IN_FIT)) == "is at work (fit, epoch 1 of 5)"
    assert str(Place()) == "is at work elsewhere"
    assert str(Place(failure=("WorkerError", "why"))) == "has failed"


def test_a_place_that_was_published_is_read_as_it_was():
    place = Place(waits_in=STEP, beat=3, saw_chief_end=True, **IN_FIT)
    assert Place.from_json(place.to_json()) == place
    place = Place(failure=("WorkerLostError", "worker 1 has failed"))
    assert Place.from_json(place.to_json()) == place
