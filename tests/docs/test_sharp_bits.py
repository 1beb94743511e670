"""What still differs from one device: each test fails when it no longer does.

One test per entry of docs/sharp_bits.md, "don't" and "do instead" in one. When
the first half of a test fails, a sharp bit is gone: remove it from the page.
A model made outside the scope ends in an error, which test_devices.py holds.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy

pytestmark = pytest.mark.nightly

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
TARGET = (X @ RNG.normal(size=(6, 1))).astype("float32")

SAME = 1e-6


def in_scope(replicas, make, **arguments):
    """Calls `make` on one device or on replicas, always from one seed."""
    keras.utils.set_random_seed(3)
    if replicas == 1:
        return make()
    with AllReduceStrategy(DEVICES[:replicas], **arguments).scope():
        return make()


def difference(make, **arguments):
    """Largest weight difference that `make` gives on 1 and on 2 replicas."""
    one = in_scope(1, make).get_weights()
    two = in_scope(2, make, **arguments).get_weights()
    pairs = zip(one, two, strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


def dense(*layers):
    return keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(8, "tanh"),
            *layers,
            keras.layers.Dense(1),
        ]
    )


def fit(model, x=X, y=TARGET, loss="mse", optimizer=None, **arguments):
    arguments = {"batch_size": 16, "epochs": 2, "verbose": 0} | arguments
    model.compile(optimizer or keras.optimizers.SGD(0.05), loss)
    model.fit(x, y, shuffle=False, **arguments)
    return model


class Steps(keras.callbacks.Callback):
    """The logs of each step."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))


# Layers and losses --------------------------------------------------------


def test_batch_normalization_sees_its_own_replica_unless_synchronized():
    def train(synchronized):
        layer = keras.layers.BatchNormalization(synchronized=synchronized)
        return fit(dense(layer))

    assert difference(lambda: train(synchronized=False)) > 1e-3
    assert difference(lambda: train(synchronized=True)) < SAME


def test_dropout_is_reproducible_but_not_that_of_one_device():
    def train():
        return fit(dense(keras.layers.Dropout(0.5)))

    assert difference(train) > 1e-3
    first, second = in_scope(2, train), in_scope(2, train)
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_layer_that_mixes_samples_is_warned_about():
    class Dot(keras.Model):
        def __init__(self, score):
            super().__init__()
            self.user, self.movie = (keras.layers.Dense(3) for _ in "ab")
            self.score = score

        def call(self, x):
            score = self.score(self.user(x), self.movie(x))
            return keras.ops.sigmoid(score) + keras.ops.sum(x, 1, keepdims=True)

    def of_the_batch():
        return fit(Dot(lambda user, movie: tf.tensordot(user, movie, 2)))

    def of_each_sample():
        return fit(
            Dot(lambda a, b: keras.ops.sum(a * b, axis=1, keepdims=True))
        )

    with pytest.warns(
        UserWarning, match=r"layer 'dot.*' \(Dot\) mixes the samples"
    ):
        assert difference(of_the_batch) > 1e-4
    assert difference(of_each_sample) < SAME


# Custom steps -------------------------------------------------------------


class Custom(keras.Model):
    """A custom `train_step`; subclasses say its loss."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1)

    def call(self, x):
        return self.out(x)

    def loss_of(self, x, y):
        return tf.reduce_mean(tf.square(self(x) - y))

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        return loss, tape.gradient(loss, self.trainable_variables)

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


class SumAndMean(Custom):
    def loss_of(self, x, y):
        divergence = tf.square(self(x))
        return super().loss_of(x, y) + 1e-2 * tf.reduce_sum(divergence)


class TwoMeans(Custom):
    def loss_of(self, x, y):
        divergence = tf.square(self(x))
        return super().loss_of(x, y) + 1e-2 * tf.reduce_mean(divergence)


def test_a_mean_and_a_sum_in_one_loss_are_warned_about():
    with pytest.warns(UserWarning, match="adds a sum to a mean"):
        assert difference(lambda: fit(SumAndMean())) > 1e-4
    assert difference(lambda: fit(TwoMeans())) < SAME


def test_regularization_scaled_by_the_replicas_counts_once_per_replica():
    class OfLoops(Custom):
        def loss_of(self, x, y):
            error = tf.reduce_mean(tf.square(self(x) - y), axis=-1)
            loss = tf.nn.compute_average_loss(error, global_batch_size=16)
            penalty = tf.nn.l2_loss(self.out.kernel)
            return loss + tf.nn.scale_regularization_loss(penalty)

    with pytest.warns(UserWarning, match="adds a sum to a mean"):
        assert difference(lambda: fit(OfLoops())) > 1e-3


def test_measuring_runs_the_python_of_a_step_once_more():
    traces = []

    class Counts(Custom):
        def train_step(self, data):
            traces.append(1)
            return super().train_step(data)

    def count(replicas, **options):
        traces.clear()
        in_scope(
            replicas, lambda: fit(Counts(), X[:16], TARGET[:16]), **options
        )
        return len(traces)

    assert count(2) == count(2, weigh_samples=True) + 1


class Keeps(Custom):
    """Keeps what it makes of a batch, and what was there before."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.weight = self.add_weight(initializer="zeros", trainable=False)

    def train_step(self, data):
        self.weight.assign(self.kept(self.weight.value, data[0]))
        return super().train_step(data)


