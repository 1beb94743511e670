"""The log of decisions that `KERAS_ALLREDUCE_DEBUG=1` turns on."""

import re

from five_devices import DEVICES
from small_model import X, Y, make_model

from keras_allreduce import AllReduceStrategy


def fit():
    model = make_model(AllReduceStrategy(DEVICES[:2]))
    model.fit(X, Y, verbose=0)


def test_strategy_and_plan_are_logged(monkeypatch, capfd):
    monkeypatch.setenv("KERAS_ALLREDUCE_DEBUG", "1")
    fit()
    lines = [
        line.partition("): ")[2]
        for line in capfd.readouterr().err.splitlines()
        if re.match(r"keras_allreduce \d\d:\d\d:\d\d\.\d{3} \(process", line)
    ]
    assert lines[0].startswith("AllReduceStrategy: devices here: ")
    assert "; TensorFlow " in lines[0]
    (plan,) = [line for line in lines if "a step was traced" in line]
    assert "batch_all_reduce: " in plan
    assert [
        line for line in lines if re.match(r"pack 0: \d+ bytes of fl", line)
    ]


def test_without_it_nothing_is_logged(monkeypatch, capfd):
    for off in (None, "0", ""):
        if off is None:
            monkeypatch.delenv("KERAS_ALLREDUCE_DEBUG", raising=False)
        else:
            monkeypatch.setenv("KERAS_ALLREDUCE_DEBUG", off)
        AllReduceStrategy(DEVICES[:2])
    assert "(process" not in capfd.readouterr().err
