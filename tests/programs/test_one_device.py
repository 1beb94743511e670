"""N replicas train as one device does: weights and History, case by case.

Each case is a function that trains and returns a model and what `fit`
reported. It runs once without a strategy and once per number of replicas, from
the same seed; the results must agree up to float rounding.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

import keras_allreduce

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(66, 6)).astype("float32")
Y = (X[:, 0] - X[:, 1] > 0).astype("int32")
TARGET = (X @ RNG.normal(size=(6, 1))).astype("float32")
IMAGES = RNG.normal(size=(21, 8, 8, 3)).astype("float32")
TOKENS = RNG.integers(0, 20, (34, 5))
WEIGHTS = RNG.uniform(0.1, 3, 66).astype("float32")

CASES = {}


def case(*args, **settings):
    """Adds a case; further arguments are its `tolerance` or `strategy`."""
    if args:
        CASES[args[0].__name__] = (args[0], {})
        return args[0]

    def add(function):
        CASES[function.__name__] = (function, settings)
        return function

    return add


def dense(*layers, inputs=6):
    return keras.Sequential(
        [
            keras.Input([inputs]),
            keras.layers.Dense(8, "tanh"),
            *layers,
            keras.layers.Dense(1),
        ]
    )


def fit(
    model,
    x=X,
    y=TARGET,
    optimizer=None,
    loss="mse",
    metrics=None,
    batch_size=32,
    epochs=2,
    compile_args=None,
    **fit_args,
):
    model.compile(
        optimizer or keras.optimizers.SGD(0.05),
        loss,
        metrics=metrics,
        **(compile_args or {}),
    )
    fit_args.setdefault("shuffle", False)
    if not isinstance(
        x, (tf.data.Dataset, keras.utils.PyDataset)
    ) and not hasattr(x, "__next__"):
        fit_args.update(y=y, batch_size=batch_size)
    history = model.fit(x, epochs=epochs, verbose=0, **fit_args)
    return model, history.history


# Batches of any size ------------------------------------------------------


def _batch(samples, batch_size):
    def train():
        return fit(
            dense(), X[:samples], TARGET[:samples], batch_size=batch_size
        )

    train.__name__ = f"{samples}_samples_in_batches_of_{batch_size}"
    return train


for _samples, _size in [
    (64, 32),
    (66, 32),
    (33, 32),
    (34, 32),
    (65, 16),
    (31, 10),
    (7, 5),
    (11, 2),
    (3, 1),
    (1, 1),
]:
    case(_batch(_samples, _size))


@case
def varying_batches_from_a_dataset():
    def batches():
        for start, end in [(0, 32), (32, 33), (33, 40), (40, 66)]:
            yield X[start:end], TARGET[start:end]

    data = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec([None, 6]),
            tf.TensorSpec([None, 1]),
        ),
    )
    return fit(dense(), data)


class Batches(keras.utils.PyDataset):
    bounds = ((0, 20), (20, 21), (21, 23), (23, 66))

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, index):
        start, end = self.bounds[index]
        return X[start:end], TARGET[start:end]


@case
def varying_batches_from_a_pydataset():
    return fit(dense(), Batches())


def generate(*bounds):
    for start, end in bounds:
        yield X[start:end].copy(), TARGET[start:end].copy()


@case
def generator():
    bounds = [(start, start + 11) for start in range(0, 66, 11)]
    return fit(dense(), generate(*bounds), epochs=1)


@case
def generator_with_steps_per_epoch():
    bounds = [(start, start + 6) for start in range(0, 60, 6)]
    return fit(dense(), generate(*bounds), epochs=2, steps_per_epoch=4)


@case
def generator_of_varying_batches_with_validation():
    model, history = fit(
        dense(),
        generate((0, 20), (20, 21), (21, 50), (50, 66)),
        epochs=1,
        metrics=["mae"],
        validation_data=generate((0, 3), (3, 33)),
    )
    loss, mae = model.evaluate(generate((5, 9), (9, 50)), verbose=0)
    return model, {**history, "later_loss": [loss], "later_mae": [mae]}


@case
def batches_of_unknown_size():
    data = tf.data.Dataset.from_tensor_slices((X, TARGET)).batch(13)
    return fit(dense(), data)


@case
def shuffled():
    return fit(dense(), X[:50], TARGET[:50], shuffle=True, batch_size=16)


@case
def validation_on_uneven_batches():
    return fit(
        dense(),
        metrics=["mae"],
        batch_size=10,
        validation_data=(X[:33], TARGET[:33]),
    )


@case
def validation_split():
    return fit(dense(), metrics=["mae"], batch_size=9, validation_split=0.3)


# Losses -------------------------------------------------------------------


@case
def sample_weight():
    return fit(dense(), sample_weight=WEIGHTS, batch_size=13)


@case
def class_weight():
    model = dense(keras.layers.Dense(2))
    model = keras.Sequential([*model.layers[:-1], keras.layers.Dense(2)])
    return fit(
        model,
        y=Y,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        class_weight={0: 1.0, 1: 3.0},
        batch_size=13,
    )


@case
def loss_summed_over_samples():
    return fit(
        dense(),
        loss=keras.losses.MeanSquaredError(reduction="sum"),
        optimizer=keras.optimizers.SGD(0.001),
        batch_size=13,
    )


@case
def loss_mean():
    return fit(
        dense(),
        loss=keras.losses.MeanSquaredError(reduction="mean"),
        batch_size=13,
    )


@case
def mean_with_sample_weight():
    return fit(
        dense(),
        loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        sample_weight=WEIGHTS,
        batch_size=13,
    )


@case
def mean_with_sample_weight_on_even_batches():
    return fit(
        dense(),
        loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        x=X[:48],
        y=TARGET[:48],
        sample_weight=WEIGHTS[:48],
        batch_size=24,
    )


@case
def mean_with_sample_weight_without_weights():
    return fit(
        dense(),
        loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        batch_size=13,
    )


@case
def loss_function_of_the_users_own():
    def squared(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)

    return fit(dense(), loss=squared, batch_size=13)


@case
def loss_with_a_dimension_more():
    return fit(
        keras.Sequential(
            [
                keras.Input([5]),
                keras.layers.Embedding(20, 3),
                keras.layers.Dense(1),
            ]
        ),
        TOKENS,
        TOKENS[..., None].astype("float32"),
        batch_size=11,
    )


@case
def two_outputs_with_loss_weights():
    inputs = keras.Input([6])
    hidden = keras.layers.Dense(5, "tanh")(inputs)
    model = keras.Model(
        inputs,
        {
            "a": keras.layers.Dense(1, name="a")(hidden),
            "b": keras.layers.Dense(2, name="b")(hidden),
        },
    )
    return fit(
        model,
        y={"a": TARGET, "b": Y},
        loss={
            "a": "mse",
            "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        },
        metrics={"a": ["mae"], "b": ["accuracy"]},
        compile_args={"loss_weights": {"a": 0.3, "b": 2.0}},
        batch_size=13,
    )


@case
def regularizers():
    return fit(
        dense(keras.layers.Dense(4, kernel_regularizer="l2")), batch_size=13
    )


class Penalty(keras.layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


@case
def added_loss():
    return fit(dense(Penalty()), batch_size=13)


@case
def activity_regularizer():
    return fit(
        dense(keras.layers.ActivityRegularization(l2=0.01)),
        X[:48],
        TARGET[:48],
        batch_size=12,
    )


# Reduction before what looks at gradients ---------------------------------


@case
def clipnorm():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(0.3, clipnorm=0.05),
        batch_size=13,
    )


@case
def global_clipnorm():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(0.3, global_clipnorm=0.05),
        batch_size=13,
    )


@case
def clipvalue():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(0.3, clipvalue=0.02),
        batch_size=13,
    )


@case
def clipnorm_with_embedding():
    model = keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            keras.layers.Embedding(20, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    return fit(
        model,
        TOKENS,
        TARGET[:34],
        optimizer=keras.optimizers.SGD(0.3, clipvalue=0.02),
        batch_size=11,
    )


@case
def gradient_accumulation():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=3),
        batch_size=6,
    )


@case
def gradient_accumulation_with_clipnorm():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(
            0.3, gradient_accumulation_steps=2, clipnorm=0.05
        ),
        batch_size=7,
    )


@case
def gradient_accumulation_with_embedding():
    model = keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            keras.layers.Embedding(20, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    return fit(
        model,
        TOKENS,
        TARGET[:34],
        optimizer=keras.optimizers.SGD(0.3, gradient_accumulation_steps=2),
        batch_size=8,
    )


@case
def gradient_accumulation_in_several_steps_per_execution():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        compile_args={"steps_per_execution": 2},
        batch_size=16,
        x=X[:64],
        y=TARGET[:64],
    )


@case
def ema():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8),
        batch_size=13,
    )


@case
def ema_overwrite_frequency():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(
            0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=2
        ),
        batch_size=13,
    )


@case
def loss_scale():
    return fit(
        dense(),
        optimizer=keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1),
            initial_scale=2.0**10,
            dynamic_growth_steps=3,
        ),
        batch_size=13,
    )


@case
def loss_scale_with_an_overflow_on_the_last_replica():
    x = X.copy()
    x[30] = 3e38  # The second batch's last replica overflows.
    return fit(
        dense(keras.layers.Dense(3)),
        x,
        optimizer=keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, clipnorm=0.1), initial_scale=2.0**10
        ),
        batch_size=16,
    )


@case
def loss_scale_with_accumulation():
    return fit(
        dense(),
        optimizer=keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
            initial_scale=2.0**10,
        ),
        batch_size=13,
    )


@case(tolerance=2e-2)
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense()
    finally:
        keras.config.set_dtype_policy("float32")
    return fit(
        model,
        optimizer=keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.05), initial_scale=2.0**8
        ),
        batch_size=13,
    )


# Optimizers ---------------------------------------------------------------


@case(tolerance=1e-5)
def adamw():
    return fit(dense(), optimizer=keras.optimizers.AdamW(0.01), batch_size=13)


@case(tolerance=1e-5)
def rmsprop_with_momentum():
    return fit(
        dense(),
        optimizer=keras.optimizers.RMSprop(0.01, momentum=0.9),
        batch_size=13,
    )


@case
def learning_rate_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
        batch_size=13,
    )


@case
def constraint():
    return fit(
        dense(keras.layers.Dense(4, kernel_constraint="non_neg")),
        batch_size=13,
    )


# Layers -------------------------------------------------------------------


@case
def convolution():
    model = keras.Sequential(
        [
            keras.Input([8, 8, 3]),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    return fit(model, IMAGES, TARGET[:21], batch_size=10)


@case
def embedding():
    model = keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            keras.layers.Embedding(20, 3),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    return fit(model, TOKENS, TARGET[:34], batch_size=11)


@case
def lstm():
    model = keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            keras.layers.Embedding(20, 3),
            keras.layers.LSTM(4),
            keras.layers.Dense(1),
        ]
    )
    return fit(model, TOKENS, TARGET[:34], batch_size=11)


@case
def synchronized_batch_normalization():
    model = keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.Dense(1),
        ]
    )
    return fit(model, X[:33], TARGET[:33], batch_size=32)


@case
def frozen_layer():
    model = dense(keras.layers.Dense(4, trainable=False))
    return fit(model, batch_size=13)


@case
def gradient_that_does_not_exist():
    inputs = keras.Input([6])
    used = keras.layers.Dense(1)(inputs)
    unused = keras.layers.Dense(1)(inputs)
    model = keras.Model(inputs, used + 0 * keras.ops.stop_gradient(unused))
    return fit(model, batch_size=13)


@case
def lora():
    model = dense()
    model.layers[0].enable_lora(2)
    return fit(model, batch_size=13)


# Inputs -------------------------------------------------------------------


@case
def dict_inputs():
    a, b = keras.Input([3], name="a"), keras.Input([3], name="b")
    joined = keras.layers.Concatenate()([a, b])
    model = keras.Model({"a": a, "b": b}, keras.layers.Dense(1)(joined))
    return fit(model, {"a": X[:, :3], "b": X[:, 3:]}, batch_size=13)


@case
def nested_inputs():
    a, b = keras.Input([3]), keras.Input([3])
    joined = keras.layers.Concatenate()([a, b])
    model = keras.Model([a, b], keras.layers.Dense(1)(joined))
    return fit(model, [X[:, :3], X[:, 3:]], batch_size=13)


@case
def text_inputs():
    words = np.array(["a b", "b c", "c a a", "d", "a d b"] * 7)[:33]
    vectorize = keras.layers.TextVectorization(output_sequence_length=4)
    vectorize.adapt(words)
    model = keras.Sequential(
        [
            keras.Input([], dtype="string"),
            vectorize,
            keras.layers.Embedding(10, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    data = tf.data.Dataset.from_tensor_slices((words, TARGET[:33])).batch(10)
    return fit(model, data)


@case
def ragged_inputs():
    rows = tf.ragged.constant([[1, 2], [3], [4, 5, 6], [7]] * 8 + [[1]])

    class Sum(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embedding = keras.layers.Embedding(10, 3)

        def call(self, x):
            if isinstance(x, tf.RaggedTensor):
                x = x.to_tensor(shape=[None, 3])
            return keras.ops.sum(self.embedding(x), axis=1)

        def compute_output_spec(self, x):
            return keras.KerasTensor([x.shape[0], 3])

    model = keras.Sequential(
        [
            keras.Input([None], ragged=True, dtype="int32"),
            Sum(),
            keras.layers.Dense(1),
        ]
    )
    data = tf.data.Dataset.from_tensor_slices((rows, TARGET[:33])).batch(10)
    return fit(model, data)


@case
def sparse_inputs():
    rows = tf.sparse.from_dense((X[:33] > 0.7).astype("float32"))
    model = keras.Sequential(
        [keras.Input([6], sparse=True), keras.layers.Dense(1)]
    )
    data = tf.data.Dataset.from_tensor_slices((rows, TARGET[:33])).batch(10)
    return fit(model, data)


# Metrics ------------------------------------------------------------------


@case
def classification_metrics():
    model = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(1, "sigmoid")]
    )
    return fit(
        model,
        y=Y[:, None],
        loss="binary_crossentropy",
        metrics=[
            "accuracy",
            keras.metrics.AUC(name="auc"),
            keras.metrics.F1Score(threshold=0.5, name="f1"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.Recall(name="recall"),
        ],
        batch_size=13,
    )


@case
def mean_iou():
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(2)])
    return fit(
        model,
        y=Y,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.MeanIoU(2, sparse_y_pred=False, axis=-1, name="iou"),
        ],
        batch_size=13,
    )


@case(tolerance=1e-5)
def regression_metrics():
    return fit(
        dense(),
        metrics=[
            keras.metrics.R2Score(name="r2"),
            "mae",
            keras.metrics.RootMeanSquaredError(name="rmse"),
        ],
        batch_size=13,
    )


@case
def weighted_metrics():
    return fit(
        dense(),
        compile_args={"weighted_metrics": ["mae"]},
        sample_weight=WEIGHTS,
        batch_size=13,
    )


@case
def metric_per_class():
    model = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(2, "sigmoid")]
    )
    return fit(
        model,
        y=np.stack([Y, 1 - Y], axis=1),
        loss="binary_crossentropy",
        metrics=[keras.metrics.F1Score(average=None, threshold=0.5, name="f1")],
        batch_size=13,
    )


# Ways to run --------------------------------------------------------------


@case
def steps_per_execution():
    return fit(
        dense(),
        metrics=["mae"],
        compile_args={"steps_per_execution": 3},
        batch_size=13,
    )


@case
def steps_per_execution_with_clipping_and_ema():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(
            0.3, clipnorm=0.05, use_ema=True, ema_overwrite_frequency=2
        ),
        compile_args={"steps_per_execution": 2},
        batch_size=13,
    )


@case
def eagerly():
    return fit(
        dense(),
        X[:33],
        TARGET[:33],
        metrics=["mae"],
        compile_args={"run_eagerly": True},
        batch_size=16,
    )


@case
def eagerly_with_clipping_and_accumulation():
    return fit(
        dense(),
        X[:33],
        TARGET[:33],
        optimizer=keras.optimizers.SGD(
            0.3, clipnorm=0.05, gradient_accumulation_steps=2
        ),
        compile_args={"run_eagerly": True},
        batch_size=16,
    )


@case
def train_on_batch():
    model = dense()
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    logs = [
        model.train_on_batch(X[:size], TARGET[:size], return_dict=True)
        for size in (32, 33, 1)
    ]
    return model, {name: [float(log[name]) for log in logs] for name in logs[0]}


@case
def early_stopping():
    return fit(
        dense(),
        batch_size=13,
        epochs=6,
        validation_data=(X[:33], TARGET[:33]),
        callbacks=[
            keras.callbacks.EarlyStopping(
                monitor="val_loss",
                min_delta=1.0,
                patience=1,
                restore_best_weights=True,
            )
        ],
    )


@case
def custom_train_step_that_weighs_itself():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = keras.layers.Dense(1)

        def call(self, x):
            return self.out(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model, _ = fit(
        Model(),
        optimizer=keras.optimizers.SGD(0.1, clipnorm=0.05),
        batch_size=13,
    )
    return model, {}


CASES["custom_train_step_that_weighs_itself"][1]["weigh_samples"] = True


def run(name, replicas):
    function, settings = CASES[name]
    keras.utils.set_random_seed(3)
    if replicas == 1:
        model, history = function()
    else:
        strategy = keras_allreduce.AllReduceStrategy(
            DEVICES[:replicas], weigh_samples=settings.get("weigh_samples")
        )
        with strategy.scope():
            model, history = function()
    return model.get_weights(), history


@functools.cache
def one_device(name):
    return run(name, 1)


def replica_counts():
    four = {
        "33_samples_in_batches_of_32",
        "clipnorm",
        "gradient_accumulation",
        "loss_scale",
        "eagerly",
        "steps_per_execution",
    }
    for name in CASES:
        for replicas in (2, 3, 4) if name in four else (2, 3):
            yield pytest.param(name, replicas, id=f"{name}-{replicas}")


@pytest.mark.parametrize(("name", "replicas"), list(replica_counts()))
def test_replicas_train_as_one_device_does(name, replicas):
    tolerance = CASES[name][1].get("tolerance", 1e-6)
    weights, history = run(name, replicas)
    expected_weights, expected_history = one_device(name)
    for got, expected in zip(weights, expected_weights, strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    assert history.keys() == expected_history.keys()
    for key, values in history.items():
        np.testing.assert_allclose(
            values,
            expected_history[key],
            rtol=10 * tolerance,
            atol=10 * tolerance,
            err_msg=key,
        )
