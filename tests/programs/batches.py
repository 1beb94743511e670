"""Programs about batches: their size, and where they come from."""

import keras
import numpy as np
import tensorflow as tf

from programs import here
from programs.data import (
    Batches,
    X,
    Y,
    batches,
    dataset,
    dataset_of_batches,
    dense,
    fit,
)
from programs.table import program


@program(on="workers", feature="Even batches", fast=True)
def even_batches():
    return fit(dense(), samples=48, batch_size=24, metrics=["mae"])


@program(
    on="threads",
    feature="Global batch not divisible by the replicas",
    fast=True,
)
def uneven_batches():
    return fit(dense(), samples=26, batch_size=13, metrics=["mae"])


@program(on="devices", feature="Last batch not divisible by the replicas")
def uneven_last_batch():
    return fit(dense(), samples=37, batch_size=24, metrics=["mae"])


@program(
    replicas=(2, 3, 4),
    on="threads workers devices mpi",
    nightly="devices",
    feature="Last batch smaller than the replicas",
    fast=True,
)
def last_batch_of_one_sample():
    return fit(dense(), samples=25, batch_size=24, metrics=["mae"])


@program(
    feature="Last batch smaller than the replicas, `run_eagerly`", fast=True
)
def last_batch_of_one_sample_eagerly():
    return fit(dense(), samples=25, batch_size=24, run_eagerly=True)


@program(on="workers")
def one_sample_in_all():
    return fit(dense(), samples=1, metrics=["mae"])


@program(on="threads", fast=True)
def batches_of_varying_size():
    return fit(dense(), dataset_of_batches(0, 32, 33, 40, 66))


@program(
    on="workers",
    feature="`PyDataset`, batches of 24, 1, 2 and 39",
    nightly="workers",
)
def pydataset():
    return fit(dense(), Batches(0, 24, 25, 27, 66))


def of_generator(*bounds, **arguments):
    model = dense()
    found = fit(model, batches(*bounds), epochs=1, **arguments)
    # Keras reads the last batch of a generator too late for a strategy.
    return found | {"samples": int(model.metrics[0].count.numpy())}


@program(replicas=(), feature="Generator")
def generator():
    return of_generator(0, 24, 48, 72)


@program(fast=True, feature="Generator, batches of 24, 1 and 47")
def generator_of_varying_batches():
    return of_generator(0, 24, 25, 72)


@program
def generator_with_validation():
    model = dense()
    found = fit(
        model,
        batches(0, 20, 21, 50, 66),
        epochs=1,
        metrics=["mae"],
        validation_data=batches(0, 3, 33),
    )
    later = model.evaluate(batches(5, 9, 50), verbose=0, return_dict=True)
    return found | {"later": later}


@program(nightly="replicas")
def generator_with_steps_per_epoch():
    bounds = range(0, 66, 6)
    return fit(dense(), batches(*bounds), steps_per_epoch=4)


@program(on="workers", nightly="workers")
def batches_of_unknown_size():
    return fit(dense(), dataset(X[:27]).prefetch(1), metrics=["mae"])


@program(on="workers", nightly="replicas")
def shuffled():
    return fit(dense(), samples=50, shuffle=True, batch_size=16)


@program(on="workers", nightly="workers")
def validation_on_uneven_batches():
    return fit(
        dense(),
        metrics=["mae"],
        batch_size=10,
        validation_data=(X[:33], Y[:33]),
    )


@program(nightly="replicas")
def validation_split():
    return fit(dense(), metrics=["mae"], batch_size=9, validation_split=0.3)


@program(replicas=(), on="workers")
def worker_that_runs_out_of_batches():
    """The chief has 24 samples, the other worker 16."""
    parts = [np.arange(24), np.arange(24, 40)]
    if here.is_worker():
        mine = parts[here.worker_index()]
        data = tf.data.Dataset.from_tensor_slices((X[mine], Y[mine]))
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
        lambda: ((X[step], Y[step]) for step in steps),
        output_signature=(tf.TensorSpec([None, 6]), tf.TensorSpec([None, 1])),
    )
    return fit(dense(), data)


class Penalty(keras.layers.Layer):
    """Adds the mean of its inputs' squares to the loss."""

    def call(self, x):
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(x)))
        return x


@program(feature="`fit(x)` without targets, uneven batches", nightly="replicas")
def no_targets():
    data = tf.data.Dataset.from_tensor_slices(X[:39]).batch(13)
    return fit(dense(Penalty()), data, loss=None)
