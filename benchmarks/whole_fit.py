"""Whole steps of `model.fit` under each strategy, interleaved in one run.

    python benchmarks/whole_fit.py --replicas 1 2 4
    python benchmarks/whole_fit.py --gpus --replicas 1

Each strategy trains each model in a process of its own, and the processes
take turns: every round gives each of them one call of `fit`, verbose=1 with
the output thrown away. A turn's time is the mean step after the first few;
"CPU ms" is what all cores together have worked for it. Ratios are taken within
a round, and below 1 is faster. The transformer counts tokens, the others
samples. The optimizer is Adam, or what `--optimizer` says.

"no strategy" trains the same global batch on one device that has all cores.
No model is compiled with XLA, which Keras would use on a GPU under no strategy,
but with `--jit`: then "no strategy" and AllReduceStrategy (on GPUs also
MirroredStrategy, where that runs) train once more with `jit_compile=True`.
On GPUs all are trained in mixed_bfloat16, and batches are made in advance.
"best stock" is the variant of MirroredStrategy that was fastest for that
model in that run. "no clocks" is AllReduceStrategy without clocks and fit
output, for what those cost. With `--against`, "other checkout" is
AllReduceStrategy of another commit. A strategy that fails has the first line
of its error in the table.

"JAX DataParallel" is Keras on JAX (`pip install jax`) with
`keras.distribution.DataParallel` over as many CPU devices, compiled as Keras
compiles there. On torch Keras has `DataParallel` between processes only.

Before that, all start from the same weights and train one step on the same
batch; its time, from the call of `fit`, is the first step, with tracing. The
weights must then agree with those of "no strategy": each to rounding, or with
Adam and in mixed_bfloat16 the update as a whole, as there rounding can be all
there is to the update of a tensor. Where a model has BatchNormalization, whose
statistics are those of each replica's own part, they must agree with those of
MirroredStrategy. The peak is the most memory that the process had in use, with
TensorFlow itself; on GPUs, the most that a replica had of its GPU.
"""

import argparse
import contextlib
import faulthandler
import importlib.util
import io
import json
import os
import resource
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import command_line
import numpy as np
import rivals

SKIPPED_STEPS = 5
DEADLINE_SECONDS = 600

ALONE = "no strategy"
MIRRORED = "MirroredStrategy"
STOCK = [
    MIRRORED,
    "ReductionToOneDevice",
    "HierarchicalCopyAllReduce",
    "NcclAllReduce",
]
OURS, OURS_NO_CLOCKS = "AllReduceStrategy", "no clocks"
OTHER = "other checkout"
JAX = "JAX DataParallel"
# Ends the name of a strategy under which the model is compiled with XLA.
XLA = " XLA"
STRATEGIES = [
    ALONE,
    *STOCK,
    OURS_NO_CLOCKS,
    OURS,
    "AllReduceStrategy nccl",
    JAX,
]
NEED_GPUS = ["NcclAllReduce", "AllReduceStrategy nccl"]


@dataclass(frozen=True)
class Size:
    """What fits a model: a turn of some seconds on two cores or a GPU."""

    batch: int
    steps: int


MODELS = {
    "mlp": Size(64, 45),
    "deep_narrow": Size(64, 45),
    "cnn": Size(64, 45),
    "resnet50": Size(32, 15),
    "transformer": Size(16, 15),
    "embedding": Size(256, 45),
}
GPU_MODELS = {
    "resnet50_photos": Size(128, 35),
    "transformer_base": Size(32, 35),
}
GPU_POLICY = "mixed_bfloat16"

# Of the data, for all steps of a run.
ENOUGH_REPEATS = 1_000_000

# How far weights may be apart: a part of the largest update of the tensor, and
# what rounding comes to where the update is tiny.
TOLERANCE = 1e-2
ATOL = 2e-8
# Of the norm of the update of all tensors, in mixed_bfloat16 and with Adam.
TOLERANCE_OF_ALL = 0.2


