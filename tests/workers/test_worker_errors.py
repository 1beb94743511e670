"""Errors that one worker publishes and the others raise."""

import pytest
import tensorflow as tf

from keras_allreduce.workers import errors


@pytest.mark.parametrize(
    "kind",
    [
        errors.WorkerError,
        errors.WorkerStartError,
        errors.WorkersDifferError,
        errors.WorkerTimeoutError,
        errors.WorkerLostError,
    ],
)
def test_an_error_is_raised_again_as_it_was(kind):
    again = errors.from_name(kind.__name__, "why")
    assert type(again) is kind
    assert str(again) == "why"


@pytest.mark.parametrize("name", ["OfTheScript", "tf", "Any", "_NO_REASONS"])
def test_a_class_that_others_do_not_have_is_a_worker_error(name):
    assert type(errors.from_name(name, "why")) is errors.WorkerError


class UnsayableError(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(), "ValueError"),
        (KeyError("k"), "KeyError: 'k'"),
        (ValueError('it is "x" in C:\\d'), "ValueError: it is 'x' in C:/d"),
        (ValueError("\udcff"), "ValueError: /udcff"),
        (UnsayableError(), "UnsayableError"),
        (ValueError("x" * 999), "ValueError: " + 188 * "x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_a_script_is_shown_in_a_line(error, text):
    assert errors.shown(error) == text


def test_of_an_error_in_a_graph_the_reason_is_shown():
    @tf.function
    def fail(x):
        tf.debugging.assert_equal(x, 1, message="must be one")

    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        fail(tf.constant(2))
    shown = errors.shown(raised.value)
    assert shown.startswith("InvalidArgumentError: ")
    assert "must be one" in shown
