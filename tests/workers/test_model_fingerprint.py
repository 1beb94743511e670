"""Which differences between models are proven, which are said, which are none.

Each model is built twice in this process, as two workers would.
"""

import os
import random
import warnings

import keras
import numpy as np
import pytest

from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.consistency_check import ConsistencyCheck
from keras_allreduce.workers.described import described
from keras_allreduce.workers.errors import WorkersDifferError
from keras_allreduce.workers.fingerprint import (
    Fingerprint,
    first_in_another_order,
)
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.model_fingerprint import ModelCheck, facts_of
from keras_allreduce.workers.progress import Progress

CLUSTER = Cluster(
    ("/job:worker/replica:0/task:0", "/job:worker/replica:0/task:1"),
    ("a:1", "b:2"),
    0,
)


class Published:
    """A store in which the other worker has published the same as before."""

    def __init__(self):
        self.other = None

    def all_gather(self, point, kind, text):
        return [text, self.other or text]

    def linger(self, what):
        pass


def compared(chief, other):
    """Compares two models as the chief does; returns the warnings.

    Raises:
        WorkersDifferError: If the chief ends in it.
    """
    store = Published()
    at = Progress(InFlight())
    sent = []
    check = ConsistencyCheck(CLUSTER, store, at)
    check.state = lambda fingerprint: sent.append(fingerprint) or [fingerprint]
    check.raise_differences = lambda *_: None
    ModelCheck(check).compare(other)
    store.other = sent[0].to_json()
    models = ModelCheck(ConsistencyCheck(CLUSTER, store, at))
    if models.checksum(chief) == models.checksum(other):
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models.compare(chief)
    return [str(each.message) for each in caught]


def dense(activation="relu", **options):
    model = keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(4, activation, **options),
            keras.layers.Dense(1, name="end"),
        ]
    )
    model.compile("sgd", "mse")
    return model


def compiled(optimizer="sgd", loss="mse", **options):
    model = dense()
    model.compile(optimizer, loss, **options)
    return model


def branches(names, order=None):
    inputs = {name: keras.Input([3], name=name) for name in names}
    parts = {
        name: keras.layers.Dense(4, name=f"of_{name}")(inputs[name])
        for name in names
    }
    joined = keras.layers.Concatenate()([parts[n] for n in order or names])
    return keras.Model(inputs, keras.layers.Dense(1)(joined))


def joined(order):
    """Two inputs that one layer takes in an order."""
    inputs = [keras.Input([3], name="a"), keras.Input([3], name="b")]
    return keras.Model(
        inputs, keras.layers.Subtract()([inputs[order], inputs[1 - order]])
    )


class Own(keras.layers.Layer):
    def __init__(self, rank=0, **options):
        super().__init__(**options)
        self.rank = rank

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}


class NoConfig(keras.layers.Layer):
    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def get_config(self):
        raise ValueError("has none")


def with_layer(*layers):
    return keras.Sequential(
        [keras.Input([6]), *layers, keras.layers.Dense(1, name="end")]
    )


