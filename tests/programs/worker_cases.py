"""What several workers train as one device does, case by case.

Not a test. A case is a function that trains and returns a dict of what has to
be the same; `"weights"` are compared without a relative tolerance. It runs
inside the scope of the strategy of the workers, and in the tests' process
without a strategy. If it returns a function, that runs outside the scope.
"""

import json
import os
import tempfile
from pathlib import Path

import batch_losses
import keras
import numpy as np
import programs
import tensorflow as tf

# Products on GPUs in float32, not in the 11 bits of TF32.
tf.config.experimental.enable_tensor_float_32_execution(False)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(66, 6)).astype("float32")
TARGET = (X @ RNG.normal(size=(6, 1))).astype("float32")
IMAGES = RNG.normal(size=(17, 8, 8, 3)).astype("float32")
TOKENS = RNG.integers(0, 20, (34, 5))
WEIGHTS = RNG.uniform(0.1, 3, 66).astype("float32")

CASES = dict(batch_losses.ON_WORKERS)

# Folder of this run of the tests; conftest.py sets it.
SHARED = Path()


def wire_parts(worker):
    """What a worker sends in the tests of the wire: small and large.

    The last two are too large for an exchange in float32.
    """
    rng = np.random.default_rng(worker)
    return {
        "scalar": np.float32(worker + 0.5),
        "small": np.array([1.0, -2.0, worker], "float32"),
        "counts": np.arange(5) * (worker + 1),
        "halves": np.full([70, 70], 0.5 + worker, "float16"),
        "whole": rng.integers(-8, 8, [271, 273]).astype("float32"),
        "large": rng.normal(size=[267, 301]).astype("float32"),
    }


def case(function):
    CASES[function.__name__] = function
    return function


def run(name, strategy):
    """What a case returns, ready for JSON."""
    keras.utils.set_random_seed(3)
    with strategy.scope():
        found = CASES[name]()
    if callable(found):
        found = found()
    return keras.tree.map_structure(_plain, found)


def on_one_device(name):
    """What a case returns without a strategy.

    The files that compare with it may run in different processes: the first
    one that needs it leaves it for the others.
    """
    path = SHARED / f"{name}.json"
    if not path.exists():
        found = json.dumps(run(name, tf.distribute.get_strategy()))
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(found)
        own.rename(path)
    return json.loads(path.read_text())


def pairs(got, expected):
    """Yields each path in what a case returned, with both numbers there."""
    keras.tree.assert_same_structure(got, expected)
    for (path, value), (_, wanted) in zip(
        keras.tree.flatten_with_path(got),
        keras.tree.flatten_with_path(expected),
        strict=True,
    ):
        yield path, value, wanted


def _plain(value):
    return np.asarray(value).tolist()


def worker_index():
    """Number of this worker; 0 in the process of the tests."""
    if "TF_CONFIG" in os.environ:
        return json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return int(next((os.environ[n] for n in names if n in os.environ), 0))


def is_worker():
    """Whether others train with this process."""
    names = {"TF_CONFIG", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
    return bool(names & set(os.environ))


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
    if not isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        fit_args = {"y": y, "batch_size": batch_size} | fit_args
    fit_args = {"shuffle": False, "verbose": 0} | fit_args
    history = model.fit(x, epochs=epochs, **fit_args).history
    return {"weights": model.get_weights(), "history": history}


# Programs that know nothing of replicas ------------------------------------


def _program(name):
    def train():
        # What a step of its own shows is that of this worker's samples.
        return {"weights": programs.PROGRAMS[name]()["weights"]}

    train.__name__ = name
    return train


for _name in (
    "loss_of_one_value_that_is_a_sum",
    "masked_loss",
    "added_sum",
    "plain_mean",
    "plain_sum",
    "clips_gradients_itself",
    "adversaries",
    "state_that_a_step_keeps",
    "state_that_a_layer_keeps",
    "gradient_by_hand_that_is_a_sum",
    "optimizer_that_scales_the_loss",
):
    case(_program(_name))


# Batches of any size ------------------------------------------------------


@case
def even_batches():
    return fit(dense(), X[:64], TARGET[:64], metrics=["mae"])


@case
def uneven_last_batch():
    return fit(dense(), X[:59], TARGET[:59], metrics=["mae"], batch_size=16)


@case
def last_batch_of_one_sample():
    return fit(dense(), X[:33], TARGET[:33], metrics=["mae"])


@case
def one_sample_in_all():
    return fit(dense(), X[:1], TARGET[:1], metrics=["mae"])


@case
def shuffled():
    return fit(dense(), X[:50], TARGET[:50], shuffle=True, batch_size=16)


@case
def dataset():
    data = tf.data.Dataset.from_tensor_slices((X, TARGET))
    return fit(dense(), data.batch(13).prefetch(1), metrics=["mae"])


@case
def batches_of_varying_size():
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
def pydataset():
    return fit(dense(), Batches())


@case
def worker_that_runs_out_of_batches():
    """The chief has 24 samples, the other worker 16."""
    parts = [np.arange(24), np.arange(24, 40)]
    if is_worker():
        mine = parts[worker_index()]
        data = tf.data.Dataset.from_tensor_slices((X[mine], TARGET[mine]))
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.OFF
        )
        # Where Keras knows the number of batches, it stops there: too early
        # for the other worker. Behind a filter it does not.
        data = data.batch(8).filter(lambda *batch: True)
        return fit(dense(), data.with_options(options))
    # A batch of 8 is one of 4 on each of two replicas.
    steps = [
        np.concatenate([part[start : start + 4] for part in parts])
        for start in range(0, 24, 4)
    ]
    data = tf.data.Dataset.from_generator(
        lambda: ((X[step], TARGET[step]) for step in steps),
        output_signature=(
            tf.TensorSpec([None, 6]),
            tf.TensorSpec([None, 1]),
        ),
    )
    return fit(dense(), data)


