"""One worker of workers_step_time.py that trains with `model.fit`.

The job says under which strategy: the rival, this package's, or, to see what a
step takes without communication, none. Then the worker trains alone on its
share of the batch; an AllReduceStrategy, which sums within the worker only,
holds several logical CPU devices.
"""

import contextlib
import json
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import command_line
import keras
import models
import tensorflow as tf
from worker_jobs import (
    ALONE,
    ALONE_KEPT,
    ALONE_XLA,
    BATCH_SIZE,
    OPTIONS,
    OURS_XLA,
    STOCK,
    Job,
    Result,
    Stopwatch,
    answer,
    told,
)

import keras_allreduce


class Mended(tf.distribute.MultiWorkerMirroredStrategy):
    """The rival, able to run under Keras 3: see workers_step_time.py."""

    def reduce(self, reduce_op, value, axis):
        if keras.tree.is_nested(value):
            return keras.tree.map_structure(
                lambda leaf: self.experimental_local_results(leaf)[0],
                value,
            )
        if axis == 0 and str(reduce_op).upper() == "MEAN":
            value = tf.convert_to_tensor(
                self.experimental_local_results(value)[0]
            )
            total = self.extended.reduce_to("SUM", value, value)
            return total / self.num_replicas_in_sync
        return super().reduce(reduce_op, value, axis)


def make_strategy(job: Job) -> Any:
    """The strategy of the job; `None`: one device, and no strategy at all."""
    devices = []
    if job.devices > 1:
        devices = keras_allreduce.host_devices(job.devices)
    if job.strategy == STOCK:
        return Mended()
    if job.strategy in OPTIONS:
        return keras_allreduce.MultiWorkerAllReduceStrategy(
            **OPTIONS[job.strategy]
        )
    if job.strategy in (ALONE_KEPT, ALONE_XLA):
        from keras_allreduce import malloc

        malloc.keep_freed()
    elif job.strategy == ALONE:
        # glibc's own default: asked for, it keeps AllReduceStrategy from
        # changing malloc.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7")
    else:
        raise ValueError(f"No such strategy: {job.strategy!r}")
    return keras_allreduce.AllReduceStrategy(devices) if devices else None


def samples(job: Job) -> tf.data.Dataset:
    size = job.local_batch_size if job.alone else BATCH_SIZE
    data = models.batches(models.batch(models.MODELS[job.model], size), size)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return data.with_options(options)


class Timer(keras.callbacks.Callback):
    """Tells a stopwatch about the steps."""

    def __init__(self, stopwatch: Stopwatch):
        super().__init__()
        self.stopwatch = stopwatch

    def on_train_batch_end(self, batch, logs=None):
        self.stopwatch.step_ended()


def work(job: Job) -> None:
    """Runs as one worker; leaves its result and its weights in the folder."""
    strategy = make_strategy(job)
    read_stats = getattr(strategy, "all_reduce_stats", lambda: None)
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = models.compiled(
            models.MODELS[job.model],
            optimizer=job.optimizer,
            jit_compile=job.strategy in (OURS_XLA, ALONE_XLA),
        )
    # Stats are read at the start, so that the next are of the timed steps.
    stopwatch = Stopwatch(job, model.get_weights, on_start=read_stats)
    model.fit(
        samples(job),
        steps_per_epoch=job.all_steps,
        epochs=1,
        verbose=0,
        callbacks=[Timer(stopwatch)],
    )
    stats = None if job.alone else read_stats()
    clocks = (stats.all_reduce_ms, stats.overlap) if stats else ()
    result = Result(stopwatch.ms_per_step, *clocks)
    answer(job, result, stopwatch.weights)


def main() -> None:
    job = told()
    command_line.check_package(job.package)
    task = {"type": "worker", "index": job.index}
    cluster = {"worker": job.addresses}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    work(job)


if __name__ == "__main__":
    main()