def test_a_maximum_that_a_step_keeps_is_warned_about():
    def largest(before, x):
        return tf.maximum(before, tf.reduce_max(x))

    def sum_of_squares(before, x):
        return before + tf.reduce_sum(tf.square(x))

    def kept(replicas, of):
        model = in_scope(replicas, lambda: fit(Keeps(of), epochs=1))
        return float(model.weight.numpy())

    with pytest.warns(UserWarning, match="neither the mean nor the sum"):
        assert kept(2, largest) < kept(1, largest)
    found, wanted = kept(2, sum_of_squares), kept(1, sum_of_squares)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_gradients_are_not_summed_inside_a_conditional():
    class EveryOther(Custom):
        @tf.function
        def train_step(self, data):
            loss, gradients = self.gradients(*data)
            if tf.equal(self.optimizer.iterations % 2, 0):
                _, gradients = self.gradients(*data)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    with pytest.raises(RuntimeError, match="Take the gradients outside"):
        in_scope(2, lambda: fit(EveryOther()), weigh_samples=True)


# Custom training loops ----------------------------------------------------


def test_in_a_loop_of_your_own_the_optimizer_clips_each_replica():
    def train(clips_itself):
        strategy = tf.distribute.get_strategy()
        replicas = strategy.num_replicas_in_sync
        model = dense()
        optimizer = keras.optimizers.SGD(
            0.3, clipnorm=0.05 if clips_itself else None
        )
        optimizer.build(model.trainable_variables)

        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(model(x) - y)) / 16
            gradients = tape.gradient(loss, model.trainable_variables)
            if not clips_itself:
                context = tf.distribute.get_replica_context()
                gradients = context.all_reduce("SUM", gradients)
                gradients = [tf.clip_by_norm(g, 0.05) for g in gradients]
                # The optimizer adds the replicas up once more.
                gradients = [g / replicas for g in gradients]
            optimizer.apply(gradients, model.trainable_variables)

        data = tf.data.Dataset.from_tensor_slices((X, TARGET)).batch(16)
        run = tf.function(lambda batch: strategy.run(step, batch))
        for batch in strategy.experimental_distribute_dataset(data):
            run(batch)
        return model

    assert difference(lambda: train(clips_itself=True)) > 1e-3
    assert difference(lambda: train(clips_itself=False)) < SAME


def test_a_tf_function_inside_run_has_no_clocks():
    def stats(wrap):
        strategy = AllReduceStrategy(DEVICES[:2])
        with strategy.scope():
            variable = tf.Variable(tf.ones([4]))

        def step():
            context = tf.distribute.get_replica_context()
            variable.assign_sub(context.all_reduce("SUM", 0.1 * variable))

        inner = tf.function(step) if wrap else step
        run = tf.function(lambda: strategy.run(inner))
        for _ in range(3):
            run()
        return strategy.all_reduce_stats()

    assert stats(wrap=True) is None
    assert stats(wrap=False).steps == 2


# Input --------------------------------------------------------------------


def sentences():
    for length in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11):
        yield np.ones([4, length], "int32"), np.ones([4, 1], "float32")


class Sentences(keras.utils.PyDataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return list(sentences())[index]


def test_a_generator_of_sentences_that_vary_in_length_loses_batches():
    def model():
        return keras.Sequential(
            [
                keras.Input([None], dtype="int32"),
                keras.layers.Embedding(3, 2),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(1),
            ]
        )

    def num_steps(data):
        steps = Steps()
        fit(model(), data, None, epochs=1, batch_size=None, callbacks=[steps])
        return len(steps.logs)

    dataset = tf.data.Dataset.from_generator(
        sentences,
        output_signature=(
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None, 1]),
        ),
    )
    assert in_scope(1, lambda: num_steps(sentences())) == 10
    assert in_scope(2, lambda: num_steps(sentences())) < 10
    assert in_scope(2, lambda: num_steps(dataset)) == 10
    assert in_scope(2, lambda: num_steps(Sentences(workers=1))) == 10


# Gradient accumulation ----------------------------------------------------


def accumulating(**arguments):
    return keras.optimizers.SGD(0.3, gradient_accumulation_steps=2, **arguments)


def test_a_model_saved_between_two_updates_forgets_other_replicas(tmp_path):
    def train(steps_before):
        model = dense()
        start = 16 * steps_before
        data = [np.tile(X, (2, 1)), np.tile(TARGET, (2, 1))]
        before, after = ([d[:start] for d in data], [d[start:] for d in data])
        fit(model, *before, optimizer=accumulating(), epochs=1)
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
        model.fit(*after, batch_size=16, shuffle=False, verbose=0)
        return model

    assert difference(lambda: train(steps_before=1)) > 1e-3
    assert difference(lambda: train(steps_before=2)) < SAME


def test_a_scaled_loss_is_reduced_in_every_step(capsys):
    def plan(optimizer):
        in_scope(2, lambda: fit(dense(), optimizer=optimizer(), verbose=2))
        output = capsys.readouterr().out.splitlines()
        return next(line for line in output if "batch_all_reduce" in line)

    scaled = keras.optimizers.LossScaleOptimizer
    assert "sent once in" not in plan(lambda: scaled(accumulating()))
    assert "sent once in 2 steps" in plan(accumulating)
