"""The fit output shows the all-reduce, and nothing else is touched."""

import csv
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from five_devices import DEVICES
from small_model import X, Y, fit, make_model, stock

from keras_allreduce import AllReduceLogger, AllReduceStrategy
from keras_allreduce.fit_output import hints

pytestmark = pytest.mark.slow

# 3 x 4 + 4 + 4 + 1 parameters, 84 bytes.
PLAN = (
    "batch_all_reduce: 4 all-reduces with algorithm = shared_memory, "
    "num_packs = 1 (0.1 KiB float32), num_replicas = 2"
)
# A sum of 84 bytes may take no time that a clock sees: then nothing overlaps.
COST = r"all_reduce: (0us|\d+(\.\d+)?(us|ms|s) - overlap: \d+%)"


@pytest.fixture
def strategy():
    return AllReduceStrategy(DEVICES[:2])


@pytest.fixture
def model(strategy):
    return make_model(strategy)


@pytest.fixture(scope="module")
def trained():
    """A model that was fitted before, for tests that need no first fit."""
    model = make_model(AllReduceStrategy(DEVICES[:2]))
    fit(model, verbose=0)
    return model


@pytest.fixture(scope="module")
def history_of_stock():
    return fit(make_model(stock()), validation_data=(X, Y)).history


def lines(output):
    """What a reader sees: plain text, and of each line what was drawn last."""
    plain = re.sub(r"\x1b\[\d+m", "", output)
    return [line.split("\r")[-1].strip() for line in plain.split("\n")]


class TestThePlan:
    @pytest.mark.parametrize(
        "verbose", [1, 2, pytest.param("auto", marks=pytest.mark.nightly)]
    )
    def test_it_follows_the_first_line_of_the_first_epoch(
        self, model, capsys, verbose
    ):
        fit(model, verbose=verbose)
        output = lines(capsys.readouterr().out)
        assert output[:2] == ["Epoch 1/2", PLAN]
        assert "Epoch 2/2" in output
        assert output.count(PLAN) == 1

    def test_verbose_0_shows_nothing(self, model, capsys):
        fit(model, verbose=0)
        assert capsys.readouterr().out == ""

    def test_another_fit_does_not_repeat_it(self, trained, capsys):
        fit(trained, epochs=1)
        capsys.readouterr()
        fit(trained, batch_size=4, epochs=1)
        output = capsys.readouterr().out
        assert "6/6" in output
        assert "batch_all_reduce" not in output

    def test_every_model_has_its_own(self, strategy, model, capsys):
        other = make_model(strategy)
        fit(model, epochs=1)
        fit(other, epochs=1)
        assert lines(capsys.readouterr().out).count(PLAN) == 2

    def test_a_model_that_is_compiled_anew_may_show_another(
        self, strategy, model, capsys
    ):
        fit(model, epochs=1)
        model.layers[0].trainable = False
        with strategy.scope():
            model.compile("sgd", "binary_crossentropy")
        fit(model, epochs=1)
        output = lines(capsys.readouterr().out)
        plans = [line for line in output if line.startswith("batch_all_reduce")]
        assert [plan[:32] for plan in plans] == [
            "batch_all_reduce: 4 all-reduces ",
            "batch_all_reduce: 2 all-reduces ",
        ]

    def test_evaluate_and_predict_have_none(self, trained, capsys):
        trained.evaluate(X, Y, batch_size=8)
        trained.predict(X, batch_size=8)
        output = capsys.readouterr().out
        assert "3/3" in output
        assert "reduce" not in output
        assert "overlap" not in output

    def test_several_steps_at_once_have_plan_and_cost(self, strategy, capsys):
        fit(make_model(strategy, steps_per_execution=2), batch_size=4)
        output = capsys.readouterr().out
        assert lines(output)[:2] == ["Epoch 1/2", PLAN]
        assert re.search(COST, output)

    def test_it_says_what_is_sparse(self, strategy, capsys):
        with strategy.scope():
            model = keras.Sequential(
                [keras.layers.Embedding(5, 2), keras.layers.Dense(1)]
            )
            model.compile("sgd", "mse")
        x = np.zeros([8, 1], "int32")
        model.fit(x, np.zeros([8, 1, 1]), batch_size=4, verbose=2)
        assert lines(capsys.readouterr().out)[0] == (
            "batch_all_reduce: 2 all-reduces with algorithm = shared_memory, "
            "num_packs = 1 (size not known float32), num_replicas = 2, "
            "1 sparse gathered"
        )


