"""A worker knows in which call of Keras it is, and what it waits for."""

import gc

from keras_allreduce.workers import whereabouts as module
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.place import COMPARISON, OUTSIDE
from keras_allreduce.workers.whereabouts import Whereabouts


class Iterator:
    """Stands for Keras's, which is gone when the call has ended."""


def test_a_call_is_there_until_its_iterator_is_gone():
    whereabouts = Whereabouts(InFlight())
    fit = Iterator()
    whereabouts.begin_call(3, "fit", fit)
    assert whereabouts.place().calls == (3,)
    assert whereabouts.place().call == "fit"
    del fit
    gc.collect()
    place = whereabouts.place()
    assert (place.calls, place.call, place.begun) == ((), "", 3)


def test_the_call_that_has_gone_on_last_is_the_innermost():
    whereabouts = Whereabouts(InFlight())
    fit, validation = Iterator(), Iterator()
    whereabouts.begin_call(3, "fit", fit)
    whereabouts.begin_call(5, "evaluate in fit", validation)
    assert whereabouts.place().calls == (3, 5)
    whereabouts.rename(3, "fit, epoch 2 of 2")
    place = whereabouts.place()
    assert (place.calls, place.call) == ((5, 3), "fit, epoch 2 of 2")
    assert place.begun == 5


def test_what_takes_long_is_a_wait(monkeypatch):
    in_flight = InFlight()
    whereabouts = Whereabouts(in_flight)
    with whereabouts.comparing():
        assert whereabouts.place().waits_in == ""
    monkeypatch.setattr(module, "WAITS_SECONDS", 0.0)
    with whereabouts.comparing():
        assert whereabouts.place().waits_in == COMPARISON
    with in_flight.during():
        assert whereabouts.place().waits_in == OUTSIDE
