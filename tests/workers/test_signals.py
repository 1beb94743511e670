"""What TensorFlow does to the process is undone."""

import ctypes
import os
import signal
import sys
import threading

import pytest

from keras_allreduce.workers import signals

_LIBC = ctypes.CDLL(None)
_IGNORE = ctypes.c_void_p(1)


def ignore_in_c():
    """What TensorFlow does: Python does not hear of it."""
    _LIBC.signal(signal.SIGUSR1, _IGNORE)


@pytest.fixture
def heard():
    """Signals that a handler of the script has got."""
    received = []
    before = signal.signal(
        signal.SIGUSR1, lambda number, frame: received.append(number)
    )
    yield received
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_of_the_script_runs_again(heard):
    with signals.kept():
        ignore_in_c()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


def test_it_is_put_back_in_a_thread_too(heard):
    def make():
        with signals.kept():
            ignore_in_c()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


def test_it_is_put_back_after_an_error(heard):
    @signals.kept()
    def fail():
        ignore_in_c()
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


def test_a_handler_that_only_c_knows_is_put_back():
    ignore_in_c()
    try:
        with signals.kept():
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGUSR1)  # Would end this process.
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_exception_hooks_are_put_back():
    before = sys.excepthook, threading.excepthook
    with signals.kept():
        sys.excepthook = threading.excepthook = print
    assert (sys.excepthook, threading.excepthook) == before
