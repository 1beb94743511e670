"""What still differs from one device: each test fails when it no longer does.

One test per entry of docs/sharp_bits.md, "don't" and "do instead" in one. When
the first half of a test fails, a sharp bit is gone: remove it from the page.
A model made outside the scope and `jit_compile=True` end in an error, which
test_devices.py holds.
"""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import DEVICES

from keras_allreduce import AllReduceStrategy

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
TARGET = (X @ RNG.normal(size=(6, 1))).astype("float32")
TOKENS = RNG.integers(1, 20, (32, 5))
TOKENS[:8, 2:] = 0  # Short texts on the first replica of the first batch.
TOKEN_TARGETS = np.repeat(TARGET[:, None], 5, axis=1)

SAME = 1e-6
MAY_DIFFER = "the result may differ from that of one device"


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


def test_a_masked_loss_is_a_mean_over_what_its_replica_does_not_mask():
    def train(masks, **arguments):
        embedding = keras.layers.Embedding(20, 3, mask_zero=masks)
        inputs = keras.Input([5], dtype="int32")
        model = keras.Sequential([inputs, embedding, keras.layers.Dense(1)])
        return fit(model, TOKENS, TOKEN_TARGETS, **arguments)

    def train_with_weights():
        return train(
            masks=False,
            loss=keras.losses.MeanSquaredError(
                reduction="mean_with_sample_weight"
            ),
            sample_weight=(TOKENS != 0).astype("float32"),
        )

    assert difference(lambda: train(masks=True)) > 1e-5
    assert difference(train_with_weights) < SAME


def test_a_loss_that_returns_one_value_counts_once_per_replica():
    def scalar(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred))

    def per_sample(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)

    with pytest.warns(UserWarning, match=r"`scalar` returns one value for all"):
        assert difference(lambda: fit(dense(), loss=scalar)) > 1e-2
    assert difference(lambda: fit(dense(), loss=per_sample)) < SAME


def test_losses_reduced_in_different_ways_are_not_weighed():
    def train(reduction):
        inputs = keras.Input([6])
        heads = [keras.layers.Dense(1)(inputs) for _ in range(2)]
        losses = [
            keras.losses.MeanSquaredError(),
            keras.losses.MeanSquaredError(reduction=reduction),
        ]
        return fit(
            keras.Model(inputs, heads),
            y=[TARGET, TARGET],
            loss=losses,
            optimizer=keras.optimizers.SGD(0.005),
            batch_size=15,
        )

    with pytest.warns(UserWarning, match=MAY_DIFFER):
        assert difference(lambda: train("sum")) > 1e-5
    assert difference(lambda: train("mean")) < SAME


# Steps of your own --------------------------------------------------------


class OwnStep(keras.Model):
    """A model with a `train_step` of its own; subclasses say its loss."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1)
        self.shown = keras.metrics.Mean(name="shown")

    def call(self, x):
        return self.out(x)

    @property
    def metrics(self):
        return [self.shown]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self.shown.update_state(loss * replicas, tf.shape(x)[0])
        return {"loss": loss, "shown": self.shown.result()}


class PlainMean(OwnStep):
    def loss_of(self, x, y):
        return tf.reduce_mean(tf.square(self(x) - y))


class DividedMean(OwnStep):
    def loss_of(self, x, y):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return tf.reduce_mean(tf.square(self(x) - y)) / replicas


class ComputedLoss(OwnStep):
    def loss_of(self, x, y):
        return self.compute_loss(x, y, self(x))


def test_a_plain_mean_in_a_step_of_your_own_counts_once_per_replica():
    def on_two(model):
        return difference(lambda: fit(model()), weigh_samples=True)

    assert on_two(PlainMean) > 1e-2
    assert on_two(DividedMean) < SAME
    assert on_two(ComputedLoss) < SAME


def test_a_step_of_your_own_is_not_weighed_unless_you_say_so():
    def train():
        return fit(ComputedLoss(), batch_size=15)

    with pytest.warns(UserWarning, match=MAY_DIFFER):
        assert difference(train) > 1e-3
    assert difference(train, weigh_samples=True) < SAME


def test_what_compute_loss_returns_is_already_divided():
    def shown(replicas):
        steps = Steps()
        in_scope(
            replicas,
            lambda: fit(ComputedLoss(), callbacks=[steps], epochs=1),
            weigh_samples=True,
        )
        return [np.array([log[k] for log in steps.logs]) for k in steps.logs[0]]

    (loss, mean), (loss_of_two, mean_of_two) = shown(1), shown(2)
    np.testing.assert_allclose(loss_of_two, loss / 2, rtol=1e-5)
    np.testing.assert_allclose(mean_of_two, mean, rtol=1e-5)


EMPTY_REPLICA = """
import keras, numpy as np, tensorflow as tf
import keras_allreduce

