"""Gradients are reduced before Keras looks at them, and only when applied."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ops_of_type

import keras_allreduce

X = np.ones([8, 3], "float32")
Y = np.zeros([8, 1], "float32")


def model_under(strategy, optimizer, units=1):
    with strategy.scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(units)])
        model.compile(optimizer(), "mse")
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


@pytest.mark.parametrize(
    ("optimizer", "units", "times"),
    [
        (lambda: keras.optimizers.Adam(0.1), 10_000, 1),
        (lambda: keras.optimizers.Adam(0.1, global_clipnorm=1.0), 10_000, 1),
        # Copies would cost as much as updates.
        (lambda: keras.optimizers.Adam(0.1), 100, 3),
        # Who knows what it keeps elsewhere?
        (lambda: OfTheUser(0.1), 10_000, 3),
    ],
)
def test_the_first_replica_updates_for_all_on_cpus(optimizer, units, times):
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:3])
    model = model_under(strategy, optimizer, units)
    model.fit(X, np.zeros([8, units]), batch_size=6, verbose=0)
    for variable in [*model.variables, *model.optimizer.variables]:
        first, *others = variable.value.values
        for other in others:
            np.testing.assert_array_equal(other, first, variable.path)
    assert num_updates(model) == times


def num_updates(model):
    """How often the train step updates the kernel."""
    kernel = model.layers[0].kernel.shape
    return sum(
        op.outputs[0].shape == kernel
        for op in ops_of_type(step_of(model), "Sqrt")
    )


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
