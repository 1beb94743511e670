"""Efficiency of up to 16 workers, in a cluster that is emulated.

    python benchmarks/emulated_cluster.py --workers 16 --stretch 40 --shrink 10

A few cores carry 16 real workers if time is stretched: links and compute are
slower by the same factor. Each worker is a process that trains under
MultiWorkerAllReduceStrategy with `model.fit`. Its model has the gradients of
ResNet-50, BERT-base or VGG-16, and its backprop sleeps until the moment at
which a device would have each of them (`gradient_sets.py`). Links are those of
`tests/harness/namespaces.py`, each worker in a network namespace of its own.
Times in the table are divided by the factor again, but for the start-up.

    --stretch   Times are multiplied, and rates divided. That makes the cost of
                a message, and of summing a byte, smaller relative to the rest:
                the latency of a step of the ring, which is measured between 2
                workers ("alpha"), is divided by the factor too.
    --shrink    Bytes of every gradient and the rates are divided, which leaves
                all times as they are, and the number of packs. It leaves out
                what a byte costs a core.

Links have no delay but that of their rate, as not every kernel can emulate one:
"alpha" says which latency a run stands for. Frames are of 9000 bytes, as a
worker wakes up for each. A connection sends so little ahead that no queue
overflows, since TCP would repeat what was dropped after times that are not
stretched. If --shrink makes the chunks of a pack shorter than the queue, they
are not sent at equal rates: TCP has no time to find them.

"alone" is the step of one worker, "efficiency" that step to the one of all
workers. "model" is what keras_allreduce/reduce/cost_model.py says, with the
latency and the bandwidth that `python -m keras_allreduce.benchmark` has between
2 workers over such links. "cores" is the share of the cores that the workers
kept busy in the timed steps, and that was busy at all: close to 1 the cores,
not the links, were measured. "start-up" is from the start of the processes to
the first step (CPU time of one in brackets); they are forked from one that has
imported TensorFlow.

A slow link is that of worker 1, of a quarter of the rate. Needs root, `ip` and
`tc`; over MPI also mpirun and mpi4py.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "harness")]

import command_line
import gradient_sets
import mpi_jobs
import namespaces
import numpy as np
import scaling
import warm_python
from gradient_sets import Profile

from keras_allreduce.launch.job import free_ports
from keras_allreduce.reduce import cost_model, pack_sizes
from keras_allreduce.reduce.buckets import GradientSpec, plan_buckets
from keras_allreduce.reduce.cost_model import Link

UNITS = {"gbit": 1e9, "mbit": 1e6}
SLOW = 4
WIRE_DTYPES = {"float32": None, "bfloat16": "bfloat16"}
BYTES = {"float32": 4, "bfloat16": 2}
# A link can pass on no less than a frame at once.
MTU = 9000
FRAME = MTU + 14
QUEUE = 128 * FRAME
# Sleeps and messages must not wait for each other's threads.
THREADS = 4


@dataclass(frozen=True)
class Job:
    """What one worker trains. It travels to its process as JSON.

    Attributes:
        sizes: Number of elements of each gradient.
        ready: Seconds from the start of a step at which each is there.
        steps: Number of timed steps.
        transport: Of the strategy.
        wire_dtype: The same.
        bytes_per_pack: The same.
        folder: Where its result goes.
        limit: Seconds after which it ends itself.
    """

    sizes: list[int]
    ready: list[float]
    forward: float
    steps: int
    transport: str
    wire_dtype: str | None
    bytes_per_pack: int
    folder: str
    limit: int


@dataclass(frozen=True)
class Result:
    """What a worker measured, in seconds of its own time.

    Attributes:
        begun: When its first step began, since the epoch.
        start_cpu: CPU time until then.
        steps: Seconds of each timed step.
        step_cpu: CPU time of all timed steps.
        busy: Share of all cores that was busy meanwhile, with anything.
        all_reduce_ms: By the clocks of the strategy.
        overlap: The same.
    """

    begun: float
    start_cpu: float
    steps: list[float]
    step_cpu: float
    busy: float
    all_reduce_ms: float = float("nan")
    overlap: float = float("nan")


# A worker --------------------------------------------------------------------


class Compute:
    """Time that passes as if a device computed: ops that only sleep."""

    def __init__(self) -> None:
        self.begun = self.begun_cpu = self.start = 0.0

    def begin(self, tensor: Any, seconds: float) -> Any:
        """Begins a step, which has computed forward after `seconds`."""

        def sleep(value: np.ndarray) -> np.ndarray:
            if not self.begun:
                self.begun, self.begun_cpu = time.time(), time.process_time()
            self.start = time.monotonic()
            time.sleep(seconds)
            return value

        return self._op(sleep, tensor)

    def until(self, tensor: Any, seconds: float) -> Any:
        """Has computed `tensor` so many seconds after the step began."""

        def sleep(value: np.ndarray) -> np.ndarray:
            end = self.start + seconds
            time.sleep(max(0.0, end - time.monotonic()))
            return value

        return self._op(sleep, tensor)

    def _op(self, sleep: Any, tensor: Any) -> Any:
        import tensorflow as tf

        slept = tf.numpy_function(sleep, [tensor], tensor.dtype)
        return tf.ensure_shape(slept, tensor.shape)


def emulated(job: Job, compute: Compute) -> Any:
    """A Keras model with the gradients of the job."""
    import keras
    import tensorflow as tf

    class Emulated(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.gradients = [
                self.add_weight(shape=[size], initializer="zeros")
                for size in job.sizes
            ]

        def call(self, inputs: Any) -> Any:
            outputs = compute.begin(inputs, job.forward)
            before = [*job.ready[1:], job.forward]
            for variable, ready, later in zip(
                self.gradients, job.ready, before, strict=True
            ):
                outputs = _layer(
                    outputs, variable.value, ready, is_computing=ready > later
                )
            return outputs

    def _layer(
        inputs: Any, weights: Any, ready: float, is_computing: bool
    ) -> Any:
        @tf.custom_gradient
        def layer(inputs: Any, weights: Any) -> Any:
            def backprop(upstream: Any) -> tuple[Any, Any]:
                if is_computing:
                    upstream = compute.until(upstream, ready)
                gradient = tf.fill(weights.shape, tf.reduce_sum(upstream))
                return upstream, gradient

            return tf.identity(inputs), backprop

        return layer(inputs, weights)

    return Emulated()


def work(job: Job) -> None:
    """Trains as one worker, and leaves its result in the folder."""
    import keras
    import tensorflow as tf

    import keras_allreduce

    # It also ends if this script is killed before it kills it.
    signal.alarm(job.limit)
    tf.config.threading.set_inter_op_parallelism_threads(THREADS)
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        timeout_seconds=job.limit,
        transport=job.transport,
        wire_dtype=job.wire_dtype,
        bytes_per_pack=job.bytes_per_pack,
    )
    compute, workers = Compute(), strategy.num_replicas_in_sync
    with strategy.scope():
        model = emulated(job, compute)
        # Nothing is learnt; an update costs one pass over the weights.
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    ends, cpu, busy = [], [], []

    class Timer(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            ends.append(time.monotonic())
            cpu.append(time.process_time())
            busy.append(_busy_and_all_ticks())
            if batch == 0:
                strategy.all_reduce_stats()

    x = np.zeros([workers * (job.steps + 1), 1], "float32")
    model.fit(
        x, x, batch_size=workers, shuffle=False, verbose=0, callbacks=[Timer()]
    )
    stats = strategy.all_reduce_stats()
    ran, passed = np.subtract(busy[-1], busy[0])
    clocks = (stats.all_reduce_ms, stats.overlap) if stats else ()
    result = Result(
        compute.begun,
        compute.begun_cpu,
        np.diff(ends).tolist(),
        cpu[-1] - cpu[0],
        float(ran / passed),
        *clocks,
    )
    index = strategy.cluster_resolver.task_id
    Path(job.folder, f"result{index}").write_text(json.dumps(asdict(result)))


def _busy_and_all_ticks() -> tuple[int, int]:
    """Ticks that all cores were busy, and all there were, since boot."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


