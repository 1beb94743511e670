"""Programs about ways to run a model, to save it, and to go on."""

import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from programs import here
from programs.data import (
    SIZE,
    TOKENS,
    X,
    Y,
    dense,
    fit,
    of_tokens,
    sgd,
    weights_of_all_replicas,
)
from programs.table import program


@program(on="threads", feature="`steps_per_execution`", fast=True)
def steps_per_execution():
    return fit(
        dense(),
        optimizer=sgd(
            0.3, clipnorm=0.05, use_ema=True, ema_overwrite_frequency=2
        ),
        metrics=["mae"],
        steps_per_execution=2,
    )


@program(on="threads workers devices mpi", nightly="devices mpi", fast=True)
def eagerly():
    return fit(
        dense(),
        optimizer=sgd(0.3, clipnorm=0.05, gradient_accumulation_steps=2),
        metrics=["mae"],
        run_eagerly=True,
    )


@program(on="devices", tolerance=1e-5, nightly="replicas")
def compiled_by_xla():
    layer = keras.layers.BatchNormalization(synchronized=True)
    return fit(
        dense(layer),
        optimizer=keras.optimizers.Adam(0.01, global_clipnorm=0.5),
        metrics=["mae"],
        jit_compile=True,
        steps_per_execution=2,
        validation_data=(X[:16], Y[:16]),
    )


@program(
    on="workers",
    logs_of_worker=True,
    fast=True,
    feature="`train_on_batch`, 24, 25 and 1 samples",
    nightly="workers",
)
def train_on_batch():
    model = dense()
    model.compile(sgd(), "mse", metrics=["mae"])
    logs = [
        model.train_on_batch(X[:size], Y[:size], return_dict=True)
        for size in (24, 25, 1)
    ]
    return {"weights": weights_of_all_replicas(model), "logs": logs}


@program(on="workers", feature="Validation, `EarlyStopping`")
def early_stopping():
    stop = keras.callbacks.EarlyStopping(
        min_delta=1.0, patience=1, restore_best_weights=True
    )
    return fit(
        dense(),
        metrics=["mae"],
        epochs=5,
        validation_data=(X[:33], Y[:33]),
        callbacks=[stop],
    )


@program(
    on="devices",
    nightly="devices",
    feature="`evaluate` and `predict`, last batch smaller than the replicas",
)
def evaluate_and_predict():
    model = dense()
    model.compile("sgd", "mse", metrics=["mae"])
    sizes = {"batch_size": 24, "verbose": 0}
    return {
        "logs": [
            model.evaluate(X[:rows], Y[:rows], return_dict=True, **sizes)
            for rows in (25, 48)
        ],
        "predictions": [
            model.predict(X[:rows], **sizes) for rows in (48, 25, 41)
        ],
    }


@program(replicas=(), feature="`predict` of one sample, LSTM")
def predict_of_one_sample():
    model = of_tokens(keras.layers.LSTM(4))
    return {"predictions": model.predict(TOKENS[:1], verbose=0)}


@program(replicas=(), feature="`predict_on_batch`, 5 samples")
def predict_on_batch():
    return {"predictions": dense().predict_on_batch(X[:5])}


@program(on="workers")
def several_models_in_turns():
    one, two = dense(), dense(keras.layers.Dense(4))
    return {
        "first": fit(one, epochs=1),
        "second": fit(two, epochs=1),
        "first again": fit(one, epochs=1),
    }


@program(replicas=(2,), on="workers mpi")
def custom_training_loop():
    strategy = tf.distribute.get_strategy()
    model = dense()
    optimizer = sgd()
    optimizer.build(model.trainable_variables)
    data = tf.data.Dataset.from_tensor_slices((X[:64], Y[:64])).batch(16)

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
    return {"weights": weights_of_all_replicas(model), "losses": losses}


# Saving -----------------------------------------------------------------------


def go_on(model):
    """Trains a compiled model."""
    rows = SIZE.samples
    history = model.fit(
        X[:rows], Y[:rows], batch_size=SIZE.batch, shuffle=False, verbose=0
    ).history
    return {"weights": weights_of_all_replicas(model), "history": history}


@program(
    on="workers",
    tolerance=1e-5,
    feature="Save, load, go on training",
    nightly="workers",
)
def saved_by_every_worker():
    model = dense(keras.layers.BatchNormalization(synchronized=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        checkpoint = keras.callbacks.ModelCheckpoint(path)
        fit(
            model,
            optimizer=keras.optimizers.Adam(0.003),
            callbacks=[checkpoint],
        )
        return go_on(keras.models.load_model(path))


@program(replicas=(), on="workers")
def saved_by_the_chief_alone():
    model = dense(keras.layers.BatchNormalization(synchronized=True))
    model.compile("sgd", "mse")

    def train_and_save():
        with tempfile.TemporaryDirectory() as folder:
            best, last = Path(folder, "best.keras"), Path(folder, "last.keras")
            is_chief = here.worker_index() == 0
            checkpoint = keras.callbacks.ModelCheckpoint(
                best, monitor="loss", save_best_only=True
            )
            history = model.fit(
                X[:66],
                Y[:66],
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


@program(
    on="workers",
    tolerance=1e-5,
    feature="`ModelCheckpoint`, `BackupAndRestore`",
)
def restarted_from_a_backup():
    def train(epochs, folder):
        keras.utils.set_random_seed(3)
        saved = keras.callbacks.ModelCheckpoint(f"{folder}/model.keras")
        backup = keras.callbacks.BackupAndRestore(
            f"{folder}/backup", delete_checkpoint=False
        )
        return fit(
            dense(),
            optimizer=keras.optimizers.Adam(0.003),
            epochs=epochs,
            callbacks=[saved, backup],
        )

    with tempfile.TemporaryDirectory() as folder:
        train(2, folder)
        return {"weights": train(3, folder)["weights"]}
