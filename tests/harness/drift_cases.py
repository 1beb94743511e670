"""What one of two workers does alone, case by case, in one pair of workers.

Not a test. A case is a function of the strategy and of the number of this
worker; it returns what the test looks at, or raises on both workers. Workers
that have found out by comparison that they differ can go on.
"""

import contextlib
import functools
import io
import itertools
import os
import random
import tempfile
import traceback
import warnings
from collections import Counter

import keras
import numpy as np
import programs
import tensorflow as tf

from keras_allreduce.compat import runtime

CASES = {}
keras.config.disable_traceback_filtering()


def case(function):
    CASES[function.__name__] = function
    return function


def run(name, strategy):
    """What a case returns or how it fails, ready for JSON."""
    try:
        found = CASES[name](strategy, programs.worker_index())
    except Exception as error:  # noqa: BLE001 - The test shows it.
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    keras.utils.clear_session(free_memory=False)
    return keras.tree.map_structure(lambda v: np.asarray(v).tolist(), found)


def made(strategy, **options):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = programs.dense()
        model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    return model


# Three batches of 22; validation on some of it gets worse and better.
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(66, 6)).astype("float32")
Y = (X @ _RNG.normal(size=(6, 1))).astype("float32")


def fit(model, x=X, y=Y, **options):
    options = {"batch_size": 22, "shuffle": False, "verbose": 0} | options
    return model.fit(x, y, **options)


def said_by(function):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught]


# What differs -------------------------------------------------------------


@case
def learning_rate_on_one(strategy, index):
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01)
    fit(made(strategy), callbacks=[schedule] if index else [])


@case
def weights_in_the_last_step(strategy, index):
    class Set(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if index and batch == 2:
                self.model.layers[-1].bias.assign([1.0])

    fit(made(strategy), callbacks=[Set()])


@case
def statistics_of_a_custom_loop(strategy, index):
    with strategy.scope():
        model = programs.dense(keras.layers.BatchNormalization())
        model.compile("sgd", "mse")
    model.layers[1].moving_mean.assign(np.full([8], float(index)))
    model.evaluate(X, Y, verbose=0)


@case
def arrays_of_its_own(strategy, index):
    mine = X[index::2]
    made(strategy).predict(mine, batch_size=11, verbose=0)


@case
def other_number_of_samples(strategy, index):
    samples = 62 + index
    fit(made(strategy), X[:samples], Y[:samples])


@case
def evaluate_on_the_chief(strategy, index):
    model = made(strategy)
    x, y = X, Y
    if index:
        fit(model)
    else:
        model.evaluate(x, y, batch_size=22, verbose=0)


@case
def validation_on_the_chief(strategy, index):
    data = None if index else (X, Y)
    fit(made(strategy), epochs=2, validation_data=data)


@case
def early_stopping_on_the_chief(strategy, index):
    model = made(strategy)
    stop = keras.callbacks.EarlyStopping("loss", min_delta=99, patience=0)
    fit(model, epochs=5, callbacks=[] if index else [stop])
    # The chief goes on to its next call.
    model.predict(X, verbose=0)


@case
def seed_of_its_own(strategy, index):
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    made(strategy).fit(data.shuffle(66, seed=index).batch(22), verbose=0)


@case
def other_activation(strategy, index):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(8, ["relu", "tanh"][index], name="first"),
                keras.layers.Dense(1),
            ]
        )
        model.compile("sgd", "mse")
    fit(model)


@case
def other_batch_size(strategy, index):
    """As many steps."""
    fit(made(strategy), batch_size=22 + index)


@case
def other_batch_size_of_a_dataset(strategy, index):
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    made(strategy).fit(data.batch(22 + index).prefetch(1), verbose=0)


# What is shared -----------------------------------------------------------


def counting(strategy, samples, batch_size):
    """Each weight ends as minus the number of times its sample was used.

    The loss is a mean over the samples of a batch.
    """
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([], dtype="int32"),
                keras.layers.Embedding(
                    samples, 1, embeddings_initializer="zeros"
                ),
            ]
        )
        model.compile(keras.optimizers.SGD(batch_size), loss=lambda y, p: p)
    return model


def used_by(model):
    return -model.get_weights()[0].ravel()


@case
def shuffle_without_a_seed(strategy, index):
    tf.random.set_seed(None)
    # The last batch has 6 samples.
    model, used = counting(strategy, 46, 8.0), []
    for _ in range(2):
        model.fit(np.arange(46), np.zeros(46), batch_size=8, verbose=0)
        used.append(used_by(model))
    first, second = used[0], used[1] - used[0]
    return {"first": first, "orders differ": bool((first != second).any())}


