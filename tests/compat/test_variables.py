"""Distributed variables are numbers, and are reset without being read."""

import copy

import keras
import pytest
import tensorflow as tf
from five_devices import DEVICES
from small_model import fit, make_model

import keras_allreduce
from keras_allreduce.compat import variables

pytestmark = pytest.mark.slow


@pytest.fixture
def strategy():
    return keras_allreduce.AllReduceStrategy(DEVICES[:2])


def test_learning_rate_and_iterations_are_numbers(strategy):
    model = make_model(strategy)
    model.optimizer.learning_rate = 0.25
    fit(model)
    assert float(model.optimizer.learning_rate) == 0.25
    assert int(model.optimizer.iterations) == 6


def test_a_variable_that_is_summed_when_it_is_read_is_a_number(strategy):
    with strategy.scope():
        total = tf.Variable(
            2.0,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
    # As TensorFlow has it: each replica begins with the initial value.
    assert float(total) == 4.0
    total.assign(6.0)
    assert float(total) == 6.0


def test_only_variables_without_a_strategy_are_made_outside_of_a_scope(
    strategy,
):
    with strategy.scope():
        of_replicas = tf.Variable(1.0).values
    plain = tf.Variable(1.0)
    assert type(plain) is variables.PlainVariable
    assert variables.is_made_outside_of_scope(plain)
    assert not any(map(variables.is_made_outside_of_scope, of_replicas))
    with tf.Graph().as_default():
        assert not variables.is_made_outside_of_scope(tf.Variable(1.0))


def test_an_assignment_in_a_graph_of_tensorflow_1_is_what_it_returns():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    compat = tf.compat.v1
    with tf.Graph().as_default(), compat.Session() as session:
        with strategy.scope():
            total = compat.Variable(
                0.0,
                use_resource=True,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
        session.run(compat.global_variables_initializer())
        session.run(total.assign(6.0))
        parts = strategy.experimental_local_results(total)
        assert session.run(parts) == (3.0, 3.0)


def test_variables_are_shown_under_their_names(strategy):
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert repr(variable).startswith("MirroredVariable:")


def test_a_variable_with_many_numbers_is_none(strategy):
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
    with pytest.raises(TypeError):
        float(variable)


def test_a_copy_is_a_number_too(strategy):
    with strategy.scope():
        variable = tf.Variable(3.0)
    assert float(copy.deepcopy(variable)) == 3.0


def test_resetting_a_metric_reads_nothing(strategy, monkeypatch):
    with strategy.scope():
        metric = keras.metrics.Mean()
    strategy.run(lambda: metric.update_state([1.0, 3.0]))
    assert float(metric.result()) == 2.0
    reads = []
    monkeypatch.setattr(
        strategy, "reduce", lambda *args, **kwargs: reads.append(args)
    )
    metric.reset_state()
    assert not reads
    monkeypatch.undo()
    assert float(metric.result()) == 0.0
