"""A worker that waits for others to start says so, once."""

from types import SimpleNamespace

import pytest

from keras_allreduce.workers import connect


class FakeTimer:
    """Runs its function when the test says so, unless it was cancelled."""

    def __init__(self, seconds, function, arguments):
        self.seconds, self.run = seconds, lambda: function(*arguments)
        self.is_running = False
        timers.append(self)

    def start(self):
        self.is_running = True

    def cancel(self):
        self.is_running = False


timers = []


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    messages = []
    timers.clear()
    # Others, such as pytest-timeout, have timers too.
    fake = SimpleNamespace(Timer=FakeTimer)
    monkeypatch.setattr(connect, "threading", fake)
    monkeypatch.setattr(
        connect.logging,
        "warning",
        lambda text, *arguments: messages.append(text % arguments),
    )
    return messages


def test_a_worker_that_waits_for_long_says_so(said):
    with connect.waits_for_start("worker 1 (b:1)", 600.0):
        (timer,) = timers
        assert timer.is_running
        assert timer.daemon
        timer.run()
    assert said == [
        "keras_allreduce: worker 1 (b:1) waits for the other workers to start, "
        "for at most timeout_seconds=600."
    ]


def test_a_worker_whose_others_come_says_nothing(said):
    with connect.waits_for_start("worker 1 (b:1)", 600.0):
        pass
    (timer,) = timers
    assert not timer.is_running
    assert not said