class TestTheCost:
    def test_an_older_bar_has_the_unit_in_the_name(
        self, trained, capsys, monkeypatch
    ):
        monkeypatch.setattr(keras, "__version__", "3.11.3")
        fit(trained, verbose=2)
        assert capsys.readouterr().out.count(" - all_reduce_ms: ") == 2

    @pytest.mark.parametrize("verbose", [1, 2], ids=["bar", "line"])
    def test_it_stands_before_the_validation(self, trained, capsys, verbose):
        fit(trained, verbose=verbose, validation_data=(X, Y))
        output = lines(capsys.readouterr().out)
        epochs = [line for line in output if line.startswith("3/3")]
        assert len(epochs) == 2
        for line in epochs:
            assert re.search(
                rf"accuracy: \S+ - loss: \S+ - {COST} - val_accuracy: \S+ - "
                r"val_loss: \S+$",
                line,
            )

    def test_the_first_step_alone_has_none(self, model, capsys):
        fit(model, batch_size=24, epochs=1)
        output = capsys.readouterr().out
        assert "1/1" in output
        assert " - all_reduce:" not in output

    def test_steps_run_eagerly_have_one(self, strategy, capsys):
        fit(make_model(strategy, run_eagerly=True), verbose=2)
        output = capsys.readouterr().out
        # Eagerly all gradients are there before the first leaves.
        assert len(re.findall(r"all_reduce: \S+ - overlap: 0%", output)) == 2


