"""Errors that come of files which workers share, and all others."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce import AllReduceStrategy
from keras_allreduce.workers.excepthook import remedy


def raised(kind, function):
    with pytest.raises(kind) as found:
        function()
    return found.value


def cached(path):
    """Two iterators that write one cache, as two workers do."""
    data = tf.data.Dataset.range(9).cache(str(path))
    first, second = iter(data), iter(data)
    next(first)
    next(second)


def save_into(folder):
    with AllReduceStrategy(["CPU:0"]).scope():
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    backup = keras.callbacks.BackupAndRestore(folder)
    model.fit(np.ones([1, 1]), np.ones([1, 1]), verbose=0, callbacks=[backup])


def test_a_cache_that_another_writes_needs_a_path_of_its_own(tmp_path):
    said = remedy(
        raised(tf.errors.AlreadyExistsError, lambda: cached(tmp_path / "cache"))
    )
    assert "a `cache` file that another writes" in said
    assert "one path per worker" in said


@pytest.mark.parametrize("filters", [True, False])
def test_a_callback_that_cannot_save_needs_a_path_of_its_own(filters, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    was = keras.config.is_traceback_filtering_enabled()
    keras.config.enable_traceback_filtering()
    if not filters:
        keras.config.disable_traceback_filtering()
    said = remedy(raised(OSError, lambda: save_into(str(taken / "backup"))))
    if not was:
        keras.config.disable_traceback_filtering()
    assert "in a callback of `fit`" in said
    assert "one path per worker" in said


def test_a_callback_of_the_script_is_left_alone(monkeypatch, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    code = "def on_train_begin(backup, logs=None): open(backup.backup_dir)"
    script = {"__name__": "__main__"}
    exec(code, script)
    monkeypatch.setattr(
        keras.callbacks.BackupAndRestore,
        "on_train_begin",
        script["on_train_begin"],
    )
    assert remedy(raised(OSError, lambda: save_into(str(taken / "b")))) is None


def test_a_file_of_the_script_is_left_alone(tmp_path):
    error = raised(OSError, (tmp_path / "missing").read_text)
    assert remedy(error) is None


def test_other_errors_are_left_alone():
    assert remedy(raised(ZeroDivisionError, lambda: 1 / 0)) is None
