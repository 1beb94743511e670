"""The time that the all-reduce adds to a step, beside the stock ops.

    python benchmarks/added_cost.py --replicas 2 4

Added is the time of a step that makes gradients, reduces and uses them, less
that of the same step without reducing:

    variables ──> gradients ──> all-reduce ──> subtract from the variables
              on each replica       or         when all gradients of the
                                  nothing      replica are there

Every strategy goes the same road, of public API alone: `strategy.run` in a
tf.function, and in it the replica context's `all_reduce`. Its process (see
`rivals.py`) has both steps and takes them in turns: with, without, without,
with. The differences are within such a group, a turn's result is the median
of its groups, and ratios are within a round of turns. They are printed as
they come out, also below 0. Before, both steps are checked in every element.

How the C library keeps freed memory is left to each process: only ours sets
it, and both of its steps have it. To give all of them the same, set
MALLOC_TRIM_THRESHOLD_ and the like in the environment (see mallopt(3)).

The floor is what it takes to read every replica's gradients once and write
the sum once, (replicas + 1) x the bytes of the set, at the bandwidth of the
memory: that of numpy.add of two buffers of 64 MiB into a third, all there
before, cut into one part for each core; the best of some goes in each turn.
A sum can cost less: gradients that were just made may still be in a cache.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import command_line
import gradient_sets
import numpy as np
import rivals

STOCK = "MirroredStrategy"
ONE_DEVICE = "ReductionToOneDevice"
HIERARCHICAL = "HierarchicalCopyAllReduce"
OURS = "AllReduceStrategy"
FLOOR = "floor"
NAMES = [STOCK, ONE_DEVICE, HIERARCHICAL, OURS, FLOOR]

WARM_UP_GROUPS = 3
TURN_SECONDS = 1  # At least, so that tiny gradients get more steps.
FLOOR_BYTES = 64 * 2**20
FLOOR_GOES = 10


@dataclass(frozen=True)
class Job:
    """What one rival does. It travels to its process as JSON."""

    rival: str
    replicas: int
    shapes: Sequence[gradient_sets.Shape]


# In the processes of the rivals ---------------------------------------------


def make_strategy(name: str, devices: list[str]):
    import tensorflow as tf

    import keras_allreduce

    if name == OURS:
        return keras_allreduce.AllReduceStrategy(devices)
    if name == STOCK:
        return tf.distribute.MirroredStrategy(devices)
    ops = getattr(tf.distribute, name)()
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=ops)


def replica_variable(shape: gradient_sets.Shape):
    """A variable that each replica has for itself, under a strategy's scope."""
    import tensorflow as tf

    return tf.Variable(
        tf.zeros(shape),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def make_step(strategy, variables, factor, reduces: bool) -> Callable[[], None]:
    """A step whose gradients are `variables * factor`.

    The factor is a variable of each replica: TensorFlow would take one that
    is common to all out of the sum.
    """
    import tensorflow as tf

    def on_replica():
        gradients = [variable * factor for variable in variables]
        totals = gradients
        if reduces:
            context = tf.distribute.get_replica_context()
            totals = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        # Without reducing, too, all gradients are there at once: the memory
        # that the two steps take differs by what the reduction takes.
        with tf.control_dependencies([tf.group(*gradients)]):
            for variable, total in zip(variables, totals, strict=True):
                variable.assign_sub(total)

    return tf.function(lambda: strategy.run(on_replica))


def check(strategy, variables, step, reduces: bool) -> None:
    """Runs `step` once, with a factor of 1, on small integers.

    Raises:
        AssertionError: If a replica's variable is not less by the sum (or by
            its own gradient) in every element.
    """
    count = strategy.num_replicas_in_sync
    before = []
    for number, variable in enumerate(variables):
        size = int(np.prod(variable.shape))
        pattern = (number + np.arange(size, dtype="float32")) % 5 + 1
        before.append(pattern.reshape(variable.shape))
        for replica, part in enumerate(
            strategy.experimental_local_results(variable)
        ):
            part.assign(before[-1] * (replica + 1))
    step()
    for pattern, variable in zip(before, variables, strict=True):
        for replica, part in enumerate(
            strategy.experimental_local_results(variable)
        ):
            own = replica + 1
            total = count * (count + 1) // 2 if reduces else own
            np.testing.assert_array_equal(part, pattern * (own - total))


def serve_strategy(job: Job) -> None:
    import tensorflow as tf

    import keras_allreduce

    devices = keras_allreduce.host_devices(job.replicas)
    strategy = make_strategy(job.rival, devices)
    with strategy.scope():
        factor = replica_variable(())
        variables = [replica_variable(shape) for shape in job.shapes]
    steps = {}
    for reduces in (True, False):
        steps[reduces] = make_step(strategy, variables, factor, reduces)
        factor.assign(1.0)
        check(strategy, variables, steps[reduces], reduces)
    for variable in variables:
        variable.assign(tf.ones(variable.shape))
    factor.assign(1e-9)  # The variables stay as they are.

    def seconds_of(reduces: bool) -> float:
        start = time.perf_counter()
        steps[reduces]()
        return time.perf_counter() - start

    def turn(groups: int) -> float:
        """Median of the seconds that reducing adds, over groups of steps."""
        added = []
        end = time.perf_counter() + TURN_SECONDS
        # The first group still pays for what others left in the caches.
        while len(added) <= groups or time.perf_counter() < end:
            first, second, third, fourth = map(
                seconds_of, (True, False, False, True)
            )
            added.append((first + fourth - second - third) / 2)
        return statistics.median(added[1:])

    rivals.serve(turn)


def serve_floor(job: Job) -> None:
    cores = os.cpu_count()
    size = FLOOR_BYTES // gradient_sets.BYTES_PER_NUMBER
    buffers = [np.full(size, 1.0, "float32") for _ in range(3)]
    parts = list(zip(*(np.array_split(b, cores) for b in buffers), strict=True))
    pool = ThreadPoolExecutor(cores)

    def go() -> float:
        start = time.perf_counter()
        list(
            pool.map(lambda part: np.add(part[0], part[1], out=part[2]), parts)
        )
        return time.perf_counter() - start

    nbytes = (job.replicas + 1) * gradient_sets.nbytes(job.shapes)

    def turn(_groups: int) -> float:
        """Seconds that moving the bytes takes, however many groups."""
        best = min(go() for _ in range(FLOOR_GOES))
        return best * nbytes / (len(buffers) * FLOOR_BYTES)

    rivals.serve(turn)


# In the process that asks them ----------------------------------------------


def measure(shapes, replicas: int, args: argparse.Namespace):
    """Added seconds by rival, an array with one number for each round."""
    added = {name: [] for name in NAMES}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = {}
        for name in NAMES:
            job = Job(name, replicas, shapes)
            command = [sys.executable, __file__, "--rival"]
            process = rivals.Rival(
                name,
                [*command, json.dumps(asdict(job))],
                folder / name,
                {"CUDA_VISIBLE_DEVICES": "-1"},
            )
            processes[name] = stack.enter_context(process)
        for process in processes.values():
            process.ask(groups=WARM_UP_GROUPS)
        for number in range(args.rounds):
            # Every other round goes backwards, against a drift within rounds.
            for name in NAMES[:: -1 if number % 2 else 1]:
                added[name].append(processes[name].ask(groups=args.steps))
    return {name: np.array(seconds) for name, seconds in added.items()}


def row(label: str, name: str, added: dict[str, np.ndarray]) -> str:
    low, median, high = np.percentile(added[name] * 1e3, [25, 50, 75])
    digits = 2 if abs(median) >= 0.1 else 4
    ratios = [
        f"{np.median(added[name] / added[base]):.2f}"
        for base in (STOCK, ONE_DEVICE, FLOOR)
    ]
    return (
        f"| {label} | {name} | {median:.{digits}f} "
        f"({low:.{digits}f}-{high:.{digits}f}) | " + " | ".join(ratios) + " |"
    )


def environment(args: argparse.Namespace) -> str:
    return (
        f"{command_line.environment('tensorflow', 'keras')}, "
        f"logical CPU devices of "
        f"one process, {args.rounds} rounds of {args.steps} or more groups of "
        "4 timed steps"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sets = list(gradient_sets.SETS)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--steps",
        type=int,
        default=5,
        help="groups of steps in a turn, which takes a second or more",
    )
    parser.add_argument("--sets", nargs="+", choices=sets, default=sets)
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.rounds, args.steps, *args.replicas) < 1:
        parser.error("--rounds, --steps and --replicas must be 1 or more.")
    return args


def main() -> None:
    args = arguments()
    if args.rival:
        job = Job(**json.loads(args.rival))
        (serve_floor if job.rival == FLOOR else serve_strategy)(job)
        return
    # So that the rivals go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))
    print(environment(args), flush=True)
    for replicas in args.replicas:
        print(
            f"\n{replicas} replicas:\n\n"
            "| gradients | strategy | added ms (p25-p75) "
            "| vs MirroredStrategy | vs ReductionToOneDevice | vs floor |\n"
            "|---|---|---|---|---|---|",
            flush=True,
        )
        for name in args.sets:
            shapes = gradient_sets.SETS[name]()
            count, mib = len(shapes), gradient_sets.nbytes(shapes) / 2**20
            label = f"{name} ({count}, {mib:.3g} MiB)"
            added = measure(shapes, replicas, args)
            for rival in NAMES:
                print(row(label, rival, added), flush=True)


if __name__ == "__main__":
    main()