PROVEN = {
    "activation": (
        lambda: (dense("relu"), dense("tanh")),
        "`activation` of layer 'dense",
        "worker 0 (a:1) has 'relu', worker 1 (b:2) has 'tanh'",
    ),
    "loss": (
        lambda: (compiled(loss="mse"), compiled(loss="mae")),
        "loss: worker 0 (a:1) has 'mse', worker 1 (b:2) has 'mae'",
    ),
    "reduction of a loss": (
        lambda: tuple(
            compiled(loss=keras.losses.MeanSquaredError(reduction=r))
            for r in ("sum", "mean")
        ),
        "reduction='sum'",
    ),
    "metrics": (
        lambda: (compiled(metrics=["mae"]), compiled(metrics=["mse"])),
        "metrics: worker 0 (a:1) has ['mae']",
    ),
    "optimizer": (
        lambda: (compiled("sgd"), compiled("adam")),
        "optimizer: worker 0 (a:1) has SGD, worker 1 (b:2) has Adam",
    ),
    "momentum": (
        lambda: tuple(
            compiled(keras.optimizers.SGD(0.1, momentum=m)) for m in (0.9, 0.8)
        ),
        "`momentum` of optimizer: worker 0 (a:1) has 0.9",
    ),
    "schedule": (
        lambda: tuple(
            compiled(
                keras.optimizers.SGD(
                    keras.optimizers.schedules.ExponentialDecay(0.1, s, 0.9)
                )
            )
            for s in (5, 6)
        ),
        "`learning_rate` of optimizer",
    ),
    "steps_per_execution": (
        lambda: (compiled(), compiled(steps_per_execution=2)),
        "steps_per_execution: worker 0 (a:1) has 1, worker 1 (b:2) has 2",
    ),
    "regularizer": (
        lambda: (dense(kernel_regularizer="l2"), dense()),
        "`kernel_regularizer` of layer 'dense",
        "has L2(l2=0.01), worker 1 (b:2) has None",
    ),
    "rate of dropout": (
        lambda: tuple(
            with_layer(keras.layers.Dropout(rate)) for rate in (0.1, 0.5)
        ),
        "`rate` of layer 'dropout",
    ),
    "a layer more": (
        lambda: (with_layer(keras.layers.Dropout(0.1)), with_layer()),
        "number of layers: worker 0 (a:1) has 3, worker 1 (b:2) has 2",
    ),
    "order of inputs": (
        lambda: (joined(0), joined(1)),
        "inputs and arguments of operation ",
        "has Subtract[[0, 1]]",
    ),
    "layers made in another order": (
        lambda: (branches(["age", "fare"]), branches(["fare", "age"])),
        "variable 0: worker 0 (a:1) has 'of_age/kernel', worker 1 (b:2) has "
        "'of_fare/kernel'",
        "sorted(...)",
    ),
}


@pytest.mark.parametrize("name", PROVEN)
def test_another_model_is_an_error_that_names_the_first_difference(name):
    make, *parts = PROVEN[name]
    with pytest.raises(WorkersDifferError) as found:
        compared(*make())
    for part in parts:
        assert part in str(found.value)


def counted():
    """The same twice, but for the numbers that Keras counts in names."""
    first = dense()
    for _ in range(3):
        keras.layers.Dense(2)
    return first, dense()


def seeded():
    return tuple(
        with_layer(keras.layers.Dropout(0.5, seed=seed)) for seed in (1, 2)
    )


def from_sets():
    """Configs with sets of strings, whose order is another in each process."""
    return tuple(
        with_layer(Own({*names})) for names in (["a", "b", "c"], ["c", "a"])
    )


