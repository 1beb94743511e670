"""The plan of a model before there was a step, and the step's own."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from five_devices import DEVICES
from small_model import make_model, stock

from keras_allreduce import AllReduceStrategy, Link
from keras_allreduce.fit_output.gradients import gradients_of

pytestmark = pytest.mark.slow

L = keras.layers
WORDS = np.arange(40, dtype="int32").reshape([8, 5]) % 7
VECTORS = np.linspace(0, 1, 48, dtype="float32").reshape([8, 6])


def dense(*more):
    return keras.Sequential([keras.Input([6]), L.Dense(8), *more, L.Dense(3)])


def embedding():
    return keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            L.Embedding(7, 4),
            L.GlobalAveragePooling1D(),
            L.Dense(3),
        ]
    )


def tied():
    """A table that is looked up and is a kernel as well."""
    words = keras.Input([5], dtype="int32")
    table = keras.layers.ReversibleEmbedding(7, 4)
    hidden = L.GlobalAveragePooling1D()(table(words))
    return keras.Model(words, table(L.Dense(4)(hidden), reverse=True))


def unused():
    """Two inputs by name; of three layers one is never called."""

    class Unused(keras.layers.Layer):
        def build(self, shape):
            self.used = self.add_weight(shape=[shape[-1]], name="used")
            self.spare = self.add_weight(shape=[2], name="spare")

        def call(self, x):
            return x * self.used

    inputs = {"a": keras.Input([6], name="a")}
    return keras.Model(inputs, L.Dense(3)(Unused()(inputs["a"])))


def frozen():
    model = dense(L.Dense(5))
    model.layers[0].trainable = False
    return model


def mixed():
    with_policy = keras.DTypePolicy("mixed_float16")
    return keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            L.Embedding(7, 4, dtype=with_policy),
            L.Flatten(dtype=with_policy),
            L.Dense(8, dtype=with_policy),
            L.Dense(3, dtype="float32"),
        ]
    )


# Model, inputs, options of the strategy, arguments of the optimizer.
CASES = {
    "dense": (dense, VECTORS, {}, {}),
    "a pack for each": (dense, VECTORS, {"bytes_per_pack": 1}, {}),
    "ring": (dense, VECTORS, {"algorithm": "ring"}, {}),
    "batch normalization": (
        lambda: dense(L.BatchNormalization(), L.Dropout(0.5)),
        VECTORS,
        {},
        {},
    ),
    "embedding": (embedding, WORDS, {}, {}),
    "embedding made dense": (embedding, WORDS, {"sparse_as_dense": True}, {}),
    "embedding, accumulated": (
        embedding,
        WORDS,
        {},
        {"gradient_accumulation_steps": 2},
    ),
    "a table that is a kernel too": (tied, WORDS, {}, {}),
    "a variable without a gradient": (unused, {"a": VECTORS}, {}, {}),
    "a layer that is not trained": (frozen, VECTORS, {}, {}),
    "mixed precision": (mixed, WORDS, {}, {}),
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_one_of_the_step(name):
    make, x, options, arguments = CASES[name]
    strategy = AllReduceStrategy(DEVICES[:2], **options)
    with strategy.scope():
        model = make()
        model.compile(keras.optimizers.SGD(0.1, **arguments), "mse")
    planned = strategy.plan(model)
    assert not strategy.step_log.steps()
    y = np.zeros([8, *model.output_shape[1:]])
    model.fit(x, y, batch_size=4, verbose=0)
    (step,) = strategy.step_log.steps(model)
    assert planned == step.plan
    assert len(planned.packs) == planned.num_packs + planned.num_sparse > 0


def test_nothing_runs_and_nothing_changes():
    strategy = AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = dense(L.Dropout(0.5, seed=1), L.BatchNormalization())
        model.compile("adam", "mse")
    before = [v.numpy() for v in model.variables]
    strategy.plan(model)
    assert not model.optimizer.built
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def lines(strategy, model, *args):
    printed = []
    strategy.explain(model, *args, print_fn=printed.append)
    (text,) = printed
    return text.splitlines()


class TestTheTable:
    @pytest.fixture
    def strategy(self):
        return AllReduceStrategy(DEVICES[:2], bytes_per_pack=200)

    def test_it_shows_what_leaves_when_in_the_look_of_a_summary(self, strategy):
        with strategy.scope():
            model = keras.Sequential(
                [
                    keras.Input([5], dtype="int32"),
                    L.Embedding(7, 4, name="table"),
                    L.Flatten(),
                    L.Dense(8, name="hidden"),
                    L.Dense(3, name="last"),
                ],
                name="words",
            )
        assert "\n".join(lines(strategy, model)) == (
            """\
