"""Models go to disk and back, in and out of the scope."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from small_model import X, fit, make_model, stock

from keras_allreduce import AllReduceStrategy

pytestmark = pytest.mark.slow

SCOPES = {
    "no strategy": tf.distribute.get_strategy,
    "another AllReduceStrategy": lambda: AllReduceStrategy(DEVICES[:3]),
    "MirroredStrategy": stock,
}


@pytest.fixture(scope="module")
def trained():
    model = make_model(AllReduceStrategy(DEVICES[:2]))
    fit(model, verbose=0)
    return model


def numbers(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [variable.numpy() for variable in variables]


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
def test_a_saved_model_can_be_loaded_in_any_scope(trained, scope, tmp_path):
    path = tmp_path / "model.keras"
    trained.save(path)
    with scope().scope():
        loaded = keras.saving.load_model(path)
    assert_same(numbers(loaded), numbers(trained))
    history = fit(loaded, batch_size=6, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
def test_a_model_saved_in_any_scope_can_be_loaded_here(scope, tmp_path):
    path = tmp_path / "model.keras"
    other = make_model(scope())
    fit(other, batch_size=6, epochs=1, verbose=0)
    other.save(path)
    strategy = AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        loaded = keras.saving.load_model(path)
    assert_same(numbers(loaded), numbers(other))
    assert loaded.distribute_strategy is strategy
    fit(loaded, epochs=1, verbose=0)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_weights_can_be_saved_and_loaded(trained, inside, tmp_path):
    path = tmp_path / "model.weights.h5"
    strategy = AllReduceStrategy(DEVICES[:2])
    model = make_model(strategy)
    if inside:
        with trained.distribute_strategy.scope():
            trained.save_weights(path)
        with strategy.scope():
            model.load_weights(path)
    else:
        trained.save_weights(path)
        model.load_weights(path)
    assert_same(model.get_weights(), trained.get_weights())
    for variable in model.variables:
        copies = [copy.numpy() for copy in variable.value.values]
        np.testing.assert_array_equal(copies[0], copies[1])


def test_an_exported_model_serves(trained, tmp_path):
    trained.export(tmp_path / "export", verbose=False)
    exported = tf.saved_model.load(tmp_path / "export")
    np.testing.assert_allclose(
        exported.serve(X), trained.predict(X, verbose=0), rtol=1e-6, atol=1e-6
    )


def test_a_tensorflow_checkpoint_can_be_restored(trained, tmp_path):
    path = tf.train.Checkpoint(model=trained).save(tmp_path / "checkpoint")
    model = make_model(AllReduceStrategy(DEVICES[:3]))
    tf.train.Checkpoint(model=model).restore(path).expect_partial()
    assert_same(model.get_weights(), trained.get_weights())
