"""Finds the cause of a slow fit with a timeline.

Trains on batches that are slow to produce, writes a timeline of ten steps and
sums the time that the replicas spend in each activity. Open timeline.json in
https://ui.perfetto.dev to see it.

    python examples/slow_fit.py
    python -m keras_allreduce.launch --workers 2 examples/slow_fit.py

With the second command only the batches of the last worker are slow, and the
other workers wait for it.
"""

import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_allreduce

BATCH_SIZE = 64
SECONDS_PER_BATCH = 0.1


def slow_batches(is_slow: bool) -> tf.data.Dataset:
    """Endless batches; each takes `SECONDS_PER_BATCH` if `is_slow`."""

    def make(number: np.ndarray) -> np.ndarray:
        if is_slow:
            time.sleep(SECONDS_PER_BATCH)
        rng = np.random.default_rng(number)
        return rng.normal(size=[BATCH_SIZE, 128]).astype("float32")

    def batch(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.ensure_shape(
            tf.numpy_function(make, [number], tf.float32), [BATCH_SIZE, 128]
        )
        return x, tf.reduce_sum(x, axis=1, keepdims=True)

    # Without an end: else each step asks whether all workers still have data,
    # and the others would wait for the last one's input there.
    return tf.data.Dataset.range(10**6).map(batch).repeat()


def main() -> None:
    if "TF_CONFIG" in os.environ:
        strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
        workers = json.loads(os.environ["TF_CONFIG"])
        number = workers["task"]["index"]
        is_slow = number == len(workers["cluster"]["worker"]) - 1
    else:
        devices = None
        if len(tf.config.list_physical_devices("GPU")) < 2:
            devices = keras_allreduce.host_devices(2)
        strategy = keras_allreduce.AllReduceStrategy(devices)
        number, is_slow = 0, True

    keras.utils.set_random_seed(1)
    with strategy.scope():
        hidden = [keras.layers.Dense(512, "relu") for _ in range(3)]
        model = keras.Sequential(
            [keras.Input([128]), *hidden, keras.layers.Dense(1)]
        )
        model.compile("adam", "mse")
    if number == 0:
        strategy.explain(model)

    timeline = keras_allreduce.AllReduceTimeline("timeline.json", (20, 30))
    model.fit(
        slow_batches(is_slow),
        steps_per_epoch=40,
        verbose=2,
        callbacks=[timeline],
    )
    if number == 0:
        report("timeline.json")


def report(path: str) -> None:
    """Prints what a replica of the chief did in a step, on average."""
    with open(path, encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    steps = sum(
        event.get("tid") == 0 and event["ph"] == "X"
        for event in events
        if event["pid"] == 0
    )
    times: dict[str, float] = {}
    for event in events:
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (0, 1):
            name = event["name"]
            times[name] = times.get(name, 0) + event["dur"] / 1e3 / steps
    print("replica 0, in a step:")
    for name, ms in sorted(times.items(), key=lambda item: -item[1]):
        print(f"{ms:8.2f} ms  {name}")
    waits = {
        name: ms
        for name, ms in times.items()
        if name not in ("forward and backprop", "update")
    }
    print(f"most of its waiting: {max(waits, key=lambda name: waits[name])}")


if __name__ == "__main__":
    main()
