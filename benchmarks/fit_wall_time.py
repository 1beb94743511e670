"""Wall time of fit, evaluate and predict, and what of it is no step.

    python benchmarks/fit_wall_time.py                      (15 minutes)
    python benchmarks/fit_wall_time.py --replicas 2 --data arrays --rounds 1
        --lengths 0.5 --epochs 10 --no-workers              (2 minutes)
    python benchmarks/fit_wall_time.py --gpus --replicas 1 --data arrays
        --rounds 2 --lengths 0.5 --epochs 10

A small CNN trains on 43 batches of 32 samples, with 10 batches to validate on,
under no strategy, two variants of MirroredStrategy and AllReduceStrategy. Each
has a process of its own, and they take turns.

"outside" is the wall time of a `fit` of 5 epochs less its steps, from
`on_train_batch_begin` to `on_train_batch_end`: iterators, validation, metrics
and callbacks. Of `evaluate` and `predict` it is the median call. Ratios and
differences are taken within a round.

Then epochs of several lengths, made with a callback that sleeps: the gap is
from the last batch of an epoch to the first of the next, without validation.
Epochs of 5 seconds or more run at the same time under all strategies, as they
only sleep.

With `--against`, "other checkout" is AllReduceStrategy of another commit.

Last, two workers of one device each on loopback, against one process of two:
the same gap. Not with --gpus, where each of --replicas is a GPU, or a part of
one, and the gaps are those of the first number.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import command_line
import numpy as np
import rivals

from keras_allreduce.launch.job import free_ports

ALONE = "no strategy"
MIRRORED = "MirroredStrategy"
ONE_DEVICE = "MirroredStrategy, ReductionToOneDevice"
OURS = "AllReduceStrategy"
OTHER = "other checkout"
WORKERS = "MultiWorkerAllReduceStrategy"
STRATEGIES = [ALONE, MIRRORED, ONE_DEVICE, OURS]

BATCH_SIZE, BATCHES, VALIDATION_BATCHES = 32, 43, 10
EPOCHS = 5
DATA = ["arrays", "tf.data", "generator", "PyDataset"]
# Epochs of this many seconds sleep enough to run at the same time.
SLEEPS_MOST = 5.0


# In the process of a rival ---------------------------------------------------


def strategy(name: str, replicas: int, on_gpus: bool) -> Any:
    import tensorflow as tf

    import keras_allreduce

    if name == WORKERS:
        return keras_allreduce.MultiWorkerAllReduceStrategy(timeout_seconds=300)
    devices = command_line.devices(1 if name == ALONE else replicas, on_gpus)
    if name == ALONE:
        return tf.distribute.get_strategy()
    if name == MIRRORED:
        return tf.distribute.MirroredStrategy(devices)
    if name == ONE_DEVICE:
        return tf.distribute.MirroredStrategy(
            devices, tf.distribute.ReductionToOneDevice()
        )
    return keras_allreduce.AllReduceStrategy(devices)


def compiled() -> Any:
    import keras

    layers = [
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, "relu"),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential([keras.Input([8, 8, 1]), *layers])
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # On a GPU Keras would, but under no strategy.
    )
    return model


def samples(batches: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    count = BATCH_SIZE * batches
    x = rng.random((count, 8, 8, 1), "float32")
    return x, rng.integers(0, 10, count)


def arguments(kind: str, batches: int) -> dict[str, Any]:
    """What `fit` is called with for one kind of data."""
    import keras
    import tensorflow as tf

    x, y = samples(batches)

    def batch(index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(index * BATCH_SIZE, (index + 1) * BATCH_SIZE)
        return x[part], y[part]

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return batches

        def __getitem__(self, index: int) -> Any:
            return batch(index)

    def endless() -> Iterator[Any]:
        while True:
            yield from map(batch, range(batches))

    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": BATCH_SIZE}
    if kind == "PyDataset":
        return {"x": Batches()}
    if kind == "generator":
        return {"x": endless(), "steps_per_epoch": batches}
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x))
    data = data.batch(BATCH_SIZE).map(
        lambda x, y: (x * 2 - 1, y), num_parallel_calls=tf.data.AUTOTUNE
    )
    return {"x": data.prefetch(tf.data.AUTOTUNE)}


def watch(pause_seconds: float) -> Any:
    """A callback with the seconds of steps, sleeps and gaps of a `fit`."""
    import keras

    class Watch(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.inside = 0.0
            self.gaps: list[float] = []
            self._last = 0.0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            now = time.perf_counter()
            if batch == 0 and self._last:
                self.gaps.append(now - self._last)
            self._begun = now
            time.sleep(pause_seconds)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self._last = time.perf_counter()
            self.inside += self._last - self._begun

    return Watch()


class Trainer:
    """A model under one strategy; its methods are what a rival is asked."""

    def __init__(self, name: str, replicas: int, on_gpus: bool, package: str):
        command_line.check_package(package)
        with strategy(name, replicas, on_gpus).scope():
            self._model = compiled()
        self._held_out = samples(VALIDATION_BATCHES)

    def fit(self, kind: str) -> float:
        """Seconds of a fit with validation that are outside its steps."""
        watched = watch(0.0)
        begun = time.perf_counter()
        self._model.fit(
            **arguments(kind, BATCHES),
            epochs=EPOCHS,
            validation_data=self._held_out,
            validation_batch_size=BATCH_SIZE,
            verbose=0,
            callbacks=[watched],
        )
        return time.perf_counter() - begun - float(watched.inside)

    def evaluate(self) -> float:
        """Milliseconds of the median call."""
        return self._median(self._model.evaluate, *self._held_out)

    def predict(self) -> float:
        """Milliseconds of the median call."""
        return self._median(self._model.predict, self._held_out[0])

    def _median(self, call: Any, *data: np.ndarray) -> float:
        seconds = []
        for _ in range(7):
            begun = time.perf_counter()
            call(*data, batch_size=BATCH_SIZE, verbose=0)
            seconds.append(time.perf_counter() - begun)
        return 1e3 * statistics.median(seconds)

    def gaps(self, seconds: float, epochs: int) -> list[float]:
        """Milliseconds between epochs of a length."""
        watched = watch(seconds / BATCHES)
        self._model.fit(
            **arguments("arrays", BATCHES),
            epochs=epochs + 1,
            verbose=0,
            callbacks=[watched],
        )
        return [1e3 * gap for gap in watched.gaps]


def serve(**options: Any) -> None:
    trainer = Trainer(**options)
    rivals.serve(lambda ask, **request: getattr(trainer, ask)(**request))


# In the process that starts them ---------------------------------------------


def started(
    stack: contextlib.ExitStack,
    name: str,
    replicas: int,
    args: argparse.Namespace,
    **environment: str,
) -> rivals.Rival:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    package = args.against if name == OTHER else command_line.HERE
    options = json.dumps(
        {
            "name": name,
            "replicas": replicas,
            "on_gpus": args.gpus,
            "package": package,
        }
    )
    command = [sys.executable, __file__, "--serve", options]
    environment |= command_line.package_of(package)
    return stack.enter_context(
        rivals.Rival(name, command, Path(folder) / "log", environment)
    )


def at_once(entries: Sequence[rivals.Rival], **request: Any) -> list[Any]:
    with ThreadPoolExecutor(len(entries)) as pool:
        return list(pool.map(lambda each: each.ask(**request), entries))


def print_wall(replicas: int, args: argparse.Namespace) -> None:
    """One table: what is outside the steps, by kind of data."""
    with contextlib.ExitStack() as stack:
        entries = {
            name: started(stack, name, replicas, args)
            for name in args.strategies
        }
        for kind in args.data:
            for entry in entries.values():
                entry.ask(ask="fit", kind=kind)
        rows: dict[str, dict[str, list[float]]] = {}
        for number in range(args.rounds):
            if number and time.monotonic() > args.end:
                break
            for kind in args.data:
                for name, entry in entries.items():
                    rows.setdefault(f"fit, {kind} (s)", {}).setdefault(
                        name, []
                    ).append(entry.ask(ask="fit", kind=kind))
            for ask in ("evaluate", "predict"):
                for name, entry in entries.items():
                    rows.setdefault(f"{ask} (ms)", {}).setdefault(
                        name, []
                    ).append(entry.ask(ask=ask))
    print(f"\n{replicas} replicas\n\n| outside the steps | ", end="")
    print(" | ".join(args.strategies), "| ours to none |")
    print("|---" * (len(args.strategies) + 2) + "|")
    for row, seconds in rows.items():
        pairs = list(zip(seconds[OURS], seconds[ALONE], strict=True))
        if "fit" in row:
            against = f"{statistics.median(a / b for a, b in pairs):.2f} x"
        else:
            against = f"{statistics.median(a - b for a, b in pairs):+.0f} ms"
        cells = [f"{statistics.median(seconds[n]):.3g}" for n in seconds]
        print(f"| {row} | {' | '.join(cells)} | {against} |", flush=True)


def print_gaps(args: argparse.Namespace) -> None:
    """One table: gaps between epochs, by their length."""
    replicas = args.replicas[0] if args.gpus else 2
    print(
        f"\n{replicas} replicas\n\n"
        "| gap between epochs, median / worst (ms) | ",
        end="",
    )
    print(" | ".join(args.strategies), "|")
    print("|---" * (len(args.strategies) + 1) + "|")
    with contextlib.ExitStack() as stack:
        entries = [
            started(stack, name, replicas, args) for name in args.strategies
        ]
        for entry in entries:
            entry.ask(ask="gaps", seconds=0.0, epochs=1)
        for seconds, epochs in zip(args.lengths, args.epochs, strict=True):
            request = {"ask": "gaps", "seconds": seconds, "epochs": epochs}
            if seconds >= SLEEPS_MOST:
                gaps = at_once(entries, **request)
            else:
                gaps = [entry.ask(**request) for entry in entries]
            cells = [
                f"{statistics.median(each):.0f} / {max(each):.0f}"
                for each in gaps
            ]
            print(
                f"| {epochs} epochs of {seconds:g} s | {' | '.join(cells)} |",
                flush=True,
            )


def print_workers(args: argparse.Namespace) -> None:
    """Gaps between epochs, of two workers and of one process."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    with contextlib.ExitStack() as stack:
        together = started(stack, OURS, 2, args)
        two = [
            started(
                stack,
                WORKERS,
                1,
                args,
                **command_line.tf_config(addresses, index),
            )
            for index in range(2)
        ]
        found: dict[str, list[float]] = {"1 x 2": [], "2 x 1": []}
        request = {"ask": "gaps", "seconds": 0.5, "epochs": 8}
        for turn in range(args.rounds + 1):
            one, both = together.ask(**request), at_once(two, **request)[0]
            if turn:
                found["1 x 2"] += one
                found["2 x 1"] += both
    print("\n| workers x devices | gap between epochs, median / worst (ms) |")
    print("|---|---|")
    for name, gaps in found.items():
        print(
            f"| {name} | {statistics.median(gaps):.0f} / {max(gaps):.0f} |",
            flush=True,
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--rounds", type=int, default=3)
    command_line.add_seconds(parser)
    command_line.add_against(parser)
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=STRATEGIES,
        default=STRATEGIES,
        help="with those of one device and of this package",
    )
    parser.add_argument(
        "--lengths", type=float, nargs="*", default=[0.5, 5, 60]
    )
    parser.add_argument("--epochs", type=int, nargs="*", default=[50, 12, 3])
    parser.add_argument(
        "--workers", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument(
        "--gpus", action="store_true", help="instead of logical CPU devices"
    )
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.end = time.monotonic() + args.seconds
    if not {ALONE, OURS} <= set(args.strategies):
        parser.error(f"--strategies must have {ALONE!r} and {OURS!r}.")
    if args.against:
        args.strategies = [*args.strategies, OTHER]
    if len(args.lengths) != len(args.epochs):
        parser.error(
            "--epochs has a number for each of --lengths. Received: "
            f"{args.lengths} and {args.epochs}"
        )
    return args


def main() -> None:
    args = parsed()
    if args.serve:
        serve(**args.serve)
        return
    # So that the rivals go too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(
        f"{command_line.environment('tensorflow', 'keras')}"
        f"{command_line.commits(args.against)}",
        flush=True,
    )
    for replicas in args.replicas:
        print_wall(replicas, args)
    if args.lengths:
        print_gaps(args)
    if args.workers and not args.gpus:
        print_workers(args)


if __name__ == "__main__":
    main()
