"""The one change to Keras: made once, and given up without harm."""

import inspect
import re
import warnings

import keras
import pytest
from five_devices import DEVICES
from small_model import fit, make_model

from keras_allreduce import AllReduceLogger, AllReduceStrategy
from keras_allreduce.fit_output import progress_bar


@pytest.fixture
def uninstalled(monkeypatch):
    """Keras as it is before the first strategy."""
    state = {"installed": False, "warned": False}
    monkeypatch.setattr(progress_bar, "_state", state)
    callbacks = keras.callbacks.CallbackList
    constructor = inspect.unwrap(callbacks.__init__)
    monkeypatch.setattr(callbacks, "__init__", constructor)


def test_without_its_hook_point_it_warns_once_and_training_goes_on(
    uninstalled, monkeypatch, capsys
):
    monkeypatch.delattr(keras.callbacks, "CallbackList")
    with pytest.warns(UserWarning, match="Keras") as caught:
        strategies = [AllReduceStrategy(DEVICES[:2]) for _ in range(3)]
    (warning,) = caught
    assert re.match(
        r"The fit output cannot show the all-reduce with this version of "
        rf"Keras \({re.escape(keras.__version__)}\): .*CallbackList.*\. "
        r"Training goes on; keras_allreduce\.AllReduceLogger\(\) still "
        r"reports per epoch\.",
        str(warning.message),
    )
    history = fit(
        make_model(strategies[0]), callbacks=[AllReduceLogger()]
    ).history
    assert len(history["all_reduce_ms"]) == 2
    output = capsys.readouterr().out
    assert "Epoch 2/2" in output
    assert "batch_all_reduce" not in output


def test_a_callback_list_it_does_not_know_is_left_as_it_is(
    uninstalled, monkeypatch
):
    built = []
    monkeypatch.setattr(
        keras.callbacks.CallbackList,
        "__init__",
        lambda self, *args, **kwargs: built.append(args),
    )
    AllReduceStrategy(DEVICES[:2])
    with pytest.warns(UserWarning, match="cannot show the all-reduce"):
        keras.callbacks.CallbackList(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.callbacks.CallbackList(2)
    assert built == [(1,), (2,)]


def test_the_first_strategy_with_a_fit_log_makes_it(uninstalled):
    plain = keras.callbacks.CallbackList.__init__
    AllReduceStrategy(DEVICES[:2], fit_log=False)
    assert keras.callbacks.CallbackList.__init__ is plain
    AllReduceStrategy(DEVICES[:2])
    changed = keras.callbacks.CallbackList.__init__
    assert changed.__wrapped__ is plain
    AllReduceStrategy(DEVICES[:3])
    assert keras.callbacks.CallbackList.__init__ is changed
