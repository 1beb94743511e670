"""Programs written for one device train as on one device, unchanged."""

import contextlib
import functools
import warnings

import keras
import numpy as np
import pytest
from five_devices import DEVICES
from programs import COMPARING, PROGRAMS

import keras_allreduce

pytestmark = pytest.mark.slow


def run(train, replicas, **options):
    """What a program returns, and its warnings."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    scope = contextlib.nullcontext()
    if replicas > 1:
        strategy = keras_allreduce.AllReduceStrategy(
            DEVICES[:replicas], **options
        )
        scope = strategy.scope()
    with warnings.catch_warnings(record=True) as caught, scope:
        warnings.simplefilter("always")
        found = train()
    return found, [
        str(each.message)
        for each in caught
        if issubclass(each.category, UserWarning)
    ]


@functools.cache
def on_one_device(name):
    return run(PROGRAMS[name], 1)


def agree(found, wanted):
    keras.tree.assert_same_structure(found, wanted)
    for (path, got), (_, want) in zip(
        keras.tree.flatten_with_path(found),
        keras.tree.flatten_with_path(wanted),
        strict=True,
    ):
        np.testing.assert_allclose(
            got, want, rtol=1e-5, atol=2e-6, err_msg=str(path)
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_on_three_replicas_as_on_one_device(name):
    found, warned = run(PROGRAMS[name], 3)
    wanted, also_on_one_device = on_one_device(name)
    agree(found, wanted)
    assert warned == also_on_one_device


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize(
    "name", ["plain_mean", "plain_sum", "loss_of_one_value_that_is_a_mean"]
)
def test_a_program_trains_on_any_number_of_replicas(name, replicas):
    found, warned = run(PROGRAMS[name], replicas)
    wanted, also_on_one_device = on_one_device(name)
    agree(found, wanted)
    assert warned == also_on_one_device


@pytest.mark.parametrize("name", COMPARING)
def test_a_loss_that_compares_samples_is_warned_about_once(name):
    _, warned = run(COMPARING[name], 2)
    # Keras's own, of weights that a loss does not use.
    (warning,) = (each for each in warned if "Gradients do not" not in each)
    assert "neither the mean nor the sum" in warning


def test_the_option_says_what_a_loss_is():
    found, warned = run(PROGRAMS["plain_sum"], 2, weigh_samples=False)
    agree(found, on_one_device("plain_sum")[0])
    assert not warned
    _, warned = run(COMPARING["negatives_in_a_step"], 2, weigh_samples=True)
    assert not any("neither the mean" in warning for warning in warned)
