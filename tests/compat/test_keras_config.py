"""What Keras must tell of a model for workers to compare it."""

import keras
import pytest
import tensorflow as tf

from keras_allreduce.compat import datasets, keras_config
from keras_allreduce.compat import keras as keras_compat


def functional():
    a, b = keras.Input([3], name="a"), keras.Input([3], name="b")
    shared = keras.layers.Dense(3, name="shared")
    outputs = keras.layers.Subtract(name="minus")([shared(b), shared(a)]) * 2.0
    return keras.Model([a, b], outputs)


def test_operations_of_a_functional_model_are_numbered_from_its_inputs():
    found = [
        (each.operation.name.split("_")[0], each.inputs, each.arguments)
        for each in keras_config.operations_of(functional())
    ]
    # The shared layer is called on `b` first.
    assert found == [
        ("a", ((),), ([],)),
        ("b", ((),), ([],)),
        ("shared", ((1,), (0,)), ([], [])),
        ("minus", ((2, 2),), ([],)),
        ("multiply", ((3,),), ([2.0],)),
    ]


def test_other_models_have_no_operations():
    assert keras_config.operations_of(keras.Sequential()) == []


def test_layers_within_layers_are_found_in_one_order():
    inner = keras.Sequential([keras.layers.Dense(1, name="inner")])
    model = keras.Sequential([keras.Input([1]), inner])
    names = [layer.name for layer in keras_compat.layers(model)]
    assert names[0] == model.name
    assert names.count("inner") == 1
    assert names == [layer.name for layer in keras_compat.layers(model)]


def test_each_compile_makes_other_options():
    model = keras.Sequential([keras.layers.Dense(1)])
    assert keras_config.compile_options(model) == {}
    model.compile("sgd", "mse", metrics=["mae"], steps_per_execution=2)
    options = keras_config.compile_options(model)
    assert options["loss"] == "mse"
    assert options["metrics"] == ["mae"]
    assert options["steps_per_execution"] == 2
    assert keras_config.compile_options(model) is options
    model.compile("sgd", "mse")
    assert keras_config.compile_options(model) is not options


class Own(keras.layers.Layer):
    def get_config(self):
        raise RuntimeError("none")


@pytest.mark.parametrize(
    ("thing", "is_of_keras"),
    [
        (keras.layers.Dense(1), True),
        (keras.layers.Dense, True),
        (keras.losses.mean_squared_error, True),
        (Own(), False),
        (tf.nn.relu, False),
        (len, False),
    ],
)
def test_what_is_of_keras_is_told_from_what_is_not(thing, is_of_keras):
    assert keras_config.is_of_keras(thing) is is_of_keras


def test_a_config_that_raises_is_none():
    assert keras_config.config_of(Own()) == {}
    assert keras_config.config_of(object()) == {}
    assert keras_config.config_of(keras.layers.Dropout(0.5))["rate"] == 0.5


def test_batch_sizes_of_a_dataset_are_known():
    data = tf.data.Dataset.range(12)
    assert datasets.batch_sizes(data) == []
    assert datasets.batch_sizes(data.batch(3).prefetch(1)) == [3]
    assert datasets.batch_sizes(data.batch(2).batch(4)) == [4, 2]
    assert datasets.batch_sizes(data.batch(2, num_parallel_calls=2)) == [2]


def test_moving_statistics_are_those_of_batch_normalization():
    layer = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1), layer])
    found = keras_compat.moving_statistics(model)
    assert [v.name for v in found] == ["moving_mean", "moving_variance"]
    unbuilt = keras.Sequential([keras.layers.BatchNormalization()])
    assert keras_compat.moving_statistics(unbuilt) == []
