"""Programs train with `jit_compile=True` on 3 replicas as on one device."""

import keras
import numpy as np
import pytest
from clusters import trained
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy
from keras_allreduce.compat import keras_jit
from programs import PROGRAMS, on_one_device, run

pytestmark = pytest.mark.slow

# XLA rounds otherwise.
TOLERANCE = 1e-5

# Sums between the replicas, masks, added losses, clipping, accumulation, scaled
# losses, state, several optimizers, no optimizer, functions in a step.
FAST = [
    "added_losses_of_every_kind",
    "adversaries",
    "clips_gradients_itself",
    "custom_compute_loss",
    "gradient_by_hand",
    "layer_that_xla_compiles",
    "masked_loss_with_weights",
    "metrics_whose_state_is_no_sum",
    "optimizer_that_accumulates",
    "optimizer_that_clips",
    "optimizer_that_is_a_module",
    "optimizer_that_scales_the_loss",
    "plain_mean",
    "state_that_a_layer_keeps",
    "weights_that_a_step_updates_itself",
]


@pytest.fixture
def all_compiled(monkeypatch):
    """`compile` of every model that is made, with XLA."""
    stock = keras.Model.compile

    def compile_(self, *args, **kwargs):
        return stock(self, *args, **{"jit_compile": True} | kwargs)

    monkeypatch.setattr(keras.Model, "compile", compile_)
    return monkeypatch


def agree(found, wanted):
    keras.tree.assert_same_structure(found, wanted)
    for (path, got), (_, want) in zip(
        keras.tree.flatten_with_path(found),
        keras.tree.flatten_with_path(wanted),
        strict=True,
    ):
        np.testing.assert_allclose(
            got, want, rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(path)
        )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.slow if name in FAST else pytest.mark.nightly,
        )
        for name, each in PROGRAMS.items()
        if name in FAST or each.train.__module__ == "programs.custom_steps"
    ],
)
@pytest.mark.filterwarnings("ignore:.*of whose ops XLA compiles")
def test_a_compiled_program_trains_as_on_one_device(name, all_compiled):
    found, _ = run(name, AllReduceStrategy(DEVICES[:3], fit_log=False))
    all_compiled.undo()
    agree(found, on_one_device(name)[0])


@pytest.mark.parametrize("jit_compile", ["auto", False, True])
def test_what_the_user_has_set_is_what_the_model_says(jit_compile):
    model = trained(jit_compile=jit_compile)
    # Keras decides, which compiles nothing under a strategy.
    assert model.jit_compile == (jit_compile is True)
    assert keras_jit.compiles_replicas(model) == (jit_compile is True)


def test_eagerly_nothing_is_compiled():
    with pytest.warns(UserWarning, match="cannot also be True"):
        model = trained(jit_compile=True, run_eagerly=True)
    assert not keras_jit.compiles_replicas(model)


def test_names_of_programs_are_known():
    assert set(FAST) <= set(PROGRAMS)
