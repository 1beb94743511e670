"""Versions that train right, and what is said about all others."""

import importlib.util
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

import keras_allreduce
from keras_allreduce.compat import versions
from keras_allreduce.environment import LEGACY_KERAS

STRATEGIES = {
    "one machine": lambda: keras_allreduce.AllReduceStrategy(DEVICES[:2]),
    "several": keras_allreduce.MultiWorkerAllReduceStrategy,
}

X = np.arange(20, dtype="float32").reshape(5, 4) / 20
Y = X.sum(axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.delenv(LEGACY_KERAS, raising=False)


# Floors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensorflow", "keras_version", "received"),
    [
        ("2.15.1", "3.10.0", "TensorFlow 2.15.1"),
        ("1.15.0", "3.10.0", "TensorFlow 1.15.0"),
        ("2.16.1", "3.9.2", "Keras 3.9.2"),
        ("2.21.0", "2.15.0", "Keras 2.15.0"),
    ],
)
def test_a_version_that_is_too_old_is_an_error(
    tensorflow, keras_version, received
):
    with pytest.raises(RuntimeError) as caught:
        versions.check_versions(tensorflow, keras_version)
    message = str(caught.value)
    assert f"Received: {received}." in message
    assert "Run: pip install '" in message


@pytest.mark.parametrize(
    ("tensorflow", "keras_version"),
    [("2.16.1", "3.10.0"), ("2.20.0rc0", "3.13.2"), ("2.21.1", "3.15.9")],
)
def test_a_version_between_the_floor_and_the_newest_is_not_mentioned(
    tensorflow, keras_version
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions(tensorflow, keras_version)


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize(
    ("module", "version"), [(keras, "3.9.2"), (tf, "2.15.1")]
)
def test_a_strategy_checks_what_is_imported(make, module, version, monkeypatch):
    monkeypatch.setattr(module, "__version__", version)
    with pytest.raises(RuntimeError, match=f"Received: .* {version}"):
        make()


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_a_version_that_is_not_tested_yet_is_said_once(make, monkeypatch):
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    monkeypatch.setattr(tf, "__version__", "2.99.0-dev20301231")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
        make()
    said = [each for each in caught if "is tested" in str(each.message)]
    assert [str(each.message).split(" is newer")[0] for each in said] == [
        "TensorFlow 2.99.0-dev20301231",
        "Keras 3.99.0",
    ]
    # At the line of the user's that makes the strategy.
    assert {each.filename for each in said} == {__file__}


def test_a_version_without_numbers_is_not_tested():
    with pytest.warns(UserWarning, match="TensorFlow mine is newer"):
        versions.check_versions("mine", "3.10.0")


# Keras 2 --------------------------------------------------------------------

REMEDY = f"Unset {LEGACY_KERAS} before TensorFlow is imported"


@pytest.mark.parametrize("value", ["1", "true", "True"])
@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_a_strategy_refuses_tf_keras(make, value, monkeypatch):
    monkeypatch.setenv(LEGACY_KERAS, value)
    with pytest.raises(RuntimeError, match=REMEDY) as caught:
        make()
    assert f"Received: {LEGACY_KERAS}={value}." in str(caught.value)


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_an_environment_that_asks_for_keras_3_is_fine(value, monkeypatch):
    monkeypatch.setenv(LEGACY_KERAS, value)
    STRATEGIES["one machine"]()


def test_a_step_of_tf_keras_is_refused():
    strategy = STRATEGIES["one machine"]()

    def run_step():
        return tf.zeros([])

    # As in tf_keras/src/engine/training.py.
    run_step.__module__ = "tf_keras.src.engine.training"
    with pytest.raises(RuntimeError, match=REMEDY):
        tf.function(lambda: strategy.run(run_step))()


def test_the_logger_refuses_a_model_of_tf_keras():
    model = type("Model", (), {"__module__": "tf_keras.src.engine.training"})
    user_model = type("Mine", (model,), {"distribute_strategy": None})
    with pytest.raises(RuntimeError, match=REMEDY):
        keras_allreduce.AllReduceLogger().set_model(user_model())


@pytest.mark.skipif(
    importlib.util.find_spec("tf_keras") is None,
    reason="tf_keras is not installed; `make test-versions` installs it.",
)
def test_tf_keras_itself_is_refused():
    import tf_keras

    strategy = STRATEGIES["one machine"]()
    with strategy.scope():
        model = tf_keras.Sequential([tf_keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match=REMEDY):
        model.fit(X, Y, verbose=0)
    logger = keras_allreduce.AllReduceLogger()
    with pytest.raises(RuntimeError, match=REMEDY):
        model.fit(X, Y, verbose=0, callbacks=[logger])


# Keras 3.10 to 3.13 ---------------------------------------------------------


class FloatModel(keras.Sequential):
    """Its metrics are as all metrics were in an eager step before 3.14."""

    def get_metrics_result(self):
        results = super().get_metrics_result()
        if any(map(tf.is_symbolic_tensor, results.values())):
            return results
        return {name: float(value) for name, value in results.items()}


def test_metric_results_may_be_plain_floats():
    def history(strategy, kind):
        keras.utils.set_random_seed(3)
        with strategy.scope():
            model = kind([keras.Input([4]), keras.layers.Dense(1)])
            model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)
        # The last batch has one sample for two replicas.
        return model.fit(
            X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0
        ).history

    expected = history(tf.distribute.get_strategy(), keras.Sequential)
    found = history(STRATEGIES["one machine"](), FloatModel)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


# Nothing to train with ------------------------------------------------------


def run_without(module, code):
    """What a process prints that cannot import `module`."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules[{module!r}] = None\n{code}",
        ],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tensorflow", "keras"])
def test_without_tensorflow_the_error_names_what_to_install(module):
    done = run_without(
        module, "import keras_allreduce\nkeras_allreduce.AllReduceStrategy"
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: keras_allreduce needs TensorFlow")
    assert f"Received: no module {module!r}" in last
    assert "pip install 'tensorflow>=2.16' 'keras>=3.10'" in last


def test_other_import_errors_are_shown_as_they_are():
    error = ImportError("no symbol", name="keras_allreduce.somewhere")
    versions.explain_import_error(error)


def test_an_old_tensorflow_that_lacks_a_name_is_called_old(monkeypatch):
    monkeypatch.setattr(tf, "__version__", "2.10.0")
    error = ImportError("no name", name="tensorflow.python.distribute")
    with pytest.raises(RuntimeError, match=r"Received: TensorFlow 2\.10\.0"):
        versions.explain_import_error(error)


@pytest.mark.parametrize(
    ("tensorflow", "leaves_alone"),
    [("2.16.2", True), ("2.21.0", True), ("2.22.0-dev20260905", False)],
)
def test_newer_tensorflow_is_known_to_round_otherwise(tensorflow, leaves_alone):
    found = versions.optimizes_twice_for_nothing(tensorflow)
    assert found == leaves_alone
