"""What replicas gather on their own is that of one model afterwards."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
import warm_python
from five_devices import DEVICES

import keras_allreduce
from keras_allreduce.compat import keras_config
from programs import Custom, X, Y, dense, fit


def on(replicas):
    keras.utils.set_random_seed(3)
    return keras_allreduce.AllReduceStrategy(DEVICES[:replicas])


@pytest.mark.slow
def test_moving_means_are_those_of_one_device():
    def train():
        layer = keras.layers.BatchNormalization(momentum=0.5)
        fit(keras.Sequential([keras.Input([6]), layer, keras.layers.Dense(1)]))
        return layer.moving_mean.numpy()

    with on(3).scope():
        found = train()
    np.testing.assert_allclose(found, train(), rtol=1e-5, atol=1e-6)


def test_a_whole_number_that_is_a_mean_is_rounded_as_on_one_device():
    class Rounds(keras.layers.Layer):
        """Keeps the rounded mean of a batch."""

        def __init__(self):
            super().__init__()
            self.mean = self.add_weight(
                dtype="int32", initializer="zeros", trainable=False
            )

        def call(self, x):
            mean = keras.ops.round(keras.ops.mean(x))
            self.mean.assign(keras.ops.cast(mean, "int32"))
            return x

    with on(2).scope():
        layer = Rounds()
        model = keras.Sequential([layer, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    # Replicas have 3 and 4; the mean of both, 3.5, is rounded to 4.
    x = np.array([[3.0], [4.0]] * 8)
    model.fit(x, np.ones([16, 1]), batch_size=2, verbose=0)
    assert [part.numpy() for part in layer.mean.value.values] == [4, 4]


def test_the_largest_value_that_float8_knows_is_that_of_the_batch():
    def largest_inputs():
        model = dense()
        model.quantize("float8")
        # Also checks that all replicas have the same scales.
        fit(model)
        (history,) = (
            weight
            for weight in model.layers[0].weights
            if weight.name == "inputs_amax_history"
        )
        return history.numpy()

    with on(3).scope():
        found = largest_inputs()
    assert np.any(found)
    np.testing.assert_array_equal(found, largest_inputs())


@pytest.mark.slow
def test_float8_without_a_bias_in_even_parts_trains_as_on_one_device():
    # Keras rounds the gradient of a bias to bfloat16, and all gradients in a
    # layer to float8: alike if those of a part are a power of 2 as large.
    def weights():
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(5, "relu", use_bias=False),
                keras.layers.Dense(1, use_bias=False),
            ]
        )
        model.quantize("float8")
        fit(model, X[:24], Y[:24], epochs=3, batch_size=8)
        return model.get_weights()

    with on(2).scope():
        found = weights()
    for ours, expected in zip(found, weights(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


class Noise(keras.layers.Layer):
    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


class ShowsNoise(keras.Model):
    """Draws without a seed, in its step alone."""

    def train_step(self, x):
        return {"noise": keras.random.normal([1, 4])}  # A row for the sample.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:What a step shows")
def test_replicas_draw_different_numbers_without_a_seed():
    strategy = on(3)
    with strategy.scope():
        model = ShowsNoise()
        model.compile("sgd")
    drawn = [
        row.tobytes()
        for _ in range(2)
        for part in strategy.experimental_local_results(
            strategy.run(model.train_step, args=(tf.ones([3, 1]),))["noise"]
        )
        for row in part.numpy()
    ]
    assert len(set(drawn)) == 6


@pytest.mark.slow
def test_a_layer_may_draw_without_a_seed():
    def losses():
        with on(2).scope():
            return fit(dense(Noise()), epochs=2)["history"]["loss"]

    assert losses() == losses()


@pytest.mark.slow
def test_drawing_without_a_seed_does_not_shift_the_seeds_of_models():
    def weights():
        fit(dense())
        return dense().get_weights()[0]

    with on(2).scope():
        found = weights()
    keras.utils.set_random_seed(3)
    np.testing.assert_array_equal(found, weights())


@pytest.mark.slow
def test_settings_of_keras_reach_the_threads_of_replicas():
    seen = []

    class Sees(Custom):
        def train_step(self, data):
            seen.append(
                (
                    threading.current_thread() is threading.main_thread(),
                    keras.config.dtype_policy().name,
                    keras.config.is_flash_attention_enabled(),
                )
            )
            return super().train_step(data)

    with on(2).scope():
        model = Sees()
        keras.config.set_dtype_policy("float64")
        keras.config.disable_flash_attention()
        try:
            fit(model)
        finally:
            keras.config.set_dtype_policy("float32")
            keras.config.enable_flash_attention()
    assert set(seen) == {(False, "float64", False)}


@pytest.mark.slow
def test_the_stacks_of_a_thread_stay_its_own():
    with keras.name_scope("outer"):
        assert not any("scope" in name for name in keras_config.settings())


DETERMINISTIC = """
import keras, numpy as np, tensorflow as tf
import keras_allreduce

tf.config.experimental.enable_op_determinism()
keras.utils.set_random_seed(1)
strategy = keras_allreduce.AllReduceStrategy(keras_allreduce.host_devices(2))
with strategy.scope():
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
model.fit(np.ones([8, 6]), np.ones([8, 1]), batch_size=4, verbose=2)
print(strategy.all_reduce_stats())
"""


@pytest.mark.slow
def test_a_deterministic_fit_shows_its_plan_and_takes_no_time():
    done = warm_python.run(["-c", DETERMINISTIC])
    assert done.returncode == 0, done.stderr
    assert "num_packs" in done.stdout
    assert done.stdout.splitlines()[-1] == "None"


class Median(keras.metrics.Metric):
    """A state that is no sum, no maximum and no minimum."""

    def __init__(self, name="median"):
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        product = keras.ops.prod(1.5 + keras.ops.abs(y_true))
        self.value.assign(self.value * self.value + product)

    def result(self):
        return self.value * 1.0


@pytest.mark.slow
def test_a_metric_whose_state_does_not_add_up_is_warned_about():
    with (
        on(2).scope(),
        pytest.warns(UserWarning, match="'median' does not add up"),
    ):
        fit(dense(), metrics=[Median()])


@pytest.mark.slow
def test_gradients_that_the_tape_gave_are_not_summed_again():
    class SumsAgain(Custom):
        def train_step(self, data):
            loss, gradients = self.gradients(*data)
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce("SUM", gradients)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"own": loss}

    with on(2).scope():
        found = fit(SumsAgain())
    keras.utils.set_random_seed(3)
    for one, other in zip(
        found["weights"], fit(Custom())["weights"], strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_train_on_batch_divides_the_batch():
    sizes = []

    class Sizes(Custom):
        def train_step(self, data):
            sizes.append(data[0].shape[0])
            return super().train_step(data)

    with on(3).scope():
        model = Sizes()
        model.compile("sgd", run_eagerly=True)
        model.train_on_batch(X[:5], Y[:5])
    # Measured on two halves of four of five samples, and of all four.
    assert sizes[-3:] == [2, 2, 1]