class Numbers(keras.utils.PyDataset):
    """Batches of 4, each of one number."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return np.full([4], index), np.zeros([4])


@case
def shuffle_of_a_py_dataset(strategy, index):
    random.seed(index)
    tf.random.set_seed(None)
    model = counting(strategy, 12, 1.0)
    model.fit(Numbers(), epochs=3, shuffle=True, verbose=0)
    return used_by(model)


class Samples(keras.utils.PyDataset):
    """48 samples in a fixed order."""

    def __init__(self):
        super().__init__()
        self.order = np.arange(48)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        rows = self.order[8 * index : 8 * index + 8]
        return rows, rows


class Shuffled(Samples):
    """In an order that it draws itself, as many are written."""

    def __init__(self):
        super().__init__()
        self.on_epoch_end()

    def on_epoch_end(self):
        self.order = np.random.permutation(48)


class DrawnOnce(Samples):
    """In one order, drawn before the strategy can see it."""

    def __init__(self):
        super().__init__()
        self.order = np.random.permutation(48)


def fit_counting(strategy, data, epochs):
    """How often each sample is used in each epoch, and the warnings."""
    model, used = counting(strategy, 48, 8.0), [np.zeros(48)]
    count = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: used.append(used_by(model))
    )
    said = said_by(
        lambda: model.fit(data, epochs=epochs, verbose=0, callbacks=[count])
    )
    return {"used": np.diff(used, axis=0), "said": said}


@case
def py_dataset_that_shuffles_itself(strategy, index):
    np.random.set_bit_generator(np.random.MT19937())  # Nobody has seeded it.
    return fit_counting(strategy, Shuffled(), epochs=3)


@case
def py_dataset_of_an_order_of_its_own(strategy, index):
    np.random.set_bit_generator(np.random.MT19937())
    return fit_counting(strategy, DrawnOnce(), epochs=2)


@case
def seeds_of_each_worker(strategy, index):
    np.random.seed(4 + index)
    found = fit_counting(strategy, Samples(), epochs=2)
    expected = np.random.RandomState(4 + index).random_sample()
    return {**found, "kept": bool(np.random.random() == expected)}


@case
def broadcast(strategy, index):
    model = made(strategy)
    model.set_weights([w + index for w in model.get_weights()])
    model.optimizer.learning_rate = 0.01 * (1 + index)
    strategy.broadcast(model)
    fit(model)
    rate = float(model.optimizer.learning_rate)
    return {"rate": rate, "weights": model.get_weights()}


class Logs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append([logs["loss"], logs["mae"]])


@case
def logs_of_steps(strategy, index):
    logs = Logs()
    model = made(strategy, metrics=["mae"])
    fit(model, batch_size=13, epochs=2, callbacks=[logs])
    return logs.losses


@case
def logs_of_accumulating_steps(strategy, index):
    logs = Logs()
    model = made(strategy, metrics=["mae"])
    model.optimizer = None
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
        model.compile(optimizer, "mse", metrics=["mae"])
    fit(model, batch_size=16, epochs=2, callbacks=[logs])
    return logs.losses


@case
def terminate_on_nan(strategy, index):
    logs = Logs()
    model = made(strategy, metrics=["mae"])
    x = X.copy()
    x[30] = np.nan  # In the part of one worker.
    fit(
        model,
        x,
        batch_size=16,
        epochs=3,
        callbacks=[keras.callbacks.TerminateOnNaN(), logs],
    )
    return len(logs.losses)


@case
def train_on_batch(strategy, index):
    model = made(strategy, metrics=["mae"])
    return [model.train_on_batch(X[:33], Y[:33]) for _ in range(2)]


@case
def train_on_own_parts(strategy, index):
    """Of uneven sizes; only the second worker traces its step twice."""
    model, losses = made(strategy), []
    for end in (33, 34):
        part = slice(0, end)
        if strategy.num_replicas_in_sync > 1:
            part = (slice(0, 20), slice(20, end))[index]
        losses.append(model.train_on_batch(X[part], Y[part]))
    weights = [weight.ravel().tolist() for weight in model.get_weights()]
    return [*losses, *itertools.chain(*weights)]


@case
def numbers(strategy, index):
    model = made(strategy)
    fit(model, epochs=2)
    optimizer = model.optimizer
    return [float(optimizer.learning_rate), int(optimizer.iterations)]


@case
def warnings_of_order(strategy, index):
    tf.random.set_seed(None)
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    with strategy.scope():
        model = programs.dense()
        model.compile("sgd", "mse")
    return said_by(lambda: model.fit(data.shuffle(66).batch(22), verbose=0))


@case
def warnings_of_shards(strategy, index):
    model = made(strategy)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shard(2, index)
    off = tf.data.Options()
    off.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    return [
        said_by(functools.partial(model.fit, each, epochs=2, verbose=0))
        for each in (data.batch(22), data.batch(11).with_options(off))
    ]


@case
def warnings_of_generators(strategy, index):
    def batches(first):
        for number in range(first, first + 6):
            rows = slice(number, number + 6)
            yield X[rows], Y[rows]

    def fit_from(first):
        made(strategy).fit(batches(first), steps_per_epoch=3, verbose=0)

    return [said_by(functools.partial(fit_from, n)) for n in (0, index)]


class Marked(keras.layers.Layer):
    """Has a config that each worker fills in its own way."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def get_config(self):
        if isinstance(self.mark, int):
            raise ValueError("no config")
        return {**super().get_config(), "mark": self.mark}

    def call(self, x):
        return x


