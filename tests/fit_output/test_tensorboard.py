"""What TensorBoard finds in the event files."""

import keras
import pytest
from five_devices import DEVICES
from small_model import X, Y, make_model, stock
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from tensorboard.util.tensor_util import make_ndarray

from keras_allreduce import (
    AllReduceLogger,
    AllReduceStrategy,
    AllReduceTensorBoard,
)

pytestmark = pytest.mark.slow

NAMES = ("bandwidth_gbps", "exposed_ms", "overlap", "time_ms")
OF_EPOCHS = [f"epoch_all_reduce/{name}" for name in NAMES]
OF_BATCHES = [f"batch_all_reduce/{name}" for name in NAMES]


@pytest.fixture(scope="module")
def model():
    return make_model(AllReduceStrategy(DEVICES[:2], bytes_per_pack=1))


def fit(model, *callbacks, **arguments):
    """Two epochs of six steps."""
    arguments = {"batch_size": 4, "epochs": 2, "verbose": 0} | arguments
    return model.fit(X, Y, callbacks=list(callbacks), **arguments)


def scalars(folder):
    """`{tag: [(step, value), ...]}` of the event files in a folder."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [
            (event.step, float(make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if tag != "keras"
    }


def test_epochs_have_a_group_of_their_own(model, tmp_path):
    fit(model, AllReduceTensorBoard(tmp_path), validation_data=(X, Y))
    found = scalars(tmp_path / "train")
    assert sorted(found) == [
        "epoch_accuracy",
        *OF_EPOCHS,
        "epoch_learning_rate",
        "epoch_loss",
    ]
    for tag in OF_EPOCHS:
        assert [step for step, _ in found[tag]] == [0, 1]
    for (_, ms), (_, exposed), (_, overlap) in zip(
        *(
            found[f"epoch_all_reduce/{name}"]
            for name in ("time_ms", "exposed_ms", "overlap")
        ),
        strict=True,
    ):
        assert 0 <= exposed <= ms
        assert overlap == pytest.approx(1 - exposed / ms)
    validation = scalars(tmp_path / "validation")
    assert not [tag for tag in validation if "reduce" in tag]
    assert "epoch_loss" in validation


def test_batches_have_one_wherever_keras_writes_them(model, tmp_path):
    fit(model, AllReduceTensorBoard(tmp_path, update_freq=3))
    found = scalars(tmp_path / "train")
    for tag in ("batch_loss", *OF_BATCHES):
        assert [step for step, _ in found[tag]] == [3, 6, 9, 12]


def test_it_writes_all_else_as_keras_does(model, tmp_path):
    fit(model, AllReduceTensorBoard(tmp_path / "ours", update_freq=2))
    fit(model, keras.callbacks.TensorBoard(tmp_path / "theirs", update_freq=2))
    ours = scalars(tmp_path / "ours" / "train")
    theirs = scalars(tmp_path / "theirs" / "train")
    assert set(ours) - set(theirs) == {*OF_EPOCHS, *OF_BATCHES}
    assert not set(theirs) - set(ours)


def test_history_and_csv_know_nothing_of_it(model, tmp_path):
    path = tmp_path / "log.csv"
    history = fit(
        model,
        AllReduceTensorBoard(tmp_path, update_freq=1),
        keras.callbacks.CSVLogger(path),
    ).history
    assert list(history) == ["accuracy", "loss"]
    header = path.read_text().splitlines()[0]
    assert header.startswith("epoch,accuracy,loss")
    assert "reduce" not in header


def test_what_the_logger_adds_is_not_written_twice(model, tmp_path):
    fit(model, AllReduceLogger(), AllReduceTensorBoard(tmp_path))
    assert set(scalars(tmp_path / "train")) == {
        "epoch_accuracy",
        *OF_EPOCHS,
        "epoch_learning_rate",
        "epoch_loss",
    }


def test_the_straggler_is_in_the_group_too(model, tmp_path):
    class Straggler(keras.callbacks.Callback):
        """What AllReduceLogger adds with `measure_lateness=True`."""

        def on_epoch_end(self, epoch, logs=None):
            logs["last_worker"] = 1
            logs["lateness_ms"] = 12.5

    fit(model, Straggler(), AllReduceTensorBoard(tmp_path))
    found = scalars(tmp_path / "train")
    assert found["epoch_all_reduce/last_worker"] == [(0, 1.0), (1, 1.0)]
    assert found["epoch_all_reduce/lateness_ms"] == [(0, 12.5), (1, 12.5)]
    assert "epoch_last_worker" not in found


def test_under_another_strategy_it_is_an_error(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"AllReduceTensorBoard reports on an AllReduceStrategy\. Rec",
    ):
        fit(make_model(stock()), AllReduceTensorBoard(tmp_path))


def test_epochs_are_written_whatever_the_frequency_of_batches(model, tmp_path):
    """Six steps an epoch: 4 divides neither 6 nor 12 + 6."""
    fit(model, AllReduceTensorBoard(tmp_path, update_freq=4), epochs=3)
    found = scalars(tmp_path / "train")
    for tag in ("epoch_loss", *OF_EPOCHS):
        assert [step for step, _ in found[tag]] == [0, 1, 2]
