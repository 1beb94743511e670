"""Programs train with `jit_compile=True` on 3 replicas as on one device."""

import keras
import pytest
from clusters import trained
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy
from keras_allreduce.compat import keras_door
from programs import PROGRAMS, agree, on_one_device, run

# XLA rounds otherwise.
TOLERANCE = 1e-5

# Steps that go on with sums between the replicas: each compiles in seconds.
FAST = [
    "clips_gradients_itself",
    "custom_compute_loss",
    "gradient_by_hand",
    "no_optimizer",
    "optimizer_that_accumulates",
    "plain_mean",
    "step_of_an_optimizer_that_is_called_itself",
    "weights_that_a_step_updates_by_a_sum",
    "weights_that_a_step_updates_itself",
]

# Masks and state.
SLOW = [
    "masked_loss_with_weights",
    "state_that_a_layer_keeps",
]

NIGHTLY = [
    name
    for name, each in PROGRAMS.items()
    if each.is_like_one and name not in (*FAST, *SLOW)
]


@pytest.fixture
def all_compiled(monkeypatch):
    """`compile` of every model that is made, with XLA."""
    # A class that overrides `compile` is not compiled when it is loaded.
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    stock = owner.compile

    def compile_(self, *args, **kwargs):
        return stock(self, *args, **{"jit_compile": True} | kwargs)

    monkeypatch.setattr(owner, "compile", compile_)
    return monkeypatch


@pytest.mark.parametrize(
    "name",
    [
        *FAST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY),
    ],
)
@pytest.mark.filterwarnings("ignore:.*of whose ops XLA compiles")
def test_a_compiled_program_trains_as_on_one_device(name, all_compiled):
    found, _ = run(
        name, AllReduceStrategy(DEVICES[:3], **dict(PROGRAMS[name].options))
    )
    all_compiled.undo()
    agree(name, found, on_one_device(name)[0], TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", ["auto", False, True])
def test_what_the_user_has_set_is_what_the_model_says(jit_compile):
    model = trained(jit_compile=jit_compile)
    # Keras decides, which compiles nothing under a strategy.
    assert model.jit_compile == (jit_compile is True)
    assert keras_door.compiles_replicas(model) == (jit_compile is True)


@pytest.mark.slow
def test_eagerly_nothing_is_compiled():
    with pytest.warns(UserWarning, match="cannot also be True"):
        model = trained(jit_compile=True, run_eagerly=True)
    assert not keras_door.compiles_replicas(model)
