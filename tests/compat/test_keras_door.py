"""The door is made once, can be closed, and says where Keras does not fit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce.compat import keras_calls, keras_door


@pytest.fixture
def not_installed(monkeypatch):
    """The door as before the first strategy; afterwards as it was."""
    for owner, name, _, _ in keras_door._doors():
        known = getattr(owner, name)
        stock = getattr(known, "__wrapped__", known)
        monkeypatch.setattr(owner, name, stock)
    monkeypatch.setattr(keras_door, "_state", {"installed": False})
    monkeypatch.setattr(keras_door, "_warned", set())
    monkeypatch.setattr(keras_door, "_wrapped", set())


def wrapped():
    return [
        name
        for owner, name, _, _ in keras_door._doors()
        if getattr(owner, name, None).__module__ != "keras_allreduce"
        and hasattr(getattr(owner, name), "__wrapped__")
    ]


def methods():
    return [
        getattr(owner, name, None) for owner, name, _, _ in keras_door._doors()
    ]


def test_methods_are_wrapped_once(not_installed, recwarn):
    before = methods()
    keras_door.install()
    installed = methods()
    assert all(
        one is not other for one, other in zip(before, installed, strict=True)
    )
    keras_door.install()
    assert methods() == installed
    assert not recwarn.list


def test_a_closed_door_leaves_keras_as_it_is(not_installed, monkeypatch):
    monkeypatch.setenv("KERAS_ALLREDUCE_DOOR", "0")
    before = methods()
    with pytest.warns(UserWarning, match="Unset KERAS_ALLREDUCE_DOOR"):
        keras_door.install()
    assert methods() == before
    assert not keras_door.makes_functions()


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("_maybe_symbolic_build", "first batch of a Python generator"),
        ("get_metrics_result", "metrics one by one"),
        ("make_train_function", "taken for a custom loop"),
        ("make_test_function", "taken for a custom loop"),
        ("make_predict_function", "fewer samples than replicas"),
    ],
)
def test_a_keras_without_a_method_is_warned_about(
    not_installed, monkeypatch, name, lost
):
    monkeypatch.delattr(keras.Model, name)
    for owner in keras.Model.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    with pytest.warns(UserWarning, match=f"expects `{name}` in Keras") as found:
        keras_door.install()
    (warning,) = found
    assert lost in str(warning.message)


def test_a_variable_that_is_made_another_way_is_warned_about(
    not_installed, monkeypatch
):
    class Variable:
        """As a Keras to come may have it."""

    monkeypatch.setattr(keras, "Variable", Variable)
    with pytest.warns(UserWarning, match="about variables do not name them"):
        keras_door.install()


def test_a_step_that_runs_in_another_function_is_warned_about(
    not_installed, monkeypatch
):
    monkeypatch.setattr(
        keras.Model,
        "make_train_function",
        lambda model: setattr(model, "train_function", "a graph"),
    )
    monkeypatch.setattr(keras_door, "_is_ours", lambda model: True)
    keras_door.install()
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    with pytest.warns(UserWarning, match="expects `train_function` of a model"):
        model.make_train_function()


def test_a_method_with_other_arguments_is_left_alone(
    not_installed, monkeypatch
):
    def other(self, batches):
        """As a Keras to come may have it."""

    monkeypatch.setattr(keras.Model, "_maybe_symbolic_build", other)
    with pytest.warns(UserWarning, match="expects `_maybe_symbolic_build`"):
        keras_door.install()
    assert keras.Model._maybe_symbolic_build is other


def test_a_keras_without_its_iterator_is_warned_about(
    not_installed, monkeypatch
):
    monkeypatch.setattr(keras_calls, "epoch_iterator_class", lambda: None)
    with pytest.warns(UserWarning, match="workers do not compare their calls"):
        keras_door.install()


def test_a_fit_that_shows_no_iterator_is_warned_about(
    not_installed, monkeypatch
):
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **kwargs: None)
    monkeypatch.setattr(keras_door, "_is_ours", lambda model: True)
    keras_door.install()
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    with pytest.warns(UserWarning, match="expects an iterator over the epochs"):
        model.fit()


class Almost(keras.initializers.Zeros):
    """Not all zeros."""

    def __call__(self, shape, dtype=None):
        return super().__call__(shape, dtype) + len(shape)


@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        ("zeros", "zeros of float32 [2, 3]"),
        (keras.initializers.Ones(), "ones of float32 [2, 3]"),
        ("glorot_uniform", None),
        (keras.initializers.Constant(0.0), None),
        (Almost(), None),
        (lambda shape, dtype: tf.zeros(shape, dtype), None),
    ],
    ids=["zeros", "ones", "random", "constant", "subclass", "function"],
)
def test_the_initial_value_of_a_variable_is_known_by_its_initializer(
    initializer, expected
):
    found, others = [], []

    def make(next_creator, **kwargs):
        found.append(keras_calls.constant_of(kwargs["initial_value"]))
        # Such as a creator of the user's may put in its place.
        others.append(keras_calls.constant_of(lambda: tf.ones([2, 3])))
        return next_creator(**kwargs)

    keras_door.install()
    with tf.variable_creator_scope(make):
        keras.Variable(initializer, shape=[2, 3])
        keras.Variable(np.zeros([2, 3]))
        tf.Variable(tf.zeros([2, 3]))
    assert found == [expected, None, None]
    assert others == [None, None, None]