# All workers -----------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    model: str
    transport: str
    link: str
    dtype: str
    workers: int


def links(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `namespaces.network`: links slower by both factors."""
    slower = args.stretch * args.shrink
    rates = [args.rate / slower] * setting.workers
    if setting.link == "slow":
        rates[1] /= SLOW
    # A queue as that of a card is, whatever the rate.
    queue = QUEUE * 8 / min(rates)
    return {
        "rate": [(f"{rate:.0f}bit", f"{rate:.0f}bit") for rate in rates],
        "burst": f"{max(2 * FRAME, 2**17 / slower):.0f}b",
        "queue": f"{queue * 1e3:.0f}ms",
        "mtu": MTU,
        # All others may send to one worker at once. A queue that overflows
        # makes TCP wait for times that are not stretched.
        "window": QUEUE // max(1, setting.workers - 1),
    }


def run(argv: list[str], setting: Setting, folder: Path, args) -> str:
    """Runs `python` with arguments as each of the workers.

    Returns:
        What the first one wrote.

    Raises:
        SystemExit: If one fails or is too slow, with what they wrote last.
    """
    outputs = [folder / f"output{rank}" for rank in range(setting.workers)]
    with contextlib.ExitStack() as stack:
        network = None
        if setting.workers > 1:
            network = stack.enter_context(
                namespaces.network(setting.workers, **links(setting, args))
            )
        if setting.transport == "mpi" and network:
            del outputs[1:]
            processes = [start_mpi(argv, setting, network, folder, outputs[0])]
        else:
            processes = start_grpc(argv, network, folder, outputs)
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        codes = command_line.wait(processes, args.limit)
        if setting.transport == "mpi" and None in codes:
            processes[0].send_signal(signal.SIGTERM)  # It ends its ranks.
            command_line.wait(processes, 20)
    said = [output.read_text(errors="replace") for output in outputs]
    if any(code != 0 for code in codes):
        last = "\n---\n".join(text[-2000:] for text in said)
        raise SystemExit(f"{last}\n{setting} failed. Exit codes: {codes}")
    return said[0]


ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
    "PYTHONPATH": os.pathsep.join(sys.path[:2]),
}


def start_grpc(
    argv: list[str], network: Any, folder: Path, outputs: list[Path]
) -> list[Any]:
    addresses = [f"127.0.0.1:{free_ports(1)[0]}"]
    if network:
        addresses = [f"{address}:12345" for address in network.addresses]
    processes = []
    for rank, output in enumerate(outputs):
        output.touch()
        process = warm_python.Process(
            argv,
            folder=folder,
            environment={
                **os.environ,
                **ENVIRONMENT,
                **command_line.tf_config(addresses, rank),
            },
            stdout=output,
            stderr=output,
            namespace=network and network.path(rank),
        )
        processes.append(process)
    return processes


def start_mpi(
    argv: list[str], setting: Setting, network: Any, folder: Path, output: Path
) -> subprocess.Popen:
    command = [warm_python.executable(), *argv]
    with output.open("wb") as file:
        return subprocess.Popen(
            mpi_jobs.command_of([command] * setting.workers, network),
            env={
                **os.environ,
                **ENVIRONMENT,
                **mpi_jobs.ENVIRONMENT,
                **mpi_jobs.environment_of(network, str(folder)),
            },
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def train(
    setting: Setting, profile: Profile, args: argparse.Namespace, steps: int
) -> tuple[list[Result], float]:
    """Results of all workers, and the seconds that they took to start."""
    seconds = profile.step_seconds * args.stretch
    forward = seconds * (1 - cost_model.BACKWARD_SHARE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = Job(
            sizes(profile, args.shrink),
            [forward + each * (seconds - forward) for each in profile.ready],
            forward,
            steps,
            setting.transport,
            WIRE_DTYPES[setting.dtype],
            args.bytes_per_pack // args.shrink,
            name,
            args.limit,
        )
        order = folder / "job"
        order.write_text(json.dumps(asdict(job)))
        began = time.time()
        argv = [str(Path(__file__).resolve()), "--worker", str(order)]
        run(argv, setting, folder, args)
        results = [
            Result(**json.loads((folder / f"result{rank}").read_text()))
            for rank in range(setting.workers)
        ]
    return results, max(result.begun for result in results) - began


def sizes(profile: Profile, shrink: int) -> list[int]:
    """Number of elements of each gradient."""
    return [
        -(-gradient_sets.nbytes([shape]) // 4 // shrink)
        for shape in profile.shapes
    ]


# The model -------------------------------------------------------------------


def measured_link(transport: str, args: argparse.Namespace) -> Link:
    """Latency and bandwidth between 2 workers."""
    setting = Setting("", transport, "even", "float32", 2)
    argv = [*scaling.BENCHMARK, "--min-bytes", "4K", "--max-bytes", "4M"]
    argv += ["--factor", "1024", "--loops", "1", "--warmup", "1", "--json"]
    argv += ["--rounds", "5"]
    with tempfile.TemporaryDirectory() as folder:
        document = scaling.document_in(run(argv, setting, Path(folder), args))
    small, large = document["rows"]
    # A link passes on the small one at once. The large one takes two steps.
    alpha = small["median_us"] / 1e6
    return Link(alpha, large["bytes"] / (large["median_us"] / 1e6 - 2 * alpha))


def predicted_seconds(
    setting: Setting, profile: Profile, link: Link, args: argparse.Namespace
) -> float:
    """Seconds of a stretched step, by the cost model."""
    counts = sizes(profile, args.shrink)
    plan = planned(counts, setting.workers, args.bytes_per_pack // args.shrink)
    compute = profile.step_seconds * args.stretch
    slowest = SLOW if setting.link == "slow" else 1
    link = Link(link.alpha, link.bandwidth / slowest)
    narrow = BYTES[setting.dtype] / 4
    exposed = cost_model.exposed_seconds(
        [pack.nbytes for pack in plan],
        compute,
        lambda nbytes: cost_model.workers_seconds(
            nbytes * narrow, setting.workers, link
        ),
        lambda nbytes: cost_model.workers_seconds(
            nbytes * narrow, setting.workers, link.busy()
        ),
        [max(profile.ready[at] for at in pack.indices) for pack in plan],
    )
    return compute + exposed


def planned(counts: list[int], workers: int, bytes_per_pack: int) -> list[Any]:
    """The packs that the package makes of so many float32s."""
    size = pack_sizes.PackSize(bytes_per_pack)
    if not bytes_per_pack:
        size = pack_sizes.between_workers(workers, 4 * sum(counts))
    return plan_buckets(
        [GradientSpec("float32", 4 * count) for count in counts],
        size.bytes_per_pack,
        size.first_bytes_per_pack,
        size.alone_above,
    )


# The table -------------------------------------------------------------------

HEADER = """\
| model | transport | link | wire | workers | alone ms | step ms | efficiency \
| model | off | all_reduce ms | overlap | cores: own / all \
| start-up s (CPU s) |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def row(
    setting: Setting,
    profile: Profile,
    alone: float,
    link: Link,
    args: argparse.Namespace,
) -> str:
    results, start_up = train(setting, profile, args, args.steps)
    # In step, all take the same time.
    step = statistics.median(
        max(times)
        for times in zip(*(each.steps for each in results), strict=True)
    )
    own = sum(each.step_cpu for each in results) / sum(results[0].steps)
    own /= os.cpu_count() or 1
    predicted = predicted_seconds(setting, profile, link, args)
    ideal = profile.step_seconds * args.stretch
    cells = [
        *(setting.model, setting.transport, setting.link, setting.dtype),
        setting.workers,
        f"{alone / args.stretch * 1e3:.0f}",
        f"{step / args.stretch * 1e3:.0f}",
        f"{alone / step:.3f}",
        f"{ideal / predicted:.3f}",
        f"{(predicted / ideal * alone / step - 1) * 100:+.0f} %",
        f"{max(r.all_reduce_ms for r in results) / args.stretch:.0f}",
        f"{statistics.median(r.overlap for r in results):.2f}",
        f"{own:.2f} / {results[0].busy:.2f}",
        f"{start_up:.0f} ({max(r.start_cpu for r in results):.1f})",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def print_table(args: argparse.Namespace) -> None:
    print(
        f"{command_line.environment('tensorflow', 'keras')}, time x "
        f"{args.stretch}, bytes / {args.shrink}, load "
        f"{os.getloadavg()[0]:.1f}",
        flush=True,
    )
    measured = {}
    for transport in args.transports:
        measured[transport] = link = measured_link(transport, args)
        share = link.bandwidth * 8 * args.stretch * args.shrink / args.rate
        print(
            f"{transport}: alpha {link.alpha * 1e3:.2f} ms "
            f"({link.alpha / args.stretch * 1e6:.0f} us unstretched), "
            f"{share:.2f} of the rate",
            flush=True,
        )
    print(f"\n{HEADER}", flush=True)
    for model in args.models:
        profile = gradient_sets.PROFILES[model]()
        check_packs(profile, args)
        single = Setting(model, "grpc", "even", "float32", 1)
        # Nothing but sleep, so that one step is like any other.
        (result,), _ = train(single, profile, args, steps=1)
        (alone,) = result.steps
        for of in itertools.product(
            args.transports, args.links, args.dtypes, args.workers
        ):
            setting = Setting(model, *of)
            link = measured[setting.transport]
            print(row(setting, profile, alone, link, args), flush=True)


def check_packs(profile: Profile, args: argparse.Namespace) -> None:
    """Raises if shrunken gradients travel in other packs than real ones."""
    for workers in args.workers:
        real, shrunken = (
            [
                pack.indices
                for pack in planned(
                    sizes(profile, shrink),
                    workers,
                    args.bytes_per_pack // shrink,
                )
            ]
            for shrink in (1, args.shrink)
        )
        if len(real) != len(shrunken):
            raise SystemExit(
                "There must be as many packs as without --shrink. Received: "
                f"{len(shrunken)} packs instead of {len(real)} between "
                f"{workers} workers. Pass a smaller --shrink."
            )


def rate(text: str) -> float:
    """Bits a second, of a rate such as `10gbit`."""
    for unit, bits in UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * bits
    raise argparse.ArgumentTypeError(f"must end in gbit or mbit: {text}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def add_some(name: str, choices: list[str], default: list[str]) -> None:
        add(name, nargs="+", choices=choices, default=default)

    models = list(gradient_sets.PROFILES)
    add_some("--models", models, models)
    add_some("--transports", ["grpc", "mpi"], ["grpc"])
    add_some("--links", ["even", "slow"], ["even"])
    add_some("--dtypes", list(BYTES), ["float32"])
    add("--workers", nargs="+", type=int, default=[2, 4, 8, 16])
    add("--steps", type=int, default=3, help="timed, after the first")
    add("--stretch", type=float, default=40.0)
    add("--shrink", type=int, default=10)
    add("--rate", type=rate, default="10gbit", help="of a real link")
    add(
        "--bytes-per-pack",
        type=int,
        default=0,
        help="of a real pack; needed where the default has a limit, which "
        "does not shrink",
    )
    add("--limit", type=int, default=600, help="seconds of a row")
    args = parser.parse_args()
    if min(args.workers) < 2 or min(args.steps, args.stretch, args.shrink) < 1:
        parser.error(
            "--workers must be 2 or more, --steps, --stretch and --shrink 1."
        )
    return args


def main() -> None:
    args = arguments()
    # So that the workers and the network go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))
    if namespaces.missing():
        raise SystemExit(f"No links: {namespaces.missing()}")
    if "mpi" in args.transports and mpi_jobs.missing():
        raise SystemExit(f"No MPI: {mpi_jobs.missing()}")
    print_table(args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Job(**json.loads(Path(sys.argv[2]).read_text())))
    else:
        main()