class Clock(keras.callbacks.Callback):
    """A second passes between two steps, and a tenth of one in each."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def on_train_batch_begin(self, batch, logs=None):
        self.now += 1.0

    def on_train_batch_end(self, batch, logs=None):
        self.now += 0.1


class TestTheHint:
    HINT = (
        "hint: 1.0s of 1.1s per step (91%, without the first step) pass "
        "between two steps, in Keras and in callbacks. "
        "compile(steps_per_execution=6) pays this once every 6 steps; batch "
        "callbacks then run once per 6 steps. "
        "(KERAS_ALLREDUCE_HINT=0 hides this line.)"
    )

    @pytest.fixture(autouse=True)
    def allowed(self, monkeypatch):
        monkeypatch.delenv("KERAS_ALLREDUCE_HINT")

    @pytest.fixture
    def clock(self, monkeypatch):
        clock = Clock()
        monkeypatch.setattr(hints, "time", clock)
        return clock

    def test_it_comes_once_after_the_first_epoch(self, model, clock, capsys):
        for _ in range(2):
            fit(model, batch_size=4, verbose=2, callbacks=[clock])
        output = lines(capsys.readouterr().out)
        assert output.count(self.HINT) == 1
        assert output[:5] == [
            "Epoch 1/2",
            PLAN,
            output[2],
            self.HINT,
            "Epoch 2/2",
        ]
        assert output[2].startswith("6/6")

    def test_it_knows_the_steps_of_the_fit(self, strategy, monkeypatch):
        seen = []
        monkeypatch.setattr(hints, "hint", seen.append)
        model = make_model(strategy, steps_per_execution=2)
        fit(model, batch_size=4, initial_epoch=1, epochs=4)
        (found,) = seen
        assert (found.steps_of_epoch, found.steps_of_fit) == (6, 18)
        assert found.steps_per_call == 2

    def test_the_environment_hides_it(self, clock, capsys, monkeypatch):
        monkeypatch.setenv("KERAS_ALLREDUCE_HINT", "0")
        model = make_model(AllReduceStrategy(DEVICES[:2]))
        fit(model, batch_size=4, verbose=2, callbacks=[clock])
        output = capsys.readouterr().out
        assert PLAN in output
        assert "hint" not in output


class TestWithoutInteractiveLogging:
    @pytest.fixture
    def logged(self, monkeypatch):
        """What goes to absl, where Keras sends its own output then."""
        messages = []
        monkeypatch.setattr(
            logging, "info", lambda message, *a: messages.append(message)
        )
        keras.config.disable_interactive_logging()
        yield messages
        keras.config.enable_interactive_logging()

    def test_plan_and_cost_go_to_absl(self, model, logged, capsys):
        fit(model, verbose=2)
        assert capsys.readouterr().out == ""
        logged = [message.strip() for message in logged]
        assert logged[:2] == ["Epoch 1/2", PLAN]
        assert sum(bool(re.search(COST, message)) for message in logged) == 2


class TestWhatIsNotTouched:
    def test_history_is_that_of_mirrored_strategy(
        self, model, history_of_stock
    ):
        ours = fit(model, validation_data=(X, Y)).history
        assert list(ours) == ["accuracy", "loss", "val_accuracy", "val_loss"]
        assert ours == history_of_stock

    def test_other_callbacks_see_the_logs_of_keras(self, trained, tmp_path):
        seen, path = [], tmp_path / "log.csv"

        class Spy(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                seen.append(sorted(logs))

        callbacks = [Spy(), keras.callbacks.CSVLogger(path)]
        fit(trained, validation_data=(X, Y), callbacks=callbacks)
        assert seen == [["accuracy", "loss"]] * 6
        assert path.read_text().splitlines()[0] == (
            "epoch,accuracy,loss,val_accuracy,val_loss"
        )

    def test_another_progress_bar_is_left_alone(self, trained, capsys):
        class Mine(keras.callbacks.ProgbarLogger):
            pass

        mine = Mine()
        fit(trained, callbacks=[mine])
        output = capsys.readouterr().out
        assert "Epoch 2/2" in output
        assert "reduce" not in output

    def test_a_progress_bar_of_keras_is_exchanged(self, model, capsys):
        fit(model, callbacks=[keras.callbacks.ProgbarLogger()])
        output = lines(capsys.readouterr().out)
        assert output.count("Epoch 1/2") == 1
        assert output.count(PLAN) == 1

    def test_models_of_other_strategies_are_left_alone(self, model, capsys):
        del model
        fit(make_model(tf.distribute.get_strategy()))
        fit(make_model(stock()))
        output = capsys.readouterr().out
        assert "Epoch 2/2" in output
        assert "reduce" not in output

    def test_fit_log_false_switches_it_off(self, capsys):
        strategy = AllReduceStrategy(DEVICES[:2], fit_log=False)
        fit(make_model(strategy))
        output = capsys.readouterr().out
        assert "Epoch 2/2" in output
        assert "reduce" not in output
        assert strategy.all_reduce_stats().steps == 5


class TestAllReduceLogger:
    KEYS = ("all_reduce_ms", "overlap", "all_reduce_gbps")

    def test_it_adds_the_cost_to_history(self, trained, tmp_path, capsys):
        path = tmp_path / "log.csv"
        callbacks = [AllReduceLogger(), keras.callbacks.CSVLogger(path)]
        for _ in range(2):  # One logger can serve two fits.
            history = fit(trained, callbacks=callbacks, verbose=2).history
        assert list(history) == ["accuracy", "loss", *self.KEYS]
        for ms, overlap in zip(
            history["all_reduce_ms"], history["overlap"], strict=True
        ):
            assert ms >= 0
            assert 0 <= overlap <= 1 or ms == 0
        # Callbacks after it get the cost too.
        with path.open() as file:
            rows = list(csv.DictReader(file))
        for key in ("loss", *self.KEYS):
            assert [float(row[key]) for row in rows] == history[key]
        # The bar does not repeat it.
        for line in lines(capsys.readouterr().out):
            assert "all_reduce_ms" not in line
            assert line.count("overlap") <= 1

    def test_it_works_without_the_fit_log(self, history_of_stock):
        strategy = AllReduceStrategy(DEVICES[:2], fit_log=False)
        ours = fit(
            make_model(strategy),
            validation_data=(X, Y),
            callbacks=[AllReduceLogger()],
        ).history
        assert {key: ours[key] for key in history_of_stock} == history_of_stock
        assert set(self.KEYS) <= set(ours)

    def test_under_another_strategy_it_is_an_error(self):
        model = make_model(stock())
        with pytest.raises(
            ValueError,
            match=r"reports on an AllReduceStrategy\. Received: a model under "
            r"MirroredStrategy\. Make the model inside its scope\.",
        ):
            fit(model, callbacks=[AllReduceLogger()])


def test_one_device_says_that_nothing_is_reduced(capsys):
    fit(make_model(AllReduceStrategy(DEVICES[:1])))
    output = lines(capsys.readouterr().out)
    assert output[:2] == [
        "Epoch 1/2",
        "batch_all_reduce: nothing to reduce, num_replicas = 1",
    ]
    assert not any(" - all_reduce:" in line for line in output)
