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


def test_clipping_sees_the_sum_of_all_optimizers_of_a_model():
    class TwoOptimizers(keras.Model):
        def __init__(self):
            super().__init__()
            self.a = keras.layers.Dense(1, kernel_initializer="zeros")
            self.b = keras.layers.Dense(1, kernel_initializer="zeros")
            self.second = keras.optimizers.SGD(1.0, clipnorm=1.0)

        def call(self, x):
            return self.a(x) + self.b(x)

        def train_step(self, data):
            x, _ = data
            for layer, optimizer in (
                (self.a, self.optimizer),
                (self.b, self.second),
            ):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(layer(x))
                variables = layer.trainable_variables
                optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    strategy = keras_allreduce.AllReduceStrategy(
        DEVICES[:2], weigh_samples=False
    )
    with strategy.scope():
        model = TwoOptimizers()
        model.compile(keras.optimizers.SGD(1.0, clipnorm=1.0))
        model(X)
        model.second.build(model.b.trainable_variables)
    # Gradients of the two replicas: (4, 0, 0) and (0, 3, 0). Clipped after
    # the sum, of norm 5, the step is (0.8, 0.6, 0); before, (1, 1, 0).
    x = np.array([[4, 0, 0], [0, 3, 0]], "float32")
    model.fit(x, np.zeros([2, 1]), batch_size=2, verbose=0, shuffle=False)
    for layer in (model.a, model.b):
        np.testing.assert_allclose(
            layer.kernel.numpy()[:, 0], [-0.8, -0.6, 0], atol=1e-6
        )


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
