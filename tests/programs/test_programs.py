"""Programs written for one device train on replicas as on one, unchanged."""

import pytest
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy
from programs import COMPARING, PROGRAMS, agree, on_one_device, run


def cells():
    """Each program on each of its numbers of replicas."""
    for name, each in PROGRAMS.items():
        for replicas in each.replicas:
            marks = [] if each.fast and replicas == 3 else [pytest.mark.slow]
            if "replicas" in each.nightly:
                marks.append(pytest.mark.nightly)
            yield pytest.param(
                *(name, replicas), id=f"{name}-{replicas}", marks=marks
            )


@pytest.mark.parametrize(("name", "replicas"), list(cells()))
def test_replicas_train_as_one_device_does(name, replicas):
    options = dict(PROGRAMS[name].options)
    strategy = AllReduceStrategy(DEVICES[:replicas], **options)
    found, warned = run(name, strategy)
    wanted, also_on_one_device = on_one_device(name)
    agree(name, found, wanted)
    # Keras warns on every replica of gradients that do not exist.
    assert set(warned) == set(also_on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARING)
def test_a_loss_that_compares_samples_is_warned_about_once(name):
    _, warned = run(name, AllReduceStrategy(DEVICES[:2]))
    # Keras's own, of weights that a loss does not use.
    (warning,) = (each for each in warned if "Gradients do not" not in each)
    assert "neither the mean nor the sum" in warning


@pytest.mark.slow
def test_the_option_says_what_a_loss_is():
    strategy = AllReduceStrategy(DEVICES[:2], weigh_samples=False)
    found, warned = run("plain_sum", strategy)
    agree("plain_sum", found, on_one_device("plain_sum")[0])
    assert not warned
    strategy = AllReduceStrategy(DEVICES[:2], weigh_samples=True)
    _, warned = run("negatives_in_a_step", strategy)
    assert not any("neither the mean" in warning for warning in warned)


def test_every_program_runs_somewhere():
    for name, each in PROGRAMS.items():
        assert each.replicas or each.on or each.feature, name


def test_the_fast_tests_train():
    assert sum(each.fast for each in PROGRAMS.values()) >= 25
