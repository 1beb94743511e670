"""Which features of Keras train on N replicas as they do on one device.

    python benchmarks/features.py --replicas 2 [--gpus]

Every feature, a program of `tests/programs` or a case of `feature_cases.py`, is
trained on one device, under `tf.distribute.MirroredStrategy` and under
`keras_allreduce.AllReduceStrategy`, from the same seed and on the same global
batches, each time in a process of its own, which may crash. "works" says that
the largest difference to the weights of one device is at most 1e-6, or what
stands behind it, and that History is the same.

All train on batches that 2, 3 and 4 replicas share evenly; where a batch is
uneven, the name of the feature says so.
"""

import argparse
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import command_line
import keras
import numpy as np
import tensorflow as tf

import keras_allreduce

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import feature_cases  # It imports the programs as well.
import programs

STRATEGIES: dict[str, Callable[[list[str]], Any]] = {
    "one device": lambda devices: tf.distribute.get_strategy(),
    "MirroredStrategy": tf.distribute.MirroredStrategy,
    "AllReduceStrategy": keras_allreduce.AllReduceStrategy,
}


# Shared evenly, unlike those of the tests.
programs.SIZE.samples, programs.SIZE.batch = 72, 24


@dataclass(frozen=True)
class Feature:
    """A feature, how to train with it, and how far weights may differ.

    `train` is called in the scope of the strategy; with the function that
    makes the strategy instead if `makes_strategy`.
    """

    name: str
    train: Callable[..., Any]
    tolerance: float = 1e-6
    makes_strategy: bool = False


FEATURES = [
    *(
        Feature(each.feature, each.train, each.tolerance)
        for each in programs.PROGRAMS.values()
        if each.feature
    ),
    *(Feature(*case) for case in feature_cases.CASES.items()),
    *(
        Feature(*case, makes_strategy=True)
        for case in feature_cases.STRATEGY_CASES.items()
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What a training came to; `error` if it did not come to an end."""

    found: Any = None
    warned: bool = False
    error: str = ""


def train(name: str, strategy: str, replicas: int, on_gpus: bool) -> Outcome:
    (chosen,) = (each for each in FEATURES if each.name == name)
    devices = command_line.devices(replicas, on_gpus)
    # Products on GPUs in float32, not in the 11 bits of TF32.
    tf.config.experimental.enable_tensor_float_32_execution(False)

    def make_strategy(those: list[str] = devices) -> Any:
        return STRATEGIES[strategy](those)

    keras.utils.set_random_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if chosen.makes_strategy:
                found = chosen.train(make_strategy)
            else:
                with make_strategy().scope():
                    found = chosen.train()
        except Exception as error:  # noqa: BLE001 - Said in the table.
            return Outcome(error=describe(error))
    texts = [str(each.message) for each in caught]
    warned = any("replica" in t or "weigh_samples" in t for t in texts)
    found = keras.tree.map_structure(np.asarray, found)
    return Outcome(found, warned)


# What tells most in a long message of TensorFlow.
TELLING = re.compile(
    r"Shape mismatch in the collective instance|"
    r"You must feed a value for placeholder|"
    r"AddN must have the same size and shape|"
    r"`merge_call` called while defining a new graph|"
    r"Trying to access (resource \S+|a placeholder)"
)


# Bold type of a terminal.
STYLE = re.compile(r"\x1b\[\d+m")

PACKAGE = pathlib.Path(keras_allreduce.__file__).parent


def describe(error: Exception) -> str:
    name, message = type(error).__name__, STYLE.sub("", str(error))
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if PACKAGE in pathlib.Path(where).parents:
        return f"clear error: {message.split('. ')[0]}"
    if not message:
        return f"bare {name}"
    found = TELLING.search(message)
    telling = found[0] if found else textwrap.shorten(message, 70)
    return f"crashes: {name}: {telling}"


def send_training(sender: Any, log: str, *arguments: Any) -> None:
    """Body of the process; its output goes to the file `log`."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sender.send(train(*arguments))


def run(context, timeout_seconds, *arguments: Any) -> Outcome:
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as log:
        process = context.Process(
            target=send_training, args=(sender, log.name, *arguments)
        )
        process.start()
        sender.close()
        try:
            if not receiver.poll(timeout_seconds):
                return Outcome(error=f"hangs for {timeout_seconds} s")
            return receiver.recv()
        except EOFError:
            process.join()
            end = signal.Signals(-process.exitcode).name
            return Outcome(error=f"crashes: the process ends with {end}")
        finally:
            process.kill()
            process.join()


# The table ----------------------------------------------------------------


def verdict(got: Outcome, expected: Outcome, tolerance: float) -> str:
    if got.error:
        return got.error
    text = difference(got, expected, tolerance)
    return f"{text}, and warns" if got.warned else text


def difference(got: Outcome, expected: Outcome, tolerance: float) -> str:
    if "note" in got.found:
        return f"wrong: {got.found['note']}"
    flat = keras.tree.flatten_with_path(got.found)
    pairs = [
        (path, ours, theirs)
        for (path, ours), theirs in zip(
            flat, keras.tree.flatten(expected.found), strict=True
        )
    ]
    for path, ours, theirs in pairs:
        if path[-1] == "samples" and ours != theirs:
            return f"wrong: {ours} of {theirs} samples trained"
        if ours.shape != theirs.shape:
            return f"wrong: {len(ours)} rows for {len(theirs)} samples"
    logs = {"history", "logs", "later", "samples"}
    gap = max(
        (
            np.abs(ours - theirs).max()
            for path, ours, theirs in pairs
            if not logs & set(path)
        ),
        default=0.0,
    )
    if not np.isfinite(gap):
        return "wrong: NaN weights"
    if gap > tolerance:
        return f"wrong by {gap:.1e}"
    for path, ours, theirs in pairs:
        off = np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1))
        if logs & set(path) and not off <= 10 * tolerance:
            log = next(part for part in path[::-1] if isinstance(part, str))
            return f"weights right, `{log}` in History wrong by {off:.0%}"
    return "works" if tolerance == 1e-6 else f"works ({tolerance:.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--only", default="", help="pattern of feature names")
    parser.add_argument("--timeout-seconds", type=int, default=60)
    parser.add_argument("--gpus", action="store_true")
    parser.add_argument(
        "--processes", type=int, default=2, help="that train at a time"
    )
    args = parser.parse_args()
    # A fork of a process that has imported TensorFlow, and done nothing with
    # it, starts faster than a new one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keras_allreduce"])
    packages = ("keras_allreduce", "tensorflow", "keras")
    print(
        f"{command_line.environment(*packages)}, {args.replicas} replicas\n\n"
        "| feature | MirroredStrategy | AllReduceStrategy |\n|---|---|---|"
    )
    chosen = [each for each in FEATURES if re.search(args.only, each.name)]
    with ThreadPoolExecutor(args.processes) as pool:
        rows = [
            [
                pool.submit(
                    run,
                    context,
                    args.timeout_seconds,
                    each.name,
                    strategy,
                    args.replicas,
                    args.gpus,
                )
                for strategy in STRATEGIES
            ]
            for each in chosen
        ]
        for each, row in zip(chosen, rows, strict=True):
            expected, *others = (future.result() for future in row)
            if expected.error:
                raise RuntimeError(
                    f"Every feature must train on one device. {each.name} "
                    f"{expected.error}"
                )
            cells = [
                verdict(got, expected, each.tolerance).replace("|", "\\|")
                for got in others
            ]
            print(f"| {each.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