# Losses -------------------------------------------------------------------


@case
def sample_weight():
    return fit(
        dense(),
        sample_weight=WEIGHTS,
        batch_size=13,
        compile_args={"weighted_metrics": ["mae"]},
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
def loss_summed_over_samples():
    return fit(
        dense(),
        loss=keras.losses.MeanSquaredError(reduction="sum"),
        optimizer=keras.optimizers.SGD(0.001),
        batch_size=13,
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
def gradient_accumulation():
    return fit(
        dense(),
        optimizer=keras.optimizers.SGD(
            0.3, gradient_accumulation_steps=3, clipnorm=0.05
        ),
        batch_size=11,
    )


@case
def loss_scale_with_an_overflow_on_the_last_worker():
    x = X.copy()
    x[30] = 3e38
    return fit(
        dense(),
        x,
        optimizer=keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, clipnorm=0.1), initial_scale=2.0**10
        ),
        batch_size=16,
    )


@case
def adam_with_ema():
    return fit(
        dense(),
        optimizer=keras.optimizers.Adam(
            0.003, use_ema=True, ema_overwrite_frequency=2
        ),
        batch_size=16,
    )


# Layers -------------------------------------------------------------------


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
    return fit(model, TOKENS[:33], TARGET[:33], batch_size=16)


def _batch_normalization(samples, synchronized=True):
    layer = keras.layers.BatchNormalization(synchronized=synchronized)
    return fit(dense(layer), X[:samples], TARGET[:samples])


@case
def synchronized_batch_normalization():
    return _batch_normalization(37)


@case
def synchronized_batch_normalization_on_a_worker_without_data():
    return _batch_normalization(33)


@case
def batch_normalization():
    """The first layer, so that its statistics are those of the samples."""
    first = keras.layers.BatchNormalization(momentum=0.5)
    frozen = keras.layers.BatchNormalization(trainable=False)
    model = keras.Sequential(
        [keras.Input([6]), first, frozen, keras.layers.Dense(1)]
    )
    trained = fit(model, X[:33], TARGET[:33], validation_data=(X, TARGET))
    return {
        **trained,
        "moving_mean": first.moving_mean,
        "moving_variance": first.moving_variance,
    }


@case
def dropout():
    """A number of each step's mask, as this worker draws it."""
    masks = []

    class Note(keras.layers.Layer):
        def call(self, x):
            number = tf.reduce_sum(x * np.arange(20, dtype="float32") ** 2)
            tf.py_function(lambda n: masks.append(float(n)), [number], [])
            return x

    model = keras.Sequential([keras.layers.Dropout(0.5), Note()])
    model.compile("sgd", "mse")
    ones = np.ones((32, 20), "float32")
    model.fit(ones, ones, batch_size=8, verbose=0)
    return {"masks": masks}