# In the process of a rival ---------------------------------------------------


def strategies() -> dict[str, Callable[[list[str]], Any]]:
    import tensorflow as tf

    import keras_allreduce

    def mirrored(cross_device_ops: Callable[[], Any]):
        return lambda devices: tf.distribute.MirroredStrategy(
            devices, cross_device_ops=cross_device_ops()
        )

    def sharded_by_jax(_devices: list[str]):
        import keras

        distribution = keras.distribution.DataParallel()
        keras.distribution.set_distribution(distribution)
        return distribution

    def without_clocks(devices: list[str]):
        strategy = keras_allreduce.AllReduceStrategy(devices, fit_log=False)
        # Clocks are made for the steps that are noted here.
        strategy.step_log.add = lambda *step: None
        return strategy

    return {
        ALONE: lambda devices: tf.distribute.get_strategy(),
        MIRRORED: tf.distribute.MirroredStrategy,
        "ReductionToOneDevice": mirrored(tf.distribute.ReductionToOneDevice),
        "HierarchicalCopyAllReduce": mirrored(
            tf.distribute.HierarchicalCopyAllReduce
        ),
        "NcclAllReduce": mirrored(tf.distribute.NcclAllReduce),
        "AllReduceStrategy nccl": lambda devices: (
            keras_allreduce.AllReduceStrategy(devices, algorithm="nccl")
        ),
        OURS_NO_CLOCKS: without_clocks,
        OURS: keras_allreduce.AllReduceStrategy,
        OTHER: keras_allreduce.AllReduceStrategy,
        JAX: sharded_by_jax,
    }


class Trainer:
    """One model under one strategy; its methods are what a rival is asked.

    Args:
        strategy: Key of `strategies()`.
        model: Key of `MODELS`.
        replicas: Number of devices, but for "no strategy".
        batch_size: Samples in a global batch.
        on_gpus: Whether the devices are GPUs.
        ends: Whether the data has an end, as arrays have.
        optimizer: Key of `models.OPTIMIZERS`.
        package: Folder that the package must come from.
    """

    def __init__(
        self,
        strategy: str,
        model: str,
        replicas: int,
        batch_size: int,
        on_gpus: bool,
        ends: bool,
        optimizer: str,
        package: str,
    ):
        command_line.check_package(package)
        self._strategy = strategy
        self._model_name = model
        self._replicas = replicas
        self._batch_size = batch_size
        self._on_gpus = on_gpus
        self._optimizer = optimizer
        self._repeats = ENOUGH_REPEATS if ends else None
        self._devices: list[str] = []

    def make(self) -> None:
        """Makes the model and its data."""
        import keras
        import models
        import tensorflow as tf

        if self._on_gpus:
            keras.config.set_dtype_policy(GPU_POLICY)
        if self._strategy.removesuffix(XLA) not in (ALONE, JAX):
            self._devices = command_line.devices(self._replicas, self._on_gpus)
        elif self._on_gpus:
            self._devices = command_line.devices(1, on_gpus=True)
        setup = models.MODELS[self._model_name]
        made = strategies()[self._strategy.removesuffix(XLA)](self._devices)
        with made.scope():
            self._model = models.compiled(
                setup,
                optimizer=self._optimizer,
                jit_compile=self._strategy.endswith((XLA, JAX)),
            )
        x, y = models.batch(setup, self._batch_size)
        self._labels = y.size
        self._data = models.batches((x, y), self._batch_size, self._repeats)
        if self._on_gpus:
            self._data = self._data.prefetch(tf.data.AUTOTUNE)

    def start(self, initial: str, after: str) -> dict[str, Any]:
        """Trains the first step.

        Args:
            initial: File of weights to start from. Made if it is not there.
            after: File to write the weights after the step to.

        Returns:
            Seconds of the step, labels in a batch, and whether it is seen in
            the weights how a batch was split.
        """
        import keras

        if not Path(initial).exists():
            np.savez(initial, *self._model.get_weights())
        at_first = read_weights(initial)
        self._model.set_weights(at_first)
        seconds = self._fit(1)[0][0]
        # MirroredStrategy keeps the statistics of one replica.
        trained = {id(weight) for weight in self._model.trainable_weights}
        weights = [
            now if id(weight) in trained else before
            for weight, now, before in zip(
                self._model.weights,
                self._model.get_weights(),
                at_first,
                strict=True,
            )
        ]
        np.savez(after, *weights)
        is_split_seen = any(
            isinstance(layer, keras.layers.BatchNormalization)
            for layer in self._model.layers
        )
        return {
            "first_step_seconds": seconds,
            "labels_per_step": self._labels,
            "is_split_seen": is_split_seen,
        }

    def fit(self, steps: int) -> list[float]:
        """Mean seconds, and CPU seconds, of a step of `fit`.

        The first few do not count.
        """
        ends = np.array(self._fit(steps)[SKIPPED_STEPS - 1 :])
        return ((ends[-1] - ends[0]) / (len(ends) - 1)).tolist()

    def overlap(self) -> float | None:
        """Share of the all-reduce that was hidden since the last call."""
        strategy = getattr(self._model, "distribute_strategy", None)
        read = getattr(strategy, "all_reduce_stats", None)
        stats = read and read()
        return stats and stats.overlap

    def peak_mib(self) -> float:
        """Most memory of the process so far, or of a replica on its GPU."""
        if self._on_gpus:
            import tensorflow as tf

            memory = tf.config.experimental.get_memory_info
            peaks = [memory(d[1:].upper())["peak"] for d in self._devices]
            return max(peaks) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _fit(self, steps: int) -> list[tuple[float, float]]:
        """Seconds, and CPU seconds, from the start to the end of each step."""
        import keras

        ends = []
        timer = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(
                (time.perf_counter() - start, time.process_time())
            )
        )
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            self._model.fit(
                self._data, steps_per_epoch=steps, verbose=1, callbacks=[timer]
            )
        return ends


