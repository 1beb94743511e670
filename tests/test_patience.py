"""A worker that waits for others to start says so, once."""

import threading

import pytest
from deadlines import DEADLINE_SECONDS

from keras_allreduce.workers import patience


@pytest.fixture
def said(monkeypatch):
    """What is logged, and an event that is set then."""
    messages, event = [], threading.Event()

    def warning(text, *arguments):
        messages.append(text % arguments)
        event.set()

    monkeypatch.setattr(patience.logging, "warning", warning)
    return messages, event


def test_a_worker_that_waits_for_long_says_so(said, monkeypatch):
    messages, event = said
    monkeypatch.setattr(patience, "_SILENT_SECONDS", 0.01)
    with patience.waits_for_start("worker 1 (b:1)", 600.0):
        assert event.wait(DEADLINE_SECONDS)
    assert messages == [
        "keras_allreduce: worker 1 (b:1) waits for the other workers to start, "
        "for at most timeout_seconds=600."
    ]


def test_a_worker_whose_others_come_says_nothing(said, monkeypatch):
    messages, event = said
    monkeypatch.setattr(patience, "_SILENT_SECONDS", 0.2)
    with patience.waits_for_start("worker 1 (b:1)", 600.0):
        pass
    assert not event.wait(0.5)
    assert not messages
