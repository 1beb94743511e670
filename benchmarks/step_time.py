"""Step time of `model.fit` under each strategy, interleaved in one run.

    python benchmarks/step_time.py --replicas 2

Every round runs each strategy's `fit` for some steps, verbose=1 with the
output thrown away; a round's time is the mean step after the first few, and
ratios are taken within a round. "no clocks" is this package's cross-device op
inside a stock MirroredStrategy: the same sums, without the clocks, the fit log
and what makes N replicas equal one device. "not weighed" leaves out only what
weighs batches of uneven parts. Before timing, all models of a row are trained
for a step on the same batch from the same weights and must agree.
"""

import argparse
import contextlib
import io
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_allreduce

SKIPPED_STEPS = 5


def mlp() -> tuple[keras.Model, tuple[int, ...]]:
    """5.5 M parameters in 4 large layers."""
    layers = [keras.layers.Dense(1600, "relu") for _ in range(2)]
    layers += [keras.layers.Dense(800, "relu"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input([1000]), *layers]), (1000,)


def deep_narrow() -> tuple[keras.Model, tuple[int, ...]]:
    """61 layers of 64 units: 122 small gradients."""
    layers = [keras.layers.Dense(64, "relu") for _ in range(60)]
    layers += [keras.layers.Dense(10)]
    return keras.Sequential([keras.Input([64]), *layers]), (64,)


def cnn() -> tuple[keras.Model, tuple[int, ...]]:
    """Three convolutions and a dense layer on 32 x 32 images."""
    layers = [
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, "relu"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential([keras.Input([32, 32, 3]), *layers]), (32, 32, 3)


MODELS = {"mlp": mlp, "deep_narrow": deep_narrow, "cnn": cnn}

STRATEGIES: dict[str, Callable[[list[str]], tf.distribute.Strategy]] = {
    "MirroredStrategy": tf.distribute.MirroredStrategy,
    "ReductionToOneDevice": lambda devices: tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    ),
    "no clocks": lambda devices: tf.distribute.MirroredStrategy(
        devices, cross_device_ops=keras_allreduce.BatchAllReduce()
    ),
    "not weighed": lambda devices: keras_allreduce.AllReduceStrategy(
        devices, weigh_samples=False
    ),
    "AllReduceStrategy": keras_allreduce.AllReduceStrategy,
}


class StepTimer(keras.callbacks.Callback):
    """Mean seconds per step, without the first few."""

    def on_train_batch_end(self, batch, logs=None):
        self.steps = batch + 1 - SKIPPED_STEPS
        if self.steps == 0:
            self.start = time.perf_counter()
        elif self.steps > 0:
            self.seconds = (time.perf_counter() - self.start) / self.steps


def build(name: str, devices: list[str], make, batch_size: int):
    strategy = STRATEGIES[name](devices)
    with strategy.scope():
        model, shape = make()
        model.compile(
            keras.optimizers.SGD(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, *shape)).astype("float32")
    y = rng.integers(0, 10, batch_size)
    # As `fit` does with arrays: batches whose size is not known in advance.
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat()
    data = data.batch(batch_size)
    return model, data


def fit_round(model: keras.Model, data, steps: int) -> float:
    timer = StepTimer()
    with contextlib.redirect_stdout(io.StringIO()):
        model.fit(
            data, steps_per_epoch=steps, epochs=1, verbose=1, callbacks=[timer]
        )
    return timer.seconds


def measure(make, devices, batch_size, rounds, steps):
    runs = {name: build(name, devices, make, batch_size) for name in STRATEGIES}
    reference = next(iter(runs.values()))[0].get_weights()
    after = {}
    for name, (model, data) in runs.items():
        model.set_weights(reference)
        model.fit(data, steps_per_epoch=1, verbose=0)
        after[name] = model.get_weights()
    for name, weights in after.items():
        for got, expected in zip(
            weights, after["MirroredStrategy"], strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)
    times = {name: [] for name in runs}
    for round_number in range(-1, rounds):
        for name, (model, data) in runs.items():
            seconds = fit_round(model, data, steps)
            if round_number >= 0:
                times[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    args = parser.parse_args()
    if len(args.models) > 1:
        # A second stock MirroredStrategy of another shape cannot run in one
        # process: its collectives mix with those of the first.
        for model in args.models:
            command = [sys.executable, __file__, "--models", model]
            for option in ("replicas", "batch_size", "rounds", "steps"):
                value = str(getattr(args, option))
                command += [f"--{option.replace('_', '-')}", value]
            subprocess.run(command, check=True)
        return
    devices = keras_allreduce.host_devices(args.replicas)
    print(
        f"tensorflow {tf.__version__}, keras {keras.__version__}, "
        f"{os.cpu_count()} cores ({platform.machine()}), "
        f"{args.replicas} replicas, global batch {args.batch_size}, "
        f"{args.rounds} rounds of {args.steps} steps\n"
    )
    print(
        "| model | strategy | ms/step (p25-p75) | vs MirroredStrategy "
        "| vs ReductionToOneDevice | vs no clocks | vs not weighed |\n"
        "|---|---|---|---|---|---|---|"
    )
    for model in args.models:
        times = measure(
            MODELS[model], devices, args.batch_size, args.rounds, args.steps
        )
        for name, seconds in times.items():
            low, median, high = np.percentile(seconds, [25, 50, 75]) * 1e3
            ratios = [
                f"{np.median(seconds / times[base]):.3f}"
                for base in (
                    "MirroredStrategy",
                    "ReductionToOneDevice",
                    "no clocks",
                    "not weighed",
                )
            ]
            print(
                f"| {model} | {name} | {median:.2f} ({low:.2f}-{high:.2f}) | "
                + " | ".join(ratios)
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
