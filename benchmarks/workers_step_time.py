"""Step time of `model.fit` between workers, on loopback or a slow network.

    python benchmarks/workers_step_time.py --link 1gbit

Each round starts the workers of every strategy anew, one strategy after the
other, and times the steps of `fit` after the first few; ratios are taken
within a round. The rival is TensorFlow's MultiWorkerMirroredStrategy with a
minimal mend of the two faults that keep it from running under Keras 3 at all:
the shapes of the first batch, and the mean of scalar logs.

A link other than loopback is one of `tests/namespaces.py`: each worker in a
network namespace of its own, with that rate in each direction, and no other
delay. After the steps all workers must have the weights of the rival's.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import namespaces

SKIPPED_STEPS = 10
BATCH_SIZE = 64
DEADLINE_SECONDS = 400

STOCK = "MultiWorkerMirroredStrategy (mended)"
OURS = "MultiWorkerAllReduceStrategy"
ATOL = {STOCK: 1e-4, OURS: 1e-4, f"{OURS} bfloat16": 2e-2}

MODELS = ["mlp", "deep_narrow", "cnn", "wide"]
LINKS = ["loopback", "1gbit", "10gbit"]


@dataclass(frozen=True)
class Job:
    """What one worker does. It travels to its process as JSON."""

    strategy: str
    model: str
    devices: int
    steps: int
    folder: str


@dataclass(frozen=True)
class Result:
    """What a job came to, on the chief.

    `all_reduce_ms` and `overlap` are `nan` for a strategy that has no clocks.
    """

    ms_per_step: float
    all_reduce_ms: float
    overlap: float


# In the processes of the workers -------------------------------------------


def strategies() -> dict[str, Callable]:
    import keras
    import tensorflow as tf

    import keras_allreduce

    class Mended(tf.distribute.MultiWorkerMirroredStrategy):
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

    ours = keras_allreduce.MultiWorkerAllReduceStrategy
    return {
        STOCK: Mended,
        OURS: ours,
        f"{OURS} bfloat16": functools.partial(ours, wire_dtype="bfloat16"),
    }


def make_model(name: str):
    """A model and the shape of its samples."""
    import models

    setup = models.MODELS[name]
    return setup.make(), setup.shape


def samples(shape: tuple[int, ...]):
    import tensorflow as tf

    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH_SIZE, *shape)).astype("float32")
    y = rng.integers(0, 10, BATCH_SIZE)
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat()
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return data.batch(BATCH_SIZE).with_options(options)


def work(job: Job) -> None:
    """Runs as one worker; leaves its result and its weights in the folder."""
    import keras

    import keras_allreduce

    if job.devices > 1:
        keras_allreduce.host_devices(job.devices)
    strategy = strategies()[job.strategy]()
    read_stats = getattr(strategy, "all_reduce_stats", lambda: None)

    class Timer(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch + 1 == SKIPPED_STEPS:
                read_stats()  # The next ones are over the timed steps alone.
                self.start = time.perf_counter()
            self.end = time.perf_counter()

    keras.utils.set_random_seed(1)
    with strategy.scope():
        model, shape = make_model(job.model)
        model.compile(
            keras.optimizers.SGD(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    timer = Timer()
    model.fit(
        samples(shape),
        steps_per_epoch=job.steps,
        epochs=1,
        verbose=0,
        callbacks=[timer],
    )
    stats = read_stats()
    seconds = timer.end - timer.start
    index = strategy.cluster_resolver.task_id
    np.savez(Path(job.folder, f"weights-{index}.npz"), *model.get_weights())
    result = Result(
        seconds / (job.steps - SKIPPED_STEPS) * 1e3,
        stats.all_reduce_ms if stats else float("nan"),
        stats.overlap if stats else float("nan"),
    )
    Path(job.folder, f"result-{index}").write_text(json.dumps(asdict(result)))


# In the process that starts them --------------------------------------------


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(job: Job, index: int, addresses: list[str], network):
    """Starts a worker, whose stderr goes to a file."""
    command = [sys.executable, __file__, "--work", json.dumps(asdict(job))]
    task = {"type": "worker", "index": index}
    config = {"cluster": {"worker": addresses}, "task": task}
    with open(Path(job.folder, f"stderr-{index}"), "wb") as stderr:
        return subprocess.Popen(
            network.command(index, command) if network else command,
            env={
                **os.environ,
                "TF_CONFIG": json.dumps(config),
                "CUDA_VISIBLE_DEVICES": "-1",
            },
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def wait(processes: list[subprocess.Popen]) -> list[int | None]:
    """Exit codes when all have ended, the first has failed, or time is up."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            break
        time.sleep(0.05)
    return codes