@case
def what_may_differ(strategy, index):
    """Names, seeds, paths, addresses, callbacks, `verbose`, `jit_compile`."""
    for _ in range(3 * index):
        keras.layers.Dense(1)
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(8, "tanh", name=f"on_host_{index}"),
                Marked(os.path.join(tempfile.gettempdir(), str(index))),
                Marked(repr(object())),
                Marked(index),
                keras.layers.Dropout(0.0, seed=index),
                keras.layers.Lambda(lambda x: x),
                keras.layers.Dense(1),
            ]
        )
        model.compile("sgd", "mse", metrics=["mae"])
    with tempfile.TemporaryDirectory() as folder:
        saves = keras.callbacks.CSVLogger(os.path.join(folder, "log.csv"))
        said = said_by(
            lambda: fit(
                model,
                epochs=2,
                verbose=2 * index,
                callbacks=[] if index else [saves],
            )
        )
    return {"weights": model.get_weights(), "said": said}


class Files(keras.callbacks.Callback):
    """Notes the learning rate, and the files that are there, by epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.seen = folder, []

    def on_epoch_end(self, epoch, logs=None):
        rate = float(self.model.optimizer.learning_rate)
        self.seen.append([rate, sorted(os.listdir(self.folder))])


def decided(model, folder, **options):
    """What callbacks decide on the validation, which gets worse and better."""
    files = Files(folder)
    history = fit(
        model,
        epochs=12,
        callbacks=[
            keras.callbacks.ModelCheckpoint(
                os.path.join(folder, "{epoch}.weights.h5"),
                monitor="val_loss",
                save_best_only=True,
                save_weights_only=True,
            ),
            keras.callbacks.ReduceLROnPlateau(
                "val_mae", factor=0.5, patience=1, min_delta=0.02
            ),
            keras.callbacks.EarlyStopping(
                "val_loss", patience=3, min_delta=0.02
            ),
            files,
        ],
        **options,
    )
    return {"history": history.history, "seen": files.seen}


@case
def decisions_on_validation(strategy, index):
    """Parts of 3 and 2 samples, and a last batch of one."""
    x, y = X[:16], Y[:16] + 0.3
    with tempfile.TemporaryDirectory() as folder:
        return decided(
            made(strategy, metrics=["mae"]),
            folder,
            validation_data=(x, y),
            validation_batch_size=5,
        )


@case
def decisions_on_validation_of_parts(strategy, index):
    """Each worker has its own batches, and one has fewer than the other."""
    first = 4 * index
    data = tf.data.Dataset.from_tensor_slices(
        (X[first : 13 + first], Y[:13] + 0.3)
    ).batch(3 + index)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    with tempfile.TemporaryDirectory() as folder:
        return decided(
            made(strategy, metrics=["mae"]),
            folder,
            validation_data=data.filter(lambda *_: True).with_options(options),
        )


@case
def explained_once(strategy, index):
    said, passed = io.StringIO(), []
    with contextlib.redirect_stdout(said):
        strategy.explain(made(strategy))
    strategy.explain(made(strategy), print_fn=passed.append)
    return [bool(said.getvalue()), len(passed)]


@case
def store_operations(strategy, index):
    """How often this worker publishes or reads, in an epoch of `fit`."""
    counts = Counter()
    stock = {
        name: getattr(runtime, name) for name in ("publish", "read_published")
    }

    def counted(name):
        def call(key, *arguments, **options):
            result = stock[name](key, *arguments, **options)
            if "/progress/" not in key:  # Of another thread.
                counts[name] += 1
            return result

        return call

    model = made(strategy)
    fit(model)
    found = []
    try:
        for name in stock:
            setattr(runtime, name, counted(name))
        for epochs in (1, 5):
            counts.clear()
            fit(model, epochs=epochs)
            found.append(counts.total())
    finally:
        for name, function in stock.items():
            setattr(runtime, name, function)
    once, five = found
    return {"in an epoch": (five - once) / 4, "in a fit": once}


class Shift(keras.callbacks.Callback):
    """Moves a kernel of worker 1 by a part of itself, after two epochs."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1 and programs.worker_index():
            kernel = self.model.layers[0].kernel
            kernel.assign(kernel * (1 + self.part))


@case
def off_by_more_than_rounding(strategy, index):
    fit(made(strategy), epochs=4, callbacks=[Shift(2**-10)])


@case
def off_by_rounding(strategy, index):
    model = made(strategy)
    fit(model, epochs=4, callbacks=[Shift(2**-21)])
    return model.get_weights()
