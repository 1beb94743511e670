"""Gradients are reduced before Keras looks at them, and only when applied."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ops_of_type

import keras_allreduce

X = np.ones([8, 3], "float32")
Y = np.zeros([8, 1], "float32")


def model_under(strategy, optimizer, units=1, **options):
    with strategy.scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(units)])
        model.compile(optimizer(), "mse", **options)
    return model


def step_of(model):
    """The graph of a train step."""
    y = np.zeros([8, *model.output_shape[1:]], "float32")
    data = model.distribute_strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((X, y)).repeat().batch(4)
    )
    model.make_train_function()
    step = tf.function(
        lambda batch: model.distribute_strategy.run(
            model.train_step, args=(batch,)
        )
    )
    return step.get_concrete_function(next(iter(data))).graph


def sums_by_branch(model):
    """Names of the branches of the train step that sum gradients."""
    graph = step_of(model)
    found = {"always": _adds_gradients(graph)}
    for op in graph.get_operations():
        if op.type in ("If", "StatelessIf"):
            for branch in ("then_branch", "else_branch"):
                name = op.get_attr(branch).name
                function = graph._get_function(name)
                found.setdefault(branch, False)
                found[branch] |= _adds_gradients(function.graph)
    return found


def _adds_gradients(graph):
    return any(
        op.type == "AddN" and op.outputs[0].shape.num_elements() == 4
        for op in graph.get_operations()
    )


def test_accumulated_gradients_are_summed_only_where_they_are_applied():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    model = model_under(
        strategy,
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    )
    model.fit(X, Y, batch_size=4, verbose=0)
    assert sums_by_branch(model) == {
        "always": False,
        "then_branch": True,
        "else_branch": False,
    }


def test_the_plan_says_what_accumulation_saves(capsys):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    model = model_under(
        strategy,
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    )
    model.fit(X, Y, batch_size=2, verbose=2)
    assert "sent once in 2 steps" in capsys.readouterr().out
    stats = strategy.all_reduce_stats()
    # Four steps, two of which communicate; the first is not counted.
    assert stats.steps == 1


class OfTheUser(keras.optimizers.Adam):
    pass


ONCE, REPEATED, BY_EACH = (1, 0), (0, 3), (3, 0)


@pytest.mark.parametrize(
    ("optimizer", "units", "how"),
    [
        (lambda: keras.optimizers.Adam(0.1), 10_000, ONCE),
        (lambda: keras.optimizers.Adam(0.1, global_clipnorm=1.0), 10_000, ONCE),
        # Copies would cost as much as updates.
        (lambda: keras.optimizers.Adam(0.1), 100, REPEATED),
        (lambda: keras.optimizers.Adam(0.1, use_ema=True), 100, REPEATED),
        # Who knows what it keeps elsewhere?
        (lambda: OfTheUser(0.1), 10_000, BY_EACH),
        (lambda: OfTheUser(0.1), 100, BY_EACH),
    ],
)
def test_replicas_update_alike_and_seldom_by_themselves(optimizer, units, how):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:3])
    model = model_under(strategy, optimizer, units)
    model.fit(X, np.zeros([8, units]), batch_size=6, verbose=0)
    assert_alike(model)
    assert updates_of(model) == how


def assert_alike(model):
    for variable in [*model.variables, *model.optimizer.variables]:
        first, *others = variable.value.values
        for other in others:
            np.testing.assert_array_equal(other, first, variable.path)


def updates_of(model):
    """How often the train step updates the kernel, and calls a function to."""
    graph = step_of(model)
    called = [
        graph._get_function(name).graph for name in functions_called(graph)
    ]
    return _roots(model, graph), sum(_roots(model, each) for each in called)


def functions_called(graph):
    """Names of functions that update, one for each call."""
    calls = ops_of_type(graph, "StatefulPartitionedCall")
    names = [op.get_attr("f").name for op in calls]
    return [name for name in names if "_update_all_" in name]


def _roots(model, graph):
    kernel = model.layers[0].kernel.shape
    return sum(
        op.outputs[0].shape == kernel for op in ops_of_type(graph, "Sqrt")
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_update_is_traced_once(jit_compile):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:3])
    model = model_under(
        strategy,
        lambda: keras.optimizers.Adam(0.1),
        units=100,
        jit_compile=jit_compile,
    )
    model.fit(X, np.zeros([8, 100]), batch_size=6, verbose=0)
    assert_alike(model)
    names = functions_called(step_of(model))
    assert len(names) == 3
    assert len(set(names)) == 1


class Scaled(keras.constraints.Constraint):
    """Reads a variable that is neither the optimizer's nor the model's."""

    def __init__(self):
        self.scale = tf.Variable([1.0], trainable=False)

    def __call__(self, kernel):
        return kernel * self.scale


def test_an_update_that_reads_something_else_is_not_repeated():
    def trained(scope):
        with scope:
            constraint = Scaled()
            dense = keras.layers.Dense(
                1, kernel_initializer="ones", kernel_constraint=constraint
            )
            model = keras.Sequential([keras.Input([3]), dense])
            model.compile(keras.optimizers.Adam(0.1), "mse")
        constraint.scale.assign([0.5])
        model.fit(X, Y, batch_size=4, verbose=0)
        return model

    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:3])
    model = trained(strategy.scope())
    assert_alike(model)
    np.testing.assert_allclose(
        model.get_weights()[0],
        trained(contextlib.nullcontext()).get_weights()[0],
        rtol=1e-6,
    )
    assert updates_of(model) == (2, 1)


def test_rows_of_a_table_are_updated_on_each_replica():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([3]), keras.layers.Embedding(7, 2)]
        )
        model.compile("adam", "mse")
    model.fit(X, np.zeros([8, 3, 2]), batch_size=4, verbose=0)
    (table,) = model.trainable_variables
    first, second = table.value.values
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first[1], first[2])