class Model(keras.Sequential):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

strategy = keras_allreduce.AllReduceStrategy(
    keras_allreduce.host_devices(2), weigh_samples=WEIGH
)
with strategy.scope():
    model = Model([
        keras.Input([8, 8, 1]), keras.layers.Conv2D(2, 2),
        keras.layers.MaxPooling2D(), keras.layers.Flatten(),
        keras.layers.Dense(1),
    ])
    model.compile("sgd", "mse")
# The last batch is one sample for two replicas.
model.fit(np.ones([5, 8, 8, 1]), np.ones([5, 1]), batch_size=4, verbose=0)
"""


# Which kernels TensorFlow takes by itself depends on the processor.
ONEDNN = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"}


@pytest.mark.parametrize(("weigh", "ends"), [("False", "abort"), ("True", 0)])
def test_an_empty_replica_can_end_a_step_of_your_own(weigh, ends):
    script = EMPTY_REPLICA.replace("WEIGH", weigh)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        env=ONEDNN,
    )
    assert done.returncode == 0 if ends == 0 else done.returncode < 0


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


EMPTY_PREDICT = """
import keras, numpy as np, tensorflow as tf
import keras_allreduce

devices = keras_allreduce.host_devices(2)
with keras_allreduce.AllReduceStrategy(devices).scope():
    model = keras.Sequential([
        keras.Input([8, 8, 8]), keras.layers.SeparableConv2D(16, 3),
        keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1),
    ])
images = np.ones([6, 8, 8, 8], "float32")
try:
    model.predict(images[:5], batch_size=4, verbose=0)
except tf.errors.InvalidArgumentError:
    print("failed", end=" ")
# At least one sample for each replica.
print(model.predict(images, batch_size=4, verbose=0).shape, end=" ")
print(model.predict(images[:5], batch_size=5, verbose=0).shape)
"""


def test_predict_on_an_empty_replica_can_fail():
    done = subprocess.run(
        [sys.executable, "-c", EMPTY_PREDICT],
        capture_output=True,
        check=True,
        text=True,
        env=ONEDNN,
    )
    assert done.stdout.split("\n")[0] == "failed (6, 1) (5, 1)"


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


# Metrics ------------------------------------------------------------------


def test_in_the_logs_of_a_step_an_auc_is_a_mean_over_replicas():
    def train():
        steps = Steps()
        model = keras.Sequential(
            [keras.Input([6]), keras.layers.Dense(1, "sigmoid")]
        )
        model.compile("sgd", "binary_crossentropy", metrics=["accuracy", "auc"])
        history = model.fit(
            X,
            (X[:, :1] > 0).astype("float32"),
            batch_size=16,
            shuffle=False,
            verbose=0,
            callbacks=[steps],
        )
        return steps.logs, history.history

    (steps, epoch), (steps_of_two, epoch_of_two) = (
        in_scope(1, train),
        in_scope(2, train),
    )
    assert abs(steps[-1]["auc"] - steps_of_two[-1]["auc"]) > 1e-4
    assert steps[-1]["accuracy"] == pytest.approx(steps_of_two[-1]["accuracy"])
    assert epoch["auc"] == pytest.approx(epoch_of_two["auc"], abs=SAME)
