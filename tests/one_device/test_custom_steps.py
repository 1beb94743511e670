"""Steps that go on with their gradients, keep state or communicate."""

import contextlib
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from keras import ops

import keras_allreduce

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 6)).astype("float32")
Y = (X @ RNG.normal(size=(6, 1))).astype("float32")
# Of the first samples more is masked.
MASK = (RNG.uniform(size=(23, 1)) > np.linspace(0.9, 0.1, 23)[:, None]).astype(
    "float32"
)


class Model(keras.Model):
    """A model with a custom step; subclasses say the step."""

    def __init__(self):
        super().__init__()
        self.net = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(5, "tanh"),
                keras.layers.Dense(1),
            ]
        )

    def call(self, x, training=None):
        return self.net(x, training=training)

    def error(self, x, y):
        return ops.mean((self.net(x) - y) ** 2)

    def apply(self, loss, tape):
        variables = self.net.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return gradients

    def step_on_mean(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.error(x, y)
        self.apply(loss, tape)
        return {"own": loss}


STEPS = {}


def step(of):
    STEPS[of.__name__] = of
    return of


@step
class SharpnessAware(Model):
    """The weights are moved along a first gradient, for a second."""

    def train_step(self, data):
        x, y = data
        variables = self.net.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.error(x, y)
        gradients = tape.gradient(loss, variables)
        norm = tf.linalg.global_norm(gradients)
        moves = [0.05 * each / norm for each in gradients]
        for variable, move in zip(variables, moves, strict=True):
            variable.assign_add(move)
        with tf.GradientTape() as tape:
            second = self.error(x, y)
        gradients = tape.gradient(second, variables)
        for variable, move in zip(variables, moves, strict=True):
            variable.assign_sub(move)
        self.optimizer.apply(gradients, variables)
        return {"own": loss, "norm": norm}


@step
class AdaptiveWeight(Model):
    """Two losses, weighed by the norms of their gradients."""

    def train_step(self, data):
        x, y = data
        last = self.net.layers[-1].kernel
        with tf.GradientTape(persistent=True) as tape:
            prediction = self.net(x)
            one = ops.mean((prediction - y) ** 2)
            other = ops.mean(ops.abs(prediction + y))
            with tape.stop_recording():
                weight = tf.norm(tape.gradient(one, last)) / tf.norm(
                    tape.gradient(other, last)
                )
            loss = one + weight * other
        self.apply(loss, tape)
        return {"own": loss, "weight": weight}


@step
class PerSampleClipping(Model):
    """Gradients of each sample are clipped, then averaged."""

    def train_step(self, data):
        x, y = data
        variables = self.net.trainable_variables
        with tf.GradientTape() as tape:
            losses = ops.mean((self.net(x) - y) ** 2, axis=-1)
        clipped = []
        for each in tape.jacobian(losses, variables):
            flat = tf.reshape(each, [tf.shape(each)[0], -1])
            flat = tf.clip_by_norm(flat, 0.5, axes=[1])
            mean = tf.reduce_mean(flat, axis=0)
            clipped.append(tf.reshape(mean, tf.shape(each)[1:]))
        self.optimizer.apply(clipped, variables)
        return {"own": ops.mean(losses)}


@step
class PerSampleInVectorizedMap(Model):
    def train_step(self, data):
        variables = self.net.trainable_variables

        def of_sample(sample):
            x, y = sample
            with tf.GradientTape() as tape:
                loss = self.error(x[tf.newaxis], y[tf.newaxis])
            gradients, _ = tf.clip_by_global_norm(
                tape.gradient(loss, variables), 0.5
            )
            return gradients

        per_sample = tf.vectorized_map(of_sample, data)
        means = [tf.reduce_mean(each, axis=0) for each in per_sample]
        self.optimizer.apply(means, variables)
        return {"own": self.error(*data)}


@step
class AdversarialInputs(Model):
    """Inputs are moved along the gradient of a mean."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = self.error(x, y)
        return self.step_on_mean(x + 5.0 * tape.gradient(loss, x), y)


@step
class GradientPenalty(Model):
    """The gradient of each output by its input, and the gradient of that."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                outputs = self.net(x)
            slopes = inner.gradient(outputs, x)
            norms = tf.sqrt(tf.reduce_sum(slopes**2, axis=1) + 1e-9)
            loss = self.error(x, y) + tf.reduce_mean((norms - 1.0) ** 2)
        self.apply(loss, tape)
        return {"own": loss}


@step
class AccumulatesInCond(Model):
    """The most copied snippet for accumulation."""

    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0, trainable=False)
        self.sums = [
            tf.Variable(tf.zeros_like(each), trainable=False)
            for each in self.net.trainable_variables
        ]

    def train_step(self, data):
        x, y = data
        self.count.assign_add(1)
        with tf.GradientTape() as tape:
            loss = self.error(x, y)
        gradients = tape.gradient(loss, self.net.trainable_variables)
        for total, each in zip(self.sums, gradients, strict=True):
            total.assign_add(each)
        tf.cond(tf.equal(self.count, 2), self.apply_sums, lambda: None)
        return {"own": loss}

    def apply_sums(self):
        self.optimizer.apply_gradients(
            zip(self.sums, self.net.trainable_variables, strict=True)
        )
        self.count.assign(0)
        for total in self.sums:
            total.assign(tf.zeros_like(total))


