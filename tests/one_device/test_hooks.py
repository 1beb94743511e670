"""Methods of classes are hooked while a step runs, and put back after it."""

from threading import Barrier, Thread

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from programs import Custom, X, Y

import keras_allreduce
from keras_allreduce.one_device import hooks


class OwnApply(keras.optimizers.SGD):
    """An optimizer that overrides `apply`."""

    def apply(self, grads, trainable_variables=None):
        return super().apply(grads, trainable_variables)


class Fails(Custom):
    """Fails while its step is traced, or runs."""

    def __init__(self, in_graph):
        super().__init__()
        self.in_graph = in_graph

    def train_step(self, data):
        logs = super().train_step(data)
        if not self.in_graph:
            raise KeyError("of the user")
        with tf.control_dependencies(
            [tf.debugging.Assert(tf.reduce_sum(data[0]) > 1e9, ["of the user"])]
        ):
            return {name: tf.identity(log) for name, log in logs.items()}

    test_step = train_step

    def predict_step(self, data):
        logs = self.train_step((data, self(data) + 1.0))
        return logs["own"] * tf.ones_like(data)


def methods():
    """All that is ever replaced, as it is now."""
    found = [
        (owner, name, vars(owner).get(name))
        for owner, name, _ in hooks.hooked_methods()
    ]
    found.append(
        (
            keras.Model,
            "_symbolic_build",
            vars(keras.Model).get("_symbolic_build"),
        )
    )
    found.append((tf.distribute.Strategy, "run", tf.distribute.Strategy.run))
    return found


def are_as_before(before):
    now = methods()
    return len(now) == len(before) and all(
        found[2] is wanted[2] for found, wanted in zip(now, before, strict=True)
    )


def compiled(model, eager=False):
    model.compile(OwnApply(0.05), "mse", run_eagerly=eager)
    return model


def call(model, name):
    data = (X,) if name == "predict" else (X, Y)
    getattr(model, name)(*data, batch_size=13, verbose=0)


@pytest.mark.parametrize("name", ["fit", "evaluate", "predict"])
def test_all_methods_are_as_before_after_a_call_of_keras(name):
    before = methods()
    assert any(owner is OwnApply for owner, _, _ in before)
    with keras_allreduce.AllReduceStrategy(DEVICES[:2]).scope():
        model = compiled(Custom())
    own = set(vars(model))
    call(model, name)
    assert are_as_before(before)
    added = set(vars(model)) - own
    assert not {"train_step", "_symbolic_build"} & added


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "eager", "in_graph"),
    [
        pytest.param("fit", True, False, id="fit, eager, in Python"),
        pytest.param("fit", False, True, id="fit, traced, in an op"),
        pytest.param("evaluate", False, False, id="evaluate, traced, Python"),
        pytest.param("predict", True, True, id="predict, eager, in an op"),
    ],
)
def test_all_methods_are_as_before_after_a_call_that_fails(
    name, eager, in_graph
):
    before = methods()
    strategy = keras_allreduce.AllReduceStrategy(
        DEVICES[:2], weigh_samples=True
    )
    with strategy.scope():
        model = compiled(Fails(in_graph), eager)
    with pytest.raises((KeyError, tf.errors.InvalidArgumentError)):
        call(model, name)
    assert are_as_before(before)


class Notes:
    """A step that notes which thread has asked it."""

    def __init__(self):
        self.seen = []

    def next_seed(self, draw, generator, *args, **kwargs):
        self.seen.append(generator)
        return draw(generator, *args, **kwargs)

    def assign(self, assign, *args, **kwargs):
        return assign(*args, **kwargs)


def test_the_innermost_step_takes_part():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    before = methods()
    generator = keras.random.SeedGenerator(1)
    outer, inner = Notes(), Notes()
    in_replica = tf.distribute.ReplicaContext(strategy, 0)
    with hooks.taking_part(outer), strategy.scope(), in_replica:
        with hooks.taking_part(inner):
            generator.next()
        generator.next()
    generator.next()
    assert (len(inner.seen), len(outer.seen)) == (1, 1)
    assert are_as_before(before)


def test_a_merge_call_is_no_part_of_a_replica():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    generator = keras.random.SeedGenerator(1)
    notes = Notes()
    with hooks.taking_part(notes), strategy.scope():
        assert tf.distribute.in_cross_replica_context()
        generator.next()
    assert notes.seen == []


@pytest.mark.slow
@pytest.mark.parametrize("num_strategies", [1, 4])
def test_each_thread_asks_its_own_step(num_strategies):
    before = methods()
    count = 4
    strategies = [
        keras_allreduce.AllReduceStrategy(DEVICES[:2])
        for _ in range(num_strategies)
    ]
    handlers = [Notes() for _ in range(count)]
    generators = [keras.random.SeedGenerator(index) for index in range(count)]
    barrier = Barrier(count)

    def run(index):
        strategy = strategies[index % num_strategies]
        barrier.wait()
        for _ in range(50):
            with (
                hooks.taking_part(handlers[index]),
                strategy.scope(),
                tf.distribute.ReplicaContext(strategy, 0),
            ):
                generators[index].next()

    threads = [Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handler, generator in zip(handlers, generators, strict=True):
        assert handler.seen == [generator] * 50
    assert are_as_before(before)


def test_a_method_that_another_package_has_replaced_stays_replaced():
    stock = keras.metrics.Sum.update_state

    def other(*args, **kwargs):
        return stock(*args, **kwargs)

    try:
        with hooks.taking_part(Notes()):
            keras.metrics.Sum.update_state = other
        assert keras.metrics.Sum.update_state is other
    finally:
        keras.metrics.Sum.update_state = stock
    metric = keras.metrics.Sum()
    metric.update_state([1.0, 2.0])
    np.testing.assert_equal(float(metric.result()), 3.0)