def serve(**options: Any) -> None:
    """Answers `{"value": ...}`, or `{"error": ...}` for what is raised."""
    trainer = Trainer(**options)

    def turn(ask: str, **arguments: Any) -> dict[str, Any]:
        faulthandler.dump_traceback_later(DEADLINE_SECONDS, exit=True)
        try:
            return {"value": getattr(trainer, ask)(**arguments)}
        except Exception as error:  # noqa: BLE001 - Raised by who asked.
            return {"error": describe(error)}
        finally:
            faulthandler.cancel_dump_traceback_later()

    rivals.serve(turn)


def describe(error: Exception) -> str:
    """The kind of an error and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [
        line for line in lines if line and line != "Graph execution error:"
    ]
    return f"{type(error).__name__}: {telling[0] if telling else ''}"


def read_weights(file: str | Path) -> list[np.ndarray]:
    with np.load(file) as arrays:
        return [arrays[name] for name in arrays.files]


# In the process that starts them ---------------------------------------------


@dataclass
class Entry:
    """A rival, and what came of it so far.

    `error` is set once it has failed; it gets no more turns.
    """

    rival: rivals.Rival
    after: Path
    started: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    overlap: float | None = None
    peak_mib: float = 0.0
    error: str = ""

    def ask(self, **request: Any) -> Any:
        """What the rival answers, or `None` if it fails."""
        if self.error:
            return None
        try:
            answer = self.rival.ask(**request)
        except SystemExit as end:
            answer = {"error": str(end).splitlines()[-1]}
        self.error = answer.get("error", "")
        return answer.get("value")


def reference(entries: dict[str, Entry]) -> str:
    """Name of the strategy that the others must agree with."""
    names = [name for name in STRATEGIES if name in entries]
    names = [name for name in names if not entries[name].error]
    if names and entries[names[0]].started["is_split_seen"]:
        names = [name for name in names if name != ALONE]
    return names[0] if names else ""


def check_agree(
    entries: dict[str, Entry],
    initial: Path,
    difference_of: Callable[[Path, Path, Path], float],
) -> str:
    """Gives an error to each entry whose first step came out differently.

    Args:
        entries: The rivals, by strategy.
        initial: File of the weights before the step.
        difference_of: `update_difference` or `difference_of_all`.

    Returns:
        A line that tells how well they agree.
    """
    expected_of = reference(entries)
    if not expected_of:
        return "none to compare"
    largest = 0.0
    for name, entry in entries.items():
        seen = entry.started.get("is_split_seen")
        if entry.error or (name.removesuffix(XLA) == ALONE and seen):
            continue
        difference = difference_of(
            entry.after, entries[expected_of].after, initial
        )
        if not difference <= 1:
            entry.error = (
                f"weights unlike those of {expected_of}: {difference:.0f} "
                "times what is tolerated"
            )
        largest = max(largest, difference)
    return f"within {largest:.2f} of what is tolerated from {expected_of}"


def update_difference(got: Path, expected: Path, initial: Path) -> float:
    """Largest difference of a weight, as a multiple of what is tolerated."""
    files = [read_weights(file) for file in (got, expected, initial)]
    differences = []
    for one, other, before in zip(*files, strict=True):
        tolerated = TOLERANCE * np.abs(other - before).max() + ATOL
        differences.append(np.abs(one - other).max() / tolerated)
    return float(np.max(differences))


def difference_of_all(got: Path, expected: Path, initial: Path) -> float:
    """Norm of the difference, as a multiple of what is tolerated."""
    files = [read_weights(file) for file in (got, expected, initial)]
    difference = update = 0.0
    for one, other, before in zip(*files, strict=True):
        difference += float(np.sum(np.square(one - other)))
        update += float(np.sum(np.square(other - before)))
    return float(np.sqrt(difference / update)) / TOLERANCE_OF_ALL


def jax_environment(devices: int) -> dict[str, str]:
    """Variables that let Keras train on JAX and some CPU devices."""
    return {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def why_no_jax(args: argparse.Namespace) -> str:
    """Why Keras on JAX cannot take part; empty: it can."""
    if not importlib.util.find_spec("jax"):
        return "JAX is not installed (pip install jax)"
    return "only CPU devices are compared" if args.gpus else ""


def measure(
    model: str, replicas: int, size: Size, args: argparse.Namespace
) -> tuple[dict[str, Entry], str]:
    """The rivals on one model, by strategy, and how well they agree."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        initial = folder / "initial.npz"
        entries = {}
        hidden = {} if args.gpus else {"CUDA_VISIBLE_DEVICES": "-1"}
        for number, name in enumerate(args.strategies):
            package = args.against if name == OTHER else command_line.HERE
            options = {
                "strategy": name,
                "model": model,
                "replicas": replicas,
                "batch_size": size.batch,
                "on_gpus": args.gpus,
                "ends": args.ends,
                "optimizer": args.optimizer,
                "package": package,
            }
            rival = rivals.Rival(
                name,
                [sys.executable, __file__, "--rival", json.dumps(options)],
                folder / f"stderr-{number}",
                command_line.package_of(package)
                | hidden
                | (jax_environment(replicas) if name == JAX else {}),
            )
            after = folder / f"after-{number}.npz"
            entries[name] = Entry(stack.enter_context(rival), after)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda each: each.ask(ask="make"), entries.values()))
        # One after the other: a first step has the machine to itself.
        for entry in entries.values():
            request = {"initial": str(initial), "after": str(entry.after)}
            entry.started = entry.ask(ask="start", **request) or {}
        agreement = check_agree(
            entries,
            initial,
            difference_of_all
            if args.gpus or args.optimizer == "adam"
            else update_difference,
        )
        for entry in entries.values():
            entry.ask(ask="fit", steps=SKIPPED_STEPS + 1)
            entry.ask(ask="overlap")  # From here on.
        for number in range(args.rounds):
            if number and time.monotonic() > args.end:
                break
            # Every other round goes backwards, against a drift within rounds.
            for name in args.strategies[:: -1 if number % 2 else 1]:
                found = entries[name].ask(ask="fit", steps=size.steps)
                seconds, cpu_seconds = found or (None, None)
                entries[name].seconds.append(seconds)
                entries[name].cpu_seconds.append(cpu_seconds)
        for entry in entries.values():
            entry.overlap = entry.ask(ask="overlap")
            entry.peak_mib = entry.ask(ask="peak_mib")
    return entries, agreement