@case
def last_batch_of_one_image():
    model = keras.Sequential(
        [
            keras.Input([8, 8, 3]),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    return fit(model, IMAGES, TARGET[:17], batch_size=16)


@case
def last_batch_of_one_text():
    words = np.array(["a b", "b c", "c a a", "d", "a d b"] * 7)[:33]
    vectorize = keras.layers.TextVectorization(output_sequence_length=4)
    vectorize.set_vocabulary(["a", "b", "c", "d"])
    model = keras.Sequential(
        [
            keras.Input([], dtype="string"),
            vectorize,
            keras.layers.Embedding(10, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    data = tf.data.Dataset.from_tensor_slices((words, TARGET[:33]))
    return fit(model, data.batch(16))


@case
def two_outputs():
    inputs = keras.Input([6])
    hidden = keras.layers.Dense(5, "tanh")(inputs)
    model = keras.Model(
        inputs,
        {
            "a": keras.layers.Dense(1, name="a")(hidden),
            "b": keras.layers.Dense(1, name="b")(hidden),
        },
    )
    return fit(
        model,
        y={"a": TARGET, "b": TARGET > 0},
        loss={"a": "mse", "b": keras.losses.BinaryCrossentropy(True)},
        metrics={"a": ["mae"], "b": [keras.metrics.AUC(from_logits=True)]},
        batch_size=13,
    )


# Ways to run --------------------------------------------------------------


@case
def steps_per_execution():
    return fit(
        dense(),
        metrics=["mae"],
        compile_args={"steps_per_execution": 2},
        batch_size=13,
    )


@case
def compiled_by_xla():
    return fit(
        dense(keras.layers.BatchNormalization(synchronized=True)),
        metrics=["mae"],
        optimizer=keras.optimizers.Adam(0.01, global_clipnorm=0.5),
        compile_args={"jit_compile": True, "steps_per_execution": 2},
        validation_data=(X[:16], TARGET[:16]),
        batch_size=13,
    )


@case
def eagerly():
    return fit(
        dense(),
        X[:33],
        TARGET[:33],
        metrics=["mae"],
        optimizer=keras.optimizers.SGD(0.3, clipnorm=0.05),
        compile_args={"run_eagerly": True},
        batch_size=16,
    )


@case
def validation():
    return fit(
        dense(),
        metrics=["mae"],
        batch_size=16,
        validation_data=(X[:33], TARGET[:33]),
    )


@case
def early_stopping():
    return fit(
        dense(),
        batch_size=32,
        epochs=5,
        validation_data=(X[:33], TARGET[:33]),
        callbacks=[
            keras.callbacks.EarlyStopping(
                min_delta=1.0, patience=1, restore_best_weights=True
            )
        ],
    )


@case
def evaluate():
    model = dense()
    model.compile("sgd", "mse", metrics=["mae"])
    return {
        "logs": [
            model.evaluate(
                X[:samples],
                TARGET[:samples],
                batch_size=16,
                verbose=0,
                return_dict=True,
            )
            for samples in (32, 33)
        ]
    }


@case
def predict():
    model = dense()
    return {
        "predictions": [
            model.predict(X[:samples], batch_size=16, verbose=0)
            for samples in (32, 41, 33)
        ]
    }


@case
def train_on_batch():
    model = dense()
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    for size in (32, 33, 1):
        model.train_on_batch(X[:size], TARGET[:size])
    return {"weights": model.get_weights()}


@case
def several_models_in_turns():
    one, two = dense(), dense(keras.layers.Dense(4))
    return {
        "first": fit(one, epochs=1),
        "second": fit(two, epochs=1),
        "first again": fit(one, epochs=1),
    }


@case
def training_loop_of_ones_own():
    strategy = tf.distribute.get_strategy()
    model = dense()
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    data = tf.data.Dataset.from_tensor_slices((X[:64], TARGET[:64])).batch(16)

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(x) - y)) / 16
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train(batch):
        return strategy.reduce("SUM", strategy.run(step, (batch,)), axis=None)

    batches = strategy.experimental_distribute_dataset(data)
    losses = [train(batch) for batch in batches]
    return {"weights": model.get_weights(), "losses": losses}


# Saving -------------------------------------------------------------------


@case
def checkpoints_of_every_worker():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        fit(
            dense(keras.layers.BatchNormalization(synchronized=True)),
            optimizer=keras.optimizers.Adam(0.003),
            callbacks=[keras.callbacks.ModelCheckpoint(path)],
        )
        model = keras.models.load_model(path)
        history = model.fit(
            X, TARGET, batch_size=32, shuffle=False, verbose=0
        ).history
        return {"weights": model.get_weights(), "history": history}


@case
def saved_by_the_chief_alone():
    model = dense(keras.layers.BatchNormalization(synchronized=True))
    model.compile("sgd", "mse")

    def train_and_save():
        with tempfile.TemporaryDirectory() as folder:
            best, last = Path(folder, "best.keras"), Path(folder, "last.keras")
            is_chief = worker_index() == 0
            checkpoint = keras.callbacks.ModelCheckpoint(
                best, monitor="loss", save_best_only=True
            )
            history = model.fit(
                X,
                TARGET,
                batch_size=32,
                shuffle=False,
                verbose=0,
                callbacks=[checkpoint] if is_chief else None,
            ).history
            weights = model.get_weights()
            if is_chief:
                model.save(last)
                for path in (best, last):
                    saved = keras.models.load_model(path).get_weights()
                    keras.tree.map_structure(
                        np.testing.assert_array_equal, saved, weights
                    )
        return {"weights": weights, "history": history}

    return train_and_save


@case
def restarted_from_a_backup():
    def train(epochs, folder):
        keras.utils.set_random_seed(3)
        return fit(
            dense(),
            optimizer=keras.optimizers.Adam(0.003),
            epochs=epochs,
            callbacks=[
                keras.callbacks.BackupAndRestore(
                    folder, delete_checkpoint=False
                )
            ],
        )

    with tempfile.TemporaryDirectory() as folder:
        train(2, folder)
        return {"weights": train(3, folder)["weights"]}
