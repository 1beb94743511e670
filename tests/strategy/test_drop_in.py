"""What MirroredStrategy does, AllReduceStrategy does: the same bits.

Both train the same model from the same seed on the same two devices. Stock
runs with ReductionToOneDevice: with its default a second strategy in one
process ends in an error.
"""

import functools
import json
import zipfile
from contextlib import nullcontext

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy, BatchAllReduce

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
BATCH_SIZE = 8


def dense():
    model = keras.Sequential(
        [
            keras.Input([5]),
            keras.layers.Dense(6, "relu"),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    return model, RNG.normal(size=[32, 5])


def conv():
    model = keras.Sequential(
        [
            keras.Input([6, 6, 1]),
            keras.layers.Conv2D(4, 3, activation="relu"),
            # Moving statistics are the mean of the replicas here, and those of
            # replica 0 in stock: tests/programs/test_one_model.py.
            keras.layers.GroupNormalization(2),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    return model, RNG.normal(size=[32, 6, 6, 1])


def embedding():
    model = keras.Sequential(
        [
            keras.Input([4], dtype="int32"),
            keras.layers.Embedding(7, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    return model, RNG.integers(0, 7, [32, 4])


def recurrent():
    model = keras.Sequential(
        [
            keras.Input([4, 2]),
            keras.layers.LSTM(3),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    return model, RNG.normal(size=[32, 4, 2])


def multi_input():
    left, right = keras.Input([3], name="left"), keras.Input([2], name="right")
    both = keras.layers.Concatenate()(
        [keras.layers.Dense(4, "tanh")(left), keras.layers.Dense(2)(right)]
    )
    outputs = keras.layers.Dense(3, "softmax")(both)
    model = keras.Model({"left": left, "right": right}, outputs)
    data = {"left": RNG.normal(size=[32, 3]), "right": RNG.normal(size=[32, 2])}
    return model, data


MODELS = [
    *[dense, conv, embedding],
    pytest.param(recurrent, marks=pytest.mark.nightly),
    pytest.param(multi_input, marks=pytest.mark.nightly),
]
LABELS = np.arange(32) % 3


def stock(devices=DEVICES[:2]):
    return tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def ours(devices=DEVICES[:2]):
    return AllReduceStrategy(devices)


def build(strategy, make, **arguments):
    """The same compiled model, data and names whatever the strategy."""
    global RNG
    RNG = np.random.default_rng(0)
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    with strategy.scope():
        model, x = make()
        model.compile(
            "adam",
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            **arguments,
        )
    return model, x


def train(strategy, make, **arguments):
    model, x = build(strategy, make, **arguments)
    history = model.fit(x, LABELS, batch_size=BATCH_SIZE, epochs=2, verbose=0)
    return model, x, history.history


@functools.cache
def outcome(strategy, make):
    """All that a training leaves behind, by what it is called."""
    model, x, history = train(strategy(), make)
    return {
        "weights": model.get_weights(),
        "optimizer": [v.numpy() for v in model.optimizer.variables],
        "history": history,
        "evaluate": model.evaluate(x, LABELS, BATCH_SIZE, verbose=0),
        "predict": [model.predict(x, BATCH_SIZE, verbose=0)],
        "model": model,
    }


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
class TestEveryModel:
    @pytest.mark.parametrize("what", ["weights", "optimizer", "predict"])
    def test_has_the_same_numbers(self, make, what):
        assert_same_bits(outcome(ours, make)[what], outcome(stock, make)[what])

    @pytest.mark.parametrize("what", ["history", "evaluate"])
    def test_has_the_same_metrics(self, make, what):
        assert outcome(ours, make)[what] == outcome(stock, make)[what]

    def test_is_saved_the_same(self, make, tmp_path):
        contents = []
        for strategy in (ours, stock):
            path = tmp_path / f"{strategy.__name__}.keras"
            outcome(strategy, make)["model"].save(path)
            contents.append(contents_of(path))
        assert contents[0] == contents[1]


def without_address(config):
    """The `shared_object_id` of Keras is an address in memory."""
    config.pop("shared_object_id", None)
    return config


def contents_of(path):
    """The members of a .keras file, without the date in them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        metadata = json.loads(members.pop("metadata.json"))
        metadata.pop("date_saved")
        config = json.loads(
            members.pop("config.json"), object_hook=without_address
        )
        with archive.open("model.weights.h5") as file, h5py.File(file) as h5:
            arrays = {}
            h5.visititems(
                lambda name, item: (
                    arrays.update({name: item[()].tolist()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
        members.pop("model.weights.h5")
    return {"config": config, "metadata": metadata, "h5": arrays} | members


STRATEGIES = {
    "ring": lambda: AllReduceStrategy(DEVICES[:2], algorithm="ring"),
    "another op": lambda: AllReduceStrategy(
        DEVICES[:2], tf.distribute.ReductionToOneDevice()
    ),
    "stock with BatchAllReduce": lambda: tf.distribute.MirroredStrategy(
        DEVICES[:2], cross_device_ops=BatchAllReduce()
    ),
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_every_way_to_reduce_gives_the_same_bits(make):
    model, _, history = train(make(), dense)
    assert_same_bits(model.get_weights(), outcome(stock, dense)["weights"])
    assert history == outcome(stock, dense)["history"]


def test_one_device_is_training_without_a_strategy():
    model, _, history = train(ours(DEVICES[:1]), dense)
    expected, _, expected_history = train(tf.distribute.get_strategy(), dense)
    assert_same_bits(model.get_weights(), expected.get_weights())
    assert history == expected_history


def test_it_is_a_mirrored_strategy():
    strategy = ours()
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert strategy.num_replicas_in_sync == 2
    assert not tf.distribute.has_strategy()
    with strategy.scope():
        assert tf.distribute.get_strategy() is strategy
        variable = tf.Variable(1.0)
    assert strategy.extended.variable_created_in_scope(variable)
    assert [v.device[-5:] for v in variable.values] == ["CPU:0", "CPU:1"]


def third_part(third):
    with AllReduceStrategy(DEVICES[:2]).scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    x = np.ones([7, 2], "float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(4)
    model.fit(data.map(lambda x, y: (x, y, third)), verbose=0)


def test_weights_of_a_data_set_may_be_none():
    third_part(None)


def test_one_number_in_a_batch_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"one number .* in batch\[2\]"):
        third_part(tf.constant(2.0))


def test_the_next_batch_is_an_optional_that_may_have_none_in_it():
    """Keras 3.16 reads batches so."""
    data = tf.data.Dataset.from_tensor_slices(tf.ones([5, 1])).batch(4)
    strategy = AllReduceStrategy(DEVICES[:2])
    batches = iter(
        strategy.experimental_distribute_dataset(data.map(lambda x: (x, None)))
    )
    read = [batches.get_next_as_optional() for _ in range(3)]
    assert [bool(each.has_value()) for each in read] == [True, True, False]
    for optional, rows in zip(read, [[2, 2], [1, 0]], strict=False):
        x, nothing = optional.get_value()
        assert [len(part) for part in x.values] == rows
        assert set(tf.nest.flatten(nothing, expand_composites=True)) == {None}


def test_none_of_a_generator_is_trained_on_as_on_one_device():
    x = np.arange(10.0).reshape(5, 2).astype("float32")

    def batches():
        for rows in (slice(0, 3), slice(3, 5)):
            yield x[rows], x[rows, :1], None

    def fitted(scope):
        keras.utils.set_random_seed(1)
        with scope:
            model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
        model.fit(batches(), verbose=0)
        return model.get_weights()

    try:
        expected = fitted(nullcontext())
    except AttributeError:
        pytest.skip(f"Keras {keras.__version__} takes no None of a generator")
    found = fitted(AllReduceStrategy(DEVICES[:2]).scope())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
