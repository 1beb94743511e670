"""Which features of Keras train on N replicas as they do on one device.

    python benchmarks/features.py --replicas 2 [--gpus]

Every feature of `feature_cases.py` is trained on one device, under
`tf.distribute.MirroredStrategy` and under `keras_allreduce.AllReduceStrategy`,
from the same seed and on the same global batches, each time in a process of
its own, which may crash. "works" says that the largest difference to the
weights of one device is at most 1e-6, or what stands behind it, and that
History is the same.
"""

import argparse
import multiprocessing
import os
import pathlib
import re
import signal
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import command_line
import keras
import numpy as np
import tensorflow as tf
from feature_cases import FEATURES
from feature_models import Outcome

import keras_allreduce

STRATEGIES: dict[str, Callable[[list[str]], Any]] = {
    "one device": lambda devices: tf.distribute.get_strategy(),
    "MirroredStrategy": tf.distribute.MirroredStrategy,
    "AllReduceStrategy": keras_allreduce.AllReduceStrategy,
}


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
                result = chosen.train(make_strategy)
            else:
                with make_strategy().scope():
                    result = chosen.train()
        except Exception as error:  # noqa: BLE001 - Said in the table.
            return Outcome(error=describe(error))
    texts = [str(each.message) for each in caught]
    warned = any("replica" in t or "weigh_samples" in t for t in texts)
    return replace(result, warned=warned)


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
    if got.note:
        return f"wrong: {got.note}"
    gap = max(
        (
            np.abs(ours - theirs).max()
            for ours, theirs in zip(got.weights, expected.weights, strict=True)
        ),
        default=0.0,
    )
    if not np.isfinite(gap):
        return "wrong: NaN weights"
    if gap > tolerance:
        return f"wrong by {gap:.1e}"
    for name, values in (expected.history or {}).items():
        reported = np.array((got.history or {}).get(name, np.nan))
        off = np.max(np.abs(reported - values) / np.maximum(np.abs(values), 1))
        if not off <= 10 * tolerance:
            return f"weights right, `{name}` in History wrong by {off:.0%}"
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
