"""What `features.py` trains: one function per feature, and its name.

All train on the same small data, in batches that 2, 3 and 4 replicas share
evenly; where a batch is uneven, the name of the feature says so.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf
from feature_models import (
    BATCH,
    CLASS,
    IMAGES,
    TARGET,
    TOKENS,
    WEIGHTS,
    Adversaries,
    Batches,
    ByHand,
    Clips,
    Counts,
    Keeps,
    Largest,
    Noise,
    Outcome,
    OwnStep,
    Penalty,
    StepIsAFunction,
    SumOfRow,
    X,
    batches,
    dataset,
    dense,
    fit,
    mean_squared,
    mse,
    of_tokens,
    outcome,
    sgd,
    sum_squared,
)


@dataclass(frozen=True)
class Feature:
    """A feature, how to train with it, and how far weights may differ.

    `train` is called in the scope of the strategy; with the function that
    makes the strategy instead if `makes_strategy`.
    """

    name: str
    train: Callable[..., Outcome]
    tolerance: float = 1e-6
    makes_strategy: bool = False


FEATURES: list[Feature] = []


def feature(name: str, tolerance: float = 1e-6, makes_strategy: bool = False):
    def add(train: Callable[..., Outcome]) -> Callable[..., Outcome]:
        FEATURES.append(Feature(name, train, tolerance, makes_strategy))
        return train

    return add


# Batches ------------------------------------------------------------------

feature("Even batches")(lambda: fit(dense()))
feature("Global batch not divisible by the replicas")(
    lambda: fit(dense(), batch_size=13)
)
feature("Last batch not divisible by the replicas")(
    lambda: fit(dense(), X[:37], TARGET[:37])
)
feature("Last batch smaller than the replicas")(
    lambda: fit(dense(), X[:25], TARGET[:25])
)
feature("Last batch smaller than the replicas, `run_eagerly`")(
    lambda: fit(dense(), X[:25], TARGET[:25], run_eagerly=True)
)


@feature("Last batch smaller than the replicas, convolution and max pooling")
def _():
    layers = [
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input([8, 8, 3]), *layers])
    return fit(model, IMAGES, TARGET[:25], sgd(0.01))


feature(
    "Last batch smaller than the replicas, "
    "`BatchNormalization(synchronized=True)`",
)(
    lambda: fit(
        dense(keras.layers.BatchNormalization(synchronized=True)),
        X[:25],
        TARGET[:25],
    )
)
feature("Last batch uneven, `BatchNormalization(synchronized=True)`")(
    lambda: fit(
        dense(keras.layers.BatchNormalization(synchronized=True)),
        X[:37],
        TARGET[:37],
    )
)


def with_batch_normalization(samples: int) -> Outcome:
    result = fit(
        dense(keras.layers.BatchNormalization()), X[:samples], TARGET[:samples]
    )
    finite = all(np.isfinite(weight).all() for weight in result.weights)
    return result if finite else replace(result, note="NaN weights")


feature("`BatchNormalization`, not synchronized")(
    lambda: with_batch_normalization(72)
)
feature("`BatchNormalization`, last batch smaller than the replicas")(
    lambda: with_batch_normalization(25)
)
feature("`PyDataset`, batches of 24, 1, 2 and 39")(
    lambda: fit(dense(), Batches(0, 24, 25, 27, 66))
)


def of_generator(*bounds: int) -> Outcome:
    model = dense()
    result = fit(model, batches(*bounds), epochs=1)
    trained = int(model.metrics[0].count.numpy())
    lost = f"{trained} of 72 samples trained" if trained < 72 else ""
    return replace(result, note=lost)


feature("Generator")(lambda: of_generator(0, 24, 48, 72))
feature("Generator, batches of 24, 1 and 47")(
    lambda: of_generator(0, 24, 25, 72)
)

# Inputs -------------------------------------------------------------------


@feature("String inputs")
def _():
    words = np.array(["a b", "b c", "c a a", "d", "a d b", "c"] * 12)
    vectorize = keras.layers.TextVectorization(output_sequence_length=4)
    vectorize.adapt(words)
    layers = [
        vectorize,
        keras.layers.Embedding(10, 3),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input([], dtype="string"), *layers])
    return fit(model, dataset(words))


@feature("Ragged inputs")
def _():
    inputs = keras.Input([None], ragged=True, dtype="int32")
    model = keras.Sequential([inputs, SumOfRow(), keras.layers.Dense(1)])
    rows = tf.ragged.constant([[1, 2], [3], [4, 5, 6], [7]] * 18)
    # At a higher rate the weights diverge, and with them what is rounded.
    return fit(model, dataset(rows), optimizer=sgd(0.001))


@feature("Sparse inputs")
def _():
    inputs = keras.Input([6], sparse=True)
    model = keras.Sequential([inputs, keras.layers.Dense(1)])
    rows = tf.sparse.from_dense((X > 0.7).astype("float32"))
    return fit(model, dataset(rows))


# Losses and metrics -------------------------------------------------------


feature("`sample_weight`, `weighted_metrics`")(
    lambda: fit(dense(), sample_weight=WEIGHTS, weighted_metrics=["mae"])
)
feature("`class_weight`")(
    lambda: fit(dense(), y=CLASS[:, 0], class_weight={0: 1.0, 1: 3.0})
)
feature('`reduction="sum"`')(
    lambda: fit(dense(), optimizer=sgd(0.001), loss=mse("sum"))
)
feature('`reduction="mean_with_sample_weight"`')(
    lambda: fit(
        dense(), loss=mse("mean_with_sample_weight"), sample_weight=WEIGHTS
    )
)
feature("Loss function, one value for all samples")(
    lambda: fit(dense(), loss=mean_squared)
)
feature("Loss with a mask (`mask_zero`, one output per token)")(
    lambda: fit(
        of_tokens(keras.layers.Embedding(20, 3, mask_zero=True)),
        TOKENS,
        TOKENS[..., None].astype("float32") / 20,
    )
)
feature("Loss function, one value that is a sum")(
    lambda: fit(dense(), optimizer=sgd(0.001), loss=sum_squared)
)


@feature("Losses of two outputs, a mean and a sum")
def _():
    inputs = keras.Input([6])
    outputs = [keras.layers.Dense(1, name=name)(inputs) for name in "ab"]
    return fit(
        keras.Model(inputs, outputs),
        y=[TARGET, TARGET],
        optimizer=sgd(0.001),
        loss=[mse("mean"), mse("sum")],
    )


feature("`Dice`, which compares samples")(
    lambda: fit(dense(keras.layers.Dense(1, "sigmoid")), y=CLASS, loss="dice")
)
feature("Custom `train_step`, with `compute_loss`")(
    lambda: fit(OwnStep(lambda model, x, y, p: model.compute_loss(x, y, p)))
)
feature("Custom `train_step`, with a plain mean")(
    lambda: fit(OwnStep(lambda model, x, y, p: mean_squared(y, p)))
)
feature("Custom `train_step`, with a sum")(
    lambda: fit(
        OwnStep(lambda model, x, y, p: sum_squared(y, p)), optimizer=sgd(0.001)
    )
)
feature("Custom `train_step`, uneven batches")(
    lambda: fit(
        OwnStep(lambda model, x, y, p: mean_squared(y, p)), batch_size=13
    )
)
feature("`train_step` that clips with `tf.clip_by_global_norm`")(
    lambda: fit(Clips(lambda model, x, y, p: mean_squared(y, p)))
)
feature("`train_step` that is a `tf.function`")(
    lambda: fit(
        StepIsAFunction(lambda model, x, y, p: mean_squared(y, p)),
        optimizer=sgd(0.3, clipnorm=0.05),
    )
)
feature("`train_step` that keeps an average of the weights, and counts")(
    lambda: fit(Keeps(lambda model, x, y, p: mean_squared(y, p)))
)
feature("`train_step` that updates weights by hand")(
    lambda: fit(ByHand(lambda model, x, y, p: mean_squared(y, p)))
)
feature("Layer that counts samples, and keeps an average")(
    lambda: fit(dense(Counts()))
)


@feature("Two optimizers in a dict, no `call`, no targets")
def _():
    model = Adversaries()
    model.compile()
    history = model.fit(X, batch_size=BATCH, shuffle=False, verbose=0)
    return outcome(model, history.history)


feature("Regularizers")(
    lambda: fit(dense(keras.layers.Dense(4, kernel_regularizer="l2")))
)
feature("`add_loss` of a mean")(lambda: fit(dense(Penalty())))
feature("`add_loss` of a sum")(lambda: fit(dense(Penalty(keras.ops.sum))))
feature("Metric that is a maximum")(
    lambda: fit(dense(), metrics=[Largest()], batch_size=13)
)
feature("`AUC`, `F1Score`, `MeanIoU`, `R2Score`", tolerance=1e-5)(
    lambda: fit(
        dense(keras.layers.Dense(1, "sigmoid")),
        y=CLASS,
        metrics=[
            keras.metrics.AUC(name="auc"),
            keras.metrics.F1Score(threshold=0.5, name="f1"),
            keras.metrics.BinaryIoU(name="iou"),
            keras.metrics.R2Score(name="r2"),
        ],
    )
)


@feature("`evaluate` and `predict`, last batch smaller than the replicas")
def _():
    model = dense()
    model.compile(sgd(), "mse", metrics=["mae"])
    arguments = {"batch_size": BATCH, "verbose": 0}
    logs = model.evaluate(X[:25], TARGET[:25], return_dict=True, **arguments)
    return Outcome((model.predict(X[:25], **arguments),), logs)


@feature("`predict` of one sample, LSTM")
def _():
    model = of_tokens(keras.layers.Embedding(20, 3), keras.layers.LSTM(4))
    return Outcome((model.predict(TOKENS[:1], verbose=0),))


@feature("`predict_on_batch`, 5 samples")
def _():
    model = dense()
    found = model.predict_on_batch(X[:5])
    rows = "" if len(found) == 5 else f"{len(found)} rows for 5 samples"
    return Outcome((found[:5],), note=rows)


@feature("`fit(x)` without targets, uneven batches")
def _():
    data = tf.data.Dataset.from_tensor_slices(X).batch(13)
    return fit(dense(Penalty()), data, loss=None)


# Gradients and optimizers -------------------------------------------------

for option, limit in [
    ("clipnorm", 0.05),
    ("global_clipnorm", 0.05),
    ("clipvalue", 0.02),
]:
    feature(f"`{option}`")(
        lambda option=option, limit=limit: fit(
            dense(), optimizer=sgd(0.3, **{option: limit})
        )
    )
feature("`gradient_accumulation_steps`")(
    lambda: fit(
        dense(), optimizer=sgd(gradient_accumulation_steps=3), batch_size=12
    )
)
feature("`use_ema`")(lambda: fit(dense(), optimizer=sgd(use_ema=True)))
feature("`ema_overwrite_frequency`")(
    lambda: fit(dense(), optimizer=sgd(use_ema=True, ema_overwrite_frequency=2))
)


def mixed_float16(target: np.ndarray) -> Outcome:
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(
        sgd(0.01), initial_scale=2.0**10
    )
    return fit(dense(), y=target, optimizer=optimizer)


feature("`mixed_float16`", tolerance=1e-3)(lambda: mixed_float16(TARGET))


@feature("`mixed_float16`, overflow on the last replica", tolerance=1e-3)
def _():
    target = TARGET.copy()
    target[47] = 3000.0  # The last sample of the second batch overflows.
    return mixed_float16(target)


feature("`AdamW`", tolerance=1e-5)(
    lambda: fit(dense(), optimizer=keras.optimizers.AdamW(0.01))
)
feature("Learning rate schedule, momentum")(
    lambda: fit(
        dense(),
        optimizer=sgd(
            keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5),
            momentum=0.9,
        ),
    )
)
# Layers -------------------------------------------------------------------

feature("`Embedding`")(
    lambda: fit(
        of_tokens(
            keras.layers.Embedding(20, 3),
            keras.layers.GlobalAveragePooling1D(),
        ),
        TOKENS,
    )
)
feature("`LSTM`, masked")(
    lambda: fit(
        of_tokens(
            keras.layers.Embedding(20, 3, mask_zero=True),
            keras.layers.LSTM(4),
        ),
        TOKENS,
    )
)


@feature("LoRA")
def _():
    model = dense()
    model.layers[0].enable_lora(2)
    return fit(model)


@feature("`keras.random` without a seed")
def _():
    fit(dense(Noise()), optimizer=sgd(0.0))
    return Outcome()


@feature("`Dropout`")
def _():
    # Each sample is 64 ones. The weights start at 0 and their gradient counts
    # the samples, one per replica, whose mask lets an input through.
    samples = len(tf.config.list_logical_devices("CPU"))
    layers = [
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
    ]
    model = keras.Sequential([keras.Input([64]), *layers])
    x = np.ones([samples, 64], "float32")
    model.compile(sgd(1.0), lambda y_true, y_pred: y_pred[:, 0])
    model.fit(x, x[:, :1], batch_size=samples, verbose=0)
    counts = np.unique(np.round(-model.get_weights()[0] / 2 * samples))
    same = set(counts) <= {0.0, samples}
    return Outcome(note="the same mask on every replica" if same else "")


# Ways to run --------------------------------------------------------------

feature("`steps_per_execution`")(
    lambda: fit(dense(), steps_per_execution=2, metrics=["mae"])
)


@feature("`train_on_batch`, 24, 25 and 1 samples")
def _():
    model = dense()
    model.compile(sgd(), "mse", metrics=["mae"])
    logs = [
        model.train_on_batch(X[:size], TARGET[:size], return_dict=True)
        for size in (24, 25, 1)
    ]
    history = {name: [float(log[name]) for log in logs] for name in logs[0]}
    return outcome(model, history)


feature("Validation, `EarlyStopping`")(
    lambda: fit(
        dense(),
        metrics=["mae"],
        epochs=6,
        validation_data=(X[:48], TARGET[:48]),
        callbacks=[
            keras.callbacks.EarlyStopping(
                min_delta=1.0, patience=1, restore_best_weights=True
            )
        ],
    )
)


@feature("`ModelCheckpoint`, `BackupAndRestore`")
def _():
    with tempfile.TemporaryDirectory() as folder:
        for epochs in (1, 3):  # The second fit goes on from the first.
            saved = keras.callbacks.ModelCheckpoint(f"{folder}/model.keras")
            backup = keras.callbacks.BackupAndRestore(
                f"{folder}/backup", delete_checkpoint=False
            )
            result = fit(dense(), epochs=epochs, callbacks=[saved, backup])
        return replace(
            result,
            weights=outcome(keras.saving.load_model(saved.filepath)).weights,
        )


@feature("Save, load, go on training")
def _():
    model = dense()
    fit(model, optimizer=sgd(momentum=0.9))
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        model = keras.saving.load_model(f"{folder}/model.keras")
    history = model.fit(
        X, TARGET, batch_size=BATCH, shuffle=False, verbose=0
    ).history
    return outcome(model, history)


def after_export(model: keras.Model) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        exported = tf.saved_model.load(folder)
        return Outcome((exported.serve(X).numpy(),))


@feature("`export` outside the scope", makes_strategy=True)
def _(make_strategy):
    with make_strategy().scope():
        model = dense()
        fit(model)
    return after_export(model)


@feature("`export` inside the scope")
def _():
    model = dense()
    fit(model)
    return after_export(model)


@feature("A second strategy in one process", makes_strategy=True)
def _(make_strategy):
    with make_strategy().scope():
        first = fit(dense())
    with make_strategy().scope():
        second = fit(dense(keras.layers.Dense(5)))
    return replace(second, weights=first.weights + second.weights)


@feature("Model made in the scope, `fit` outside", makes_strategy=True)
def _(make_strategy):
    with make_strategy().scope():
        model = dense()
        model.compile(sgd(), "mse")
    history = model.fit(X, TARGET, batch_size=BATCH, shuffle=False, verbose=0)
    return outcome(model, history.history)


@feature("Model made outside the scope, `fit` inside", makes_strategy=True)
def _(make_strategy):
    model = dense()
    with make_strategy().scope():
        return fit(model)


@feature("`enable_op_determinism`")
def _():
    tf.config.experimental.enable_op_determinism()
    return fit(dense())


feature("`jit_compile=True` on logical CPU devices")(
    lambda: fit(dense(), jit_compile=True)
)


@feature("A device named twice", makes_strategy=True)
def _(make_strategy):
    with make_strategy(["/cpu:0", "/cpu:0"]).scope():
        return fit(dense())


@feature("A device that is not there", makes_strategy=True)
def _(make_strategy):
    with make_strategy(["/cpu:0", "/cpu:99"]).scope():
        return fit(dense())