Model: "words"
┏━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ Pack ┃ Gradients of (in the order of backprop) ┃ Type         ┃    Size ┃
┡━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━┩
│    0 │ words/last                              │ float32      │ 0.1 KiB │
│      │ words/hidden/bias                       │              │         │
├──────┼─────────────────────────────────────────┼──────────────┼─────────┤
│    1 │ words/hidden/kernel                     │ float32      │ 0.6 KiB │
├──────┼─────────────────────────────────────────┼──────────────┼─────────┤
│    2 │ words/table                             │ float32 rows │       ? │
└──────┴─────────────────────────────────────────┴──────────────┴─────────┘
 Dense gradients: 4 in 2 packs (0.8 KiB)
 Sparse gradients: 1, whose rows are gathered (as many as a batch has)
 All-reduce: shared_memory over 2 replicas"""
        )

    def test_it_is_printed_as_a_summary_is(self, strategy, capsys):
        strategy.explain(make_model(strategy))
        printed = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r'Model: "sequential\w*"', printed[0])
        assert max(map(len, printed)) <= 80

    def test_without_interactive_logging_it_goes_to_absl(
        self, strategy, capsys, monkeypatch
    ):
        logged = []
        monkeypatch.setattr(logging, "info", logged.append)
        keras.config.disable_interactive_logging()
        try:
            strategy.explain(make_model(strategy))
        finally:
            keras.config.enable_interactive_logging()
        assert capsys.readouterr().out == ""
        assert logged[0].startswith('Model: "sequential')

    def test_many_names_are_shortened(self):
        strategy = AllReduceStrategy(DEVICES[:2])
        with strategy.scope():
            model = dense(*(L.Dense(2) for _ in range(8)))
        rows = [row for row in lines(strategy, model) if "sequential" in row]
        assert len(rows) == 1 + 5  # The model, and five names of one pack.
        assert any("... 5 more" in row for row in lines(strategy, model))

    def test_it_says_what_has_no_gradient(self, strategy):
        with strategy.scope():
            model = unused()
        (line,) = [row for row in lines(strategy, model) if "without" in row]
        assert line.endswith("without a gradient: unused/spare")

    def test_it_says_how_often_gradients_are_sent(self, strategy):
        with strategy.scope():
            model = dense()
            model.compile(keras.optimizers.SGD(gradient_accumulation_steps=3))
        assert " Sent: once in 3 steps" in lines(strategy, model)

    def test_one_device_sends_nothing(self):
        strategy = AllReduceStrategy(DEVICES[:1])
        assert lines(strategy, make_model(strategy))[-1] == (
            " All-reduce: none, 1 replica"
        )


class TestThePrediction:
    @pytest.fixture
    def strategy(self):
        return AllReduceStrategy(DEVICES[:2], bytes_per_pack=4000)

    @pytest.fixture
    def model(self, strategy):
        # Backprop: 1000 and 1000 floats, each a pack of its own.
        with strategy.scope():
            return keras.Sequential(
                [
                    keras.Input([10]),
                    L.Dense(100, use_bias=False),
                    L.Dense(10, use_bias=False),
                ]
            )

    def test_it_is_the_model_of_the_scaling_page(self, strategy, model):
        # Of 2 workers, a pack of 4000 bytes is exchanged: 0.1 s + 4 s. The
        # first is ready at 10 s less a third, the last at 10 s, and exposed.
        link = Link(alpha=0.1, bandwidth=1000.0)
        printed = []
        strategy.explain(
            model, link=link, step_seconds=10.0, print_fn=printed.append
        )
        rows = printed[0].splitlines()
        (two,) = [row for row in rows if "  2 workers" in row]
        # While 0.03 s + 4 s of the first are busy, the last cannot begin.
        begin = 10 - 10 * 2 / 3 / 2 + 4.03
        exposed = max(begin, 10) + 4.1 - 10
        assert f"{exposed * 1e3:.3g} ms exposed" in two
        assert f"efficiency {10 / (10 + exposed):.0%}" in two
        assert sum("workers:" in row for row in rows) == 5

    def test_rows_of_unknown_number_are_not_predicted(self, strategy):
        with strategy.scope():
            model = embedding()
        printed = []
        strategy.explain(
            model,
            link=Link(1e-3, 1e9),
            step_seconds=0.1,
            print_fn=printed.append,
        )
        assert "not with sparse gradients" in printed[0]
        assert "exposed" not in printed[0]

    @pytest.mark.parametrize(
        "half", [{"link": Link(1e-3, 1e9)}, {"step_seconds": 1.0}]
    )
    def test_half_of_what_it_needs_is_an_error(self, strategy, model, half):
        with pytest.raises(ValueError, match=r"both `link` and `step_sec"):
            strategy.explain(model, **half)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.table = L.Embedding(7, 4)

    def call(self, words):
        return self.table(words)


class TestWhatIsNotKnown:
    @pytest.fixture
    def strategy(self):
        return AllReduceStrategy(DEVICES[:2])

    @pytest.fixture
    def model(self, strategy):
        with strategy.scope():
            model = Subclassed()
            model(WORDS)
        return model

    def test_without_inputs_all_is_taken_for_dense_and_it_says_so(
        self, strategy, model
    ):
        assert strategy.plan(model).num_sparse == 0
        assert not gradients_of(model, strategy).traced
        assert any("taken for" in row for row in lines(strategy, model))

    @pytest.mark.parametrize(
        "x",
        [WORDS, tf.constant(WORDS), tf.TensorSpec([None, 5], tf.int32)],
        ids=["array", "tensor", "spec"],
    )
    def test_with_inputs_it_is_found_out(self, strategy, model, x):
        assert strategy.plan(model, x).num_sparse == 1
        assert not any("taken for" in row for row in lines(strategy, model, x))

    def test_a_custom_train_step_may_send_something_else(self, strategy):
        class Custom(keras.Sequential):
            def train_step(self, data):
                return {}

        with strategy.scope():
            model = Custom([keras.Input([6]), L.Dense(3)])
        assert any("own `train_step`" in row for row in lines(strategy, model))

    def test_a_model_that_is_not_built_is_an_error(self, strategy):
        with strategy.scope():
            model = keras.Sequential([L.Dense(3)], name="mine")
        with pytest.raises(
            ValueError, match=r"Only a model that is built.*'mine'.*not built"
        ):
            strategy.explain(model)

    def test_a_frozen_model_is_told_to_train_something(self, strategy):
        with strategy.scope():
            model = keras.Sequential(
                [keras.Input([2]), L.Dense(3)], name="frozen"
            )
        model.trainable = False
        with pytest.raises(ValueError, match=r"trains something.*'frozen'"):
            strategy.explain(model)

    def test_a_model_without_a_call_is_planned_by_its_variables(self, strategy):
        class Gan(keras.Model):
            def __init__(self):
                super().__init__()
                self.generator = keras.Sequential(
                    [keras.Input([2]), L.Dense(3)]
                )
                self.critic = keras.Sequential([keras.Input([3]), L.Dense(1)])

            def train_step(self, data):
                return {}

        with strategy.scope():
            model = Gan()
        assert strategy.plan(model).num_gradients == 4
        rows = lines(strategy, model)
        assert any("has no `call`" in row for row in rows)
        assert not any("Pass a batch" in row for row in rows)
        # Inputs cannot help where nothing can be called.
        assert strategy.plan(model, WORDS).num_gradients == 4

    def test_of_a_model_without_a_call_each_part_is_built(self, strategy):
        class Gan(keras.Model):
            def __init__(self):
                super().__init__()
                self.generator = keras.Sequential([L.Dense(3)])

            def train_step(self, data):
                return {}

        with strategy.scope():
            model = Gan()
        with pytest.raises(ValueError, match="which is not built"):
            strategy.explain(model)

    def test_one_pack_is_not_called_packs(self):
        strategy = AllReduceStrategy(DEVICES[:2])
        rows = lines(strategy, make_model(strategy))
        assert any(" in 1 pack (" in row for row in rows)

    def test_a_model_of_another_strategy_is_an_error(self, strategy):
        with pytest.raises(ValueError, match="inside the scope of the strat"):
            strategy.plan(make_model(stock()))

    def test_other_cross_device_ops_make_no_plan(self):
        strategy = AllReduceStrategy(
            DEVICES[:2], tf.distribute.ReductionToOneDevice()
        )
        with pytest.raises(ValueError, match=r"Only a `BatchAllReduce` makes"):
            strategy.plan(make_model(strategy))