class Keeps(Model):
    """Keeps what `kept` makes of a batch and of what was there."""

    start = "zeros"
    aggregation = None

    def __init__(self):
        super().__init__()
        self.state = self.add_weight(
            shape=[6],
            initializer=self.start,
            trainable=False,
            aggregation=self.aggregation,
        )

    def train_step(self, data):
        self.state.assign(self.kept(self.state.value, data[0]))
        return self.step_on_mean(*data)


@step
class AverageOfSumsFromOne(Keeps):
    """VQ-VAE: how many samples a code has, a moving average from 1."""

    start = "ones"

    def kept(self, before, x):
        return 0.9 * before + 0.1 * tf.reduce_sum(tf.cast(x > 0, x.dtype), 0)


@step
class AverageWithAnAggregation(Keeps):
    """TensorFlow takes the mean, by samples."""

    aggregation = "mean"

    def kept(self, before, x):
        return 0.9 * before + 0.1 * tf.reduce_mean(x, axis=0)


@step
class CountsWithAnAggregation(Model):
    """The counter of TensorFlow's guide, and a loss that is a sum."""

    def __init__(self):
        super().__init__()
        self.seen = tf.Variable(
            0.0, trainable=False, aggregation=tf.VariableAggregation.SUM
        )

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = 0.02 * ops.sum((self.net(x) - y) ** 2)
        self.apply(loss, tape)
        self.seen.assign_add(tf.cast(tf.shape(x)[0], "float32"))
        return {"own": loss, "seen": self.seen}


@step
class CountsInPython(Model):
    """The loss follows from how often Python has run the step."""

    begun = 0

    def __init__(self):
        super().__init__()
        self.ended = 0

    def train_step(self, data):
        self.begun += 1
        factor = 1.0 if self.begun % 2 else 0.5
        with tf.GradientTape() as tape:
            loss = factor * self.error(*data)
        self.apply(loss, tape)
        # The other replicas have run as far in the meantime.
        self.ended += 1
        return {"own": loss, "ended": tf.constant(float(self.ended))}