def run(job: Job, num_workers: int, network) -> tuple[Result, list]:
    """The result of the chief and the weights of every worker.

    Raises:
        SystemExit: If a worker fails or is too slow, with what it said last.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(num_workers)]
    if network:
        addresses = [f"{host}:12345" for host in network.addresses]
    processes = []
    try:
        for index in range(num_workers):
            processes.append(start(job, index, addresses, network))
        codes = wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(code != 0 for code in codes):
        said = [
            f"--- worker {index}, exit code {code}\n"
            + Path(job.folder, f"stderr-{index}").read_text()[-3000:]
            for index, code in enumerate(codes)
        ]
        raise SystemExit(
            "\n".join(said) + f"\n{job.strategy} failed on {job.model}. "
            "Exit code None: it had not ended when the others were stopped."
        )
    result = json.loads(Path(job.folder, "result-0").read_text())
    weights = []
    for index in range(num_workers):
        with np.load(Path(job.folder, f"weights-{index}.npz")) as file:
            weights.append([file[name] for name in file.files])
    return Result(**result), weights


def check_agree(job: Job, weights: list, expected: list) -> float:
    """The largest difference of any worker's weights from the expected.

    Raises:
        SystemExit: If it is too large.
    """
    largest = max(
        float(np.abs(one - other).max())
        for worker in weights
        for one, other in zip(worker, expected, strict=True)
    )
    if not largest <= ATOL[job.strategy]:
        raise SystemExit(
            f"{job.strategy} trains {job.model} to other weights than {STOCK}: "
            f"they differ by up to {largest:.1e}, "
            f"at most {ATOL[job.strategy]:.0e} is expected."
        )
    return largest


def measure(model: str, args: argparse.Namespace, network):
    """Results and largest difference of weights by strategy."""
    results = {name: [] for name in args.strategies}
    differences = dict.fromkeys(args.strategies, 0.0)
    for number in range(args.rounds):
        weights = {}
        # Every other round goes backwards, against a drift within rounds.
        for name in args.strategies[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                job = Job(name, model, args.devices, args.steps, folder)
                result, weights[name] = run(job, args.workers, network)
            results[name].append(result)
        for name in args.strategies:
            job = Job(name, model, args.devices, args.steps, "")
            largest = check_agree(job, weights[name], weights[STOCK][0])
            differences[name] = max(differences[name], largest)
    return results, differences


def row(model: str, name: str, results: dict[str, list[Result]]) -> str:
    ms = np.array([result.ms_per_step for result in results[name]])
    stock = np.array([result.ms_per_step for result in results[STOCK]])
    low, median, high = np.percentile(ms, [25, 50, 75])
    all_reduce_ms = np.median([one.all_reduce_ms for one in results[name]])
    overlap = np.median([one.overlap for one in results[name]])
    return (
        f"| {model} | {name} | {median:.1f} ({low:.1f}-{high:.1f}) "
        f"| {np.median(ms / stock):.2f} | "
        + ("| |" if name == STOCK else f"{all_reduce_ms:.1f} | {overlap:.2f} |")
    )


def environment(args: argparse.Namespace) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("tensorflow", "keras")
    )
    return (
        f"{versions}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores ({platform.machine()}), link {args.link}, "
        f"{args.workers} workers of {args.devices} host devices, "
        f"global batch {BATCH_SIZE}, {args.rounds} rounds of "
        f"{args.steps - SKIPPED_STEPS} timed steps"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--link", choices=LINKS, default="loopback")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=SKIPPED_STEPS + 60)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--strategies", nargs="+", choices=list(ATOL), default=list(ATOL)
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= SKIPPED_STEPS:
        parser.error(
            f"--steps must be more than the {SKIPPED_STEPS} that are not "
            f"timed. Received: {args.steps}"
        )
    # The others are compared with it.
    args.strategies = list(dict.fromkeys([STOCK, *args.strategies]))
    return args


def main() -> None:
    args = arguments()
    if args.work:
        work(Job(**json.loads(args.work)))
        return
    # So that the workers and the network go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))
    with contextlib.ExitStack() as stack:
        network = None
        if args.link != "loopback":
            if namespaces.missing():
                raise SystemExit(f"No link {args.link}: {namespaces.missing()}")
            network = stack.enter_context(
                namespaces.network(args.workers, rate=args.link)
            )
        print(f"{environment(args)}\n", flush=True)
        print(
            "| model | strategy | ms/step (p25-p75) | ratio | all_reduce_ms "
            "| overlap |\n|---|---|---|---|---|---|",
            flush=True,
        )
        differences = {}
        for model in args.models:
            results, largest = measure(model, args, network)
            for name in args.strategies:
                differences[name] = max(
                    differences.get(name, 0.0), largest[name]
                )
                print(row(model, name, results), flush=True)
        print("\nLargest difference of a weight from the rival's:")
        for name, largest in differences.items():
            print(f"- {name}: {largest:.1e}")


if __name__ == "__main__":
    main()