# The tables ------------------------------------------------------------------


def best_stock(entries: dict[str, Entry]) -> str:
    running = {
        name: np.median(entry.seconds)
        for name, entry in entries.items()
        if name in STOCK and not entry.error
    }
    return min(running, key=running.get, default="")


def ratio(entry: Entry, other: Entry | None) -> str:
    """Median of the ratios within a round."""
    if other is None or other.error:
        return "-"
    return f"{np.median(np.divide(entry.seconds, other.seconds)):.3f}"


def row(model: str, name: str, entries: dict[str, Entry]) -> str:
    entry = entries[name]
    if entry.error:
        error = textwrap.shorten(entry.error.replace("|", "\\|"), 150)
        return f"| {model} | {name} | {error} | | | | | | | |"
    low, median, high = np.percentile(entry.seconds, [25, 50, 75])
    cells = [
        model,
        name,
        f"{median * 1e3:.2f} ({low * 1e3:.2f}-{high * 1e3:.2f})",
        f"{np.median(entry.cpu_seconds) * 1e3:.1f}",
        f"{entry.started['labels_per_step'] / median:.0f}",
        ratio(entry, entries.get(ALONE)),
        ratio(entry, entries.get(MIRRORED)),
        ratio(entry, entries.get(best_stock(entries))),
        f"{entry.started['first_step_seconds']:.1f}",
        f"{entry.peak_mib:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def both(entries: dict[str, Entry], *names: str) -> list[Entry]:
    """The entries of `names`; nothing if one is missing or failed."""
    found = [entries.get(name) for name in names]
    if not all(found) or any(entry.error for entry in found):
        return []
    return found


def ratios(one: Entry, other: Entry) -> str:
    """How long a step takes, and the cores work for it."""
    spread = command_line.spread_of_ratio
    return (
        f"{spread(one.seconds, other.seconds)} of the time and "
        f"{spread(one.cpu_seconds, other.cpu_seconds)} of the CPU time"
    )


def cost_of_clocks(entries: dict[str, Entry]) -> str:
    """What clocks and fit output add to a step, or "" if it is not known."""
    found = both(entries, OURS, OURS_NO_CLOCKS)
    if not found:
        return ""
    percent = np.divide(*(each.seconds for each in found)) * 100 - 100
    low, median, high = np.percentile(percent, [25, 50, 75])
    return f"; clocks cost {median:.1f} % ({low:.1f} to {high:.1f})"


def against(entries: dict[str, Entry]) -> str:
    """How the two checkouts compare, or "" if it is not known."""
    found = both(entries, OURS, OTHER)
    if not found:
        return ""
    first_steps = [each.started["first_step_seconds"] for each in found]
    return (
        f"; {OURS} here takes {ratios(*found)} of the {OTHER}, and "
        f"{np.divide(*first_steps):.2f} of its first step"
    )


def gain_of_xla(entries: dict[str, Entry]) -> str:
    """What XLA does to a step with and without a strategy, if it is known."""
    gains = []
    for name in (ALONE, OURS):
        found = both(entries, name + XLA, name)
        if not found:
            continue
        gain = f"with XLA {name} takes {ratios(*found)} that it takes without"
        if None not in (found[0].overlap, found[1].overlap):
            gain += (
                f", overlap {found[0].overlap:.2f}, not {found[1].overlap:.2f}"
            )
        gains.append(gain)
    return "".join(f"; {gain}" for gain in gains)


def environment(args: argparse.Namespace, sizes: dict[str, Size]) -> str:
    versions = ("tensorflow", "keras", "keras_allreduce")
    each = ", ".join(
        f"{model} {size.batch} and {size.steps - SKIPPED_STEPS}"
        for model, size in sizes.items()
    )
    return (
        f"{command_line.environment(*versions)}"
        f"{command_line.commits(args.against)}, "
        f"{GPU_POLICY if args.gpus else 'float32'}, {args.optimizer}, "
        f"{args.rounds} rounds; "
        f"global batch and timed steps of a round: {each}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=9)
    command_line.add_seconds(parser)
    command_line.add_against(parser)
    parser.add_argument(
        "--steps",
        type=int,
        help=f"per turn, with {SKIPPED_STEPS} that are not timed; default: "
        "as fits the model",
    )
    parser.add_argument(
        "--batch-size", type=int, help="default: as fits the model"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[*MODELS, *GPU_MODELS],
        help="default: those that fit the devices",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=STRATEGIES,
        help="default: all that the devices have",
    )
    parser.add_argument(
        "--gpus", action="store_true", help="instead of logical CPU devices"
    )
    parser.add_argument(
        "--ends",
        action="store_true",
        help="the data has an end, as arrays and files have; default: none",
    )
    parser.add_argument(
        "--jit",
        action="store_true",
        help="also with jit_compile=True, which ends in the name",
    )
    command_line.add_optimizer(parser)
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps is not None:
        command_line.check_steps(parser, args.steps, SKIPPED_STEPS)
    args.end = time.monotonic() + args.seconds
    args.models = args.models or list(GPU_MODELS if args.gpus else MODELS)
    args.strategies = args.strategies or [
        name for name in STRATEGIES if args.gpus or name not in NEED_GPUS
    ]
    if args.jit:
        also = [ALONE, MIRRORED, OURS] if args.gpus else [ALONE, OURS]
        args.strategies += [
            name + XLA for name in also if name in args.strategies
        ]
    if args.against:
        args.strategies = list(dict.fromkeys([*args.strategies, OTHER]))
    return args


def main() -> None:
    args = arguments()
    if args.rival:
        serve(**json.loads(args.rival))
        return
    # So that the rivals go too. `Entry.ask` would take a SystemExit for theirs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    known = MODELS | GPU_MODELS
    sizes = {
        model: Size(
            args.batch_size or known[model].batch,
            args.steps or known[model].steps,
        )
        for model in args.models
    }
    print(environment(args, sizes), flush=True)
    if JAX in args.strategies and why_no_jax(args):
        print(f"\nLeft out: {JAX}, as {why_no_jax(args)}.")
        args.strategies.remove(JAX)
    for replicas in args.replicas:
        print(
            f"\n{replicas} replicas:\n\n"
            "| model | strategy | ms/step (p25-p75) | CPU ms "
            "| samples or tokens/s | vs no strategy | vs MirroredStrategy "
            "| vs best stock "
            "| first step s | peak MiB |"
            f"\n{'|---' * 10}|",
            flush=True,
        )
        agreements = {}
        for model, size in sizes.items():
            entries, agreements[model] = measure(model, replicas, size, args)
            agreements[model] += cost_of_clocks(entries) + against(entries)
            agreements[model] += gain_of_xla(entries)
            for name in args.strategies:
                print(row(model, name, entries), flush=True)
        print("\nWeights after the first step:\n")
        for model, agreement in agreements.items():
            print(f"- {model}: {agreement}", flush=True)


if __name__ == "__main__":
    main()