def train(of, replicas, eager=False, size=10, epochs=2, rows=None):
    """Weights and History of a model on some replicas, and its warnings."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    scope = contextlib.nullcontext()
    if replicas > 1:
        scope = keras_allreduce.AllReduceStrategy(DEVICES[:replicas]).scope()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with scope:
            model = of()
            model.compile(keras.optimizers.SGD(0.05), run_eagerly=eager)
            history = model.fit(
                X[:rows],
                Y[:rows],
                batch_size=size,
                epochs=epochs,
                shuffle=False,
                verbose=0,
            ).history
    found = [weight.numpy() for weight in model.variables]
    messages = [str(each.message) for each in caught]
    return (
        found,
        history,
        [
            each
            for each in messages
            if "Each replica" in each
            or "It is" in each
            or "made outside" in each
        ],
    )


def agree(found, wanted):
    for one, other in zip(found[0], wanted[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, values in wanted[1].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-4)
    assert not found[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_trains_on_replicas_as_on_one_device(name):
    agree(train(STEPS[name], 3), train(STEPS[name], 1))


@pytest.mark.slow
def test_a_layer_that_sums_over_replicas_itself_sees_their_number():
    class Center(keras.layers.Layer):
        def call(self, x):
            mean = tf.reduce_mean(x, axis=0)
            context = tf.distribute.get_replica_context()
            count = context.num_replicas_in_sync
            return x - context.all_reduce("SUM", mean) / count

    class Centered(Model):
        def train_step(self, data):
            return self.step_on_mean(*data)

        def error(self, x, y):
            return ops.mean((self.center(self.net(x)) - y) ** 2)

        def __init__(self):
            super().__init__()
            self.center = Center()

    even = {"size": 8, "rows": 16}
    agree(train(Centered, 2, **even), train(Centered, 1, **even))


@pytest.mark.slow
def test_a_step_with_python_in_it_is_measured_eagerly():
    class Looks(Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = 0.02 * ops.sum((self.net(x) - y) ** 2)
            assert np.isfinite(loss.numpy())
            self.apply(loss, tape)
            return {"own": loss}

    agree(train(Looks, 2, eager=True), train(Looks, 1, eager=True))


def test_an_eager_step_counts_in_python_as_on_one_device():
    models = []

    def make():
        models.append(CountsInPython())
        return models[-1]

    agree(train(make, 3, eager=True), train(make, 1, eager=True))
    assert [(each.begun, each.ended) for each in models] == [(6, 6)] * 2


def made_outside(make):
    with ThreadPoolExecutor(1) as thread:  # Which is in no scope.
        return thread.submit(make).result()


class Outside(Model):
    """Assigns to a variable that no strategy has made."""

    def __init__(self, assign):
        super().__init__()
        self.assign = assign
        self.kept = made_outside(lambda: tf.Variable(0.0, trainable=False))
        self.mean = made_outside(keras.metrics.Mean)

    def train_step(self, data):
        logs = self.step_on_mean(*data)
        self.assign(self, data[0], logs["own"])
        return logs


def counts_steps(model, _x, _loss):
    model.kept.assign_add(1.0)


def averages(model, x, _loss):
    kept = model.kept
    kept.assign(0.9 * kept + 0.1 * tf.reduce_mean(x))


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("assign", [counts_steps, averages])
def test_a_shared_variable_that_is_no_sum_is_warned_about(assign, eager):
    _, _, messages = train(lambda: Outside(assign), 2, eager=eager)
    (message,) = messages
    assert "Received: 'Variable:0', made outside" in message


def counts_samples(model, x, _loss):
    model.kept.assign_add(tf.cast(tf.shape(x)[0], tf.float32))


def updates_a_metric(model, _x, loss):
    model.mean.update_state(loss)


SEEDS = keras.random.SeedGenerator(3)


def draws(_model, x, _loss):
    keras.random.normal(tf.shape(x), seed=SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("assign", [counts_samples, updates_a_metric, draws])
def test_replicas_add_up_in_a_shared_variable_without_a_warning(assign):
    models = []

    def make():
        models.append(Outside(assign))
        return models[-1]

    agree(train(make, 2), train(make, 1))
    found, wanted = (
        (float(each.kept), float(each.mean.result())) for each in models
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.slow
def test_ops_that_are_noticed_outside_run_only_in_the_steps(tmp_path):
    calls, rows = [], []
    printed = tmp_path / "printed.txt"

    def seen(x):
        calls.append(len(calls))
        rows.extend(x)
        return np.float32(0)

    class Effects(Model):
        def __init__(self):
            super().__init__()
            self.table = tf.lookup.experimental.MutableHashTable(
                tf.int64, tf.int64, 0
            )
            self.queue = tf.queue.FIFOQueue(100, tf.float32)

        def train_step(self, data):
            one = tf.constant([1], tf.int64)
            tf.numpy_function(seen, [data[0]], tf.float32)
            tf.print("step", output_stream=f"file://{printed}")
            self.table.insert(one, self.table.lookup(one) + 1)
            self.queue.enqueue(1.0)
            return self.step_on_mean(*data)

    models = []

    def make():
        models.append(Effects())
        return models[0]

    train(make, 2, size=8, epochs=2)
    steps = 2 * 3 * 2  # Epochs, batches, replicas.
    assert len(calls) == steps
    assert len(rows) == 2 * len(X)
    assert printed.read_text().count("step") == steps
    assert int(models[0].queue.size()) == steps


@pytest.mark.slow
def test_a_step_that_draws_from_an_iterator_is_not_run_to_measure_it():
    iterator = iter(tf.data.Dataset.from_tensor_slices(X).repeat().batch(4))

    class Draws(Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.error(x, y) + ops.mean(self.net(next(iterator)))
            self.apply(loss, tape)
            return {"own": loss}

    *_, (warning,) = train(Draws, 2)
    assert "IteratorGetNext" in warning
    assert "It is taken for a mean" in warning


@pytest.mark.slow
def test_a_term_that_is_0_at_first_is_seen():
    class WarmsUp(Model):
        def __init__(self):
            super().__init__()
            self.beta = self.add_weight(initializer="zeros", trainable=False)

        def error(self, x, y):
            divergence = ops.sum(self.net(x) ** 2)
            return super().error(x, y) + self.beta * divergence

        def train_step(self, data):
            return self.step_on_mean(*data)

    *_, (warning,) = train(WarmsUp, 2)
    assert "adds a sum to a mean" in warning


@pytest.mark.slow
def test_a_queue_is_that_of_the_first_replica_and_warned_about():
    class Queue(Keeps):
        def kept(self, before, x):
            return tf.concat([x[:1, 0], before[:5]], axis=0)

    found, _, (warning,) = train(Queue, 2, epochs=4)
    assert "that of the first is taken" in warning
    assert max(np.abs(each).max() for each in found) < 10


@pytest.mark.slow
def test_warnings_are_given_once_of_each_kind():
    class Several(Keeps):
        def kept(self, before, x):
            return tf.maximum(before, tf.reduce_max(x, axis=0))

        def error(self, x, y):
            return super().error(x, y) + 0.1 * ops.sum(self.net(x) ** 2)

    *_, messages = train(Several, 2)
    assert len(messages) == 2
    assert sum("adds a sum to a mean" in each for each in messages) == 1
    assert sum("the first is taken" in each for each in messages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("loop", [True, False], ids=["while", "cond"])
def test_a_gradient_in_control_flow_is_an_error_that_says_what_to_write(loop):
    class Inside(Model):
        def train_step(self, data):
            def update():
                with tf.GradientTape() as tape:
                    loss = self.error(*data)
                self.apply(loss, tape)
                return loss

            if loop:
                return {
                    "own": tf.while_loop(
                        lambda i, _: i < 2,
                        lambda i, _: (i + 1, update()),
                        (0, 0.0),
                    )[1]
                }
            flag = tf.reduce_sum(data[0]) > 0
            return {"own": tf.cond(flag, update, lambda: 0.0)}

    with pytest.raises(RuntimeError, match="Take the gradients outside"):
        train(Inside, 2)