ALIKE = {
    "counted names": counted,
    "names of hosts": lambda: tuple(
        keras.Sequential(
            [keras.Input([6]), keras.layers.Dense(1, name=f"on_{host}")]
        )
        for host in ("node_a", "node_b")
    ),
    "numbers of workers in names": lambda: tuple(
        keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(4, name=f"first_{rank}"),
                keras.layers.Dense(1, name=f"first_{rank + 1}"),
            ]
        )
        for rank in (0, 1)
    ),
    "layers made in another order, called in one": lambda: (
        branches(["age", "fare"], ["age", "fare"]),
        branches(["fare", "age"], ["age", "fare"]),
    ),
    "seeds": seeded,
    "initial values": lambda: (
        dense(kernel_initializer="ones"),
        dense(kernel_initializer="zeros"),
    ),
    "lambdas": lambda: tuple(
        with_layer(keras.layers.Lambda(lambda x: x * 2)) for _ in range(2)
    ),
    "addresses of objects": lambda: tuple(
        with_layer(Own(repr(object()))) for _ in range(2)
    ),
    "objects of the script": lambda: tuple(
        with_layer(Own(object())) for _ in range(2)
    ),
    "paths": lambda: tuple(
        with_layer(Own(os.path.join(os.sep, "logs", rank))) for rank in "01"
    ),
    "a config that raises": lambda: tuple(
        with_layer(NoConfig(random.random)) for _ in range(2)
    ),
    "rounding of numbers": lambda: tuple(
        compiled(keras.optimizers.SGD(0.1, momentum=m))
        for m in (0.9, np.nextafter(0.9, 1.0))
    ),
    "learning rates, which are variables": lambda: (
        compiled(keras.optimizers.SGD(0.1)),
        compiled(keras.optimizers.SGD(0.2)),
    ),
    "jit_compile": lambda: (
        compiled(jit_compile=False),
        compiled(jit_compile=True),
    ),
    "models without compile": lambda: (with_layer(), with_layer()),
    "a layer of the script on one": lambda: (with_layer(Own()), with_layer()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_may_differ_is_neither_an_error_nor_a_warning(name):
    assert compared(*ALIKE[name]()) == []


def loss_of(power):
    def loss(y, p):
        return keras.ops.mean((y - p) ** power)

    return loss


def another_loss():
    def loss(y, p):
        return keras.ops.mean(abs(y - p))

    return loss


class Older(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)


class Newer(Older):
    def call(self, x):
        return 2 * self.dense(x)


UNDECIDED = {
    "attributes of a layer": (
        lambda: (with_layer(Own(0)), with_layer(Own(1))),
        "`rank` of layer 'own",
        "has 0, worker 1 (b:2) has 1",
    ),
    "a set with other members": (from_sets, "`rank` of layer 'own"),
    "code of a loss": (
        lambda: (compiled(loss=loss_of(2)), compiled(loss=another_loss())),
        "loss: worker 0 (a:1) has loss (code ",
    ),
    "code of a model": (
        lambda: (Older(), Newer()),
        "model: worker 0 (a:1) has Older (code ",
    ),
}


@pytest.mark.parametrize("name", UNDECIDED)
def test_other_code_of_the_script_is_a_warning(name):
    make, *parts = UNDECIDED[name]
    (said,) = compared(*make())
    for part in parts:
        assert part in said


def test_sets_are_described_in_one_order():
    names = [f"feature {n}" for n in range(9)]
    texts = set()
    for _ in range(20):
        random.shuffle(names)
        texts.add(described(set(names)).text)
        texts.add(described(dict.fromkeys(names, 1)).text)
    assert len(texts) == 2


class Hostile:
    """Raises whatever it is asked."""

    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize(
    "value",
    [Hostile(), lambda: None, object(), np.zeros(3), type, print, Ellipsis],
    ids=["hostile", "lambda", "object", "array", "type", "print", "..."],
)
def test_no_object_of_a_config_breaks_the_check(value):
    assert described(value).text == described(value).text
    assert "0x" not in described(value).text


def test_a_config_that_holds_itself_has_an_end():
    loop = []
    loop.append(loop)
    assert described(loop).text.endswith("...]" + "]" * 20)


def test_a_change_is_seen_after_another_compile():
    store = Published()
    models = ModelCheck(ConsistencyCheck(CLUSTER, store, Progress(InFlight())))
    model = compiled()
    before = models.checksum(model)
    assert models.checksum(model) == before
    model.compile("sgd", "mae")
    assert models.checksum(model) != before


@pytest.mark.parametrize(
    ("chief", "other", "place"),
    [
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["a", "b", "c"], ["a", "c", "b"], 1),
        (["a1", "a2"], ["a2", "a1"], 0),
        (["a1", "a2"], ["a2", "a3"], None),
        (["on_x", "b"], ["on_y", "b"], None),
        (["on_x", "b"], ["b", "on_y"], 0),
        (["a"], ["a", "b"], None),
        ([], [], None),
    ],
)
def test_only_names_of_both_workers_have_an_order(chief, other, place):
    assert first_in_another_order(chief, other) == place


def test_facts_go_through_json_and_back():
    facts = facts_of(dense())
    sent = Fingerprint(facts.known, facts.labels, {"paths": "[]"})
    assert Fingerprint.from_json(sent.to_json()) == sent
