"""Makes things go wrong at random times, and looks at how the workers end.

    python benchmarks/random_faults.py --rounds 200

Each round starts all workers anew, forked from a process that has imported
TensorFlow. In two of three rounds a fault happens to one worker, at a time
drawn from the whole run: from the start of the processes to the last step. In
every third, nothing is wrong, however odd it looks. After a round

- no worker still runs, and no process is left, not even a helper of a worker;
- after a good round all exit codes are 0;
- a worker that ended well has, after each epoch, the weights of one device; one
  that was told to stop early has them as far as it came;
- the victim has the exit code and the last line of its fault;
- any other worker that failed says why in its last line, which has the rule
  ("All workers must ...") and names a worker: the victim, if it failed alone;
- it did so within `--margin` seconds (5) of what docs/failures.md says of the
  fault. How long its process then takes to end depends on how busy the machine
  is; the table has both.

    fault        what happens to one worker
    kill         SIGKILL
    term         SIGTERM
    freeze       SIGSTOP, and SIGCONT when the others have ended
    exception    a callback raises
    exit         a callback calls `sys.exit(3)`
    early stop   a callback stops training in the middle of an epoch
    wrong call   a callback evaluates
    weights      a callback sets a weight
    rate         a callback sets the learning rate
    other model  its model has another activation

    good         what happens in a good round
    none         nothing
    garbage      random bytes are sent to the port of a worker, the whole time
    link         one worker is behind a link of 20 Mbit/s to 1 Gbit/s
    suspended    all workers are stopped together, and go on together
    strategies   two strategies train in turns, and the first again
    threads      each worker has another number of threads
    proxy        the environment has proxies, behind which there is nobody
    slow step    a callback of one worker takes `--slow` seconds, which is more
                 than every limit but `timeout_seconds`
    slow tracing the same of the tracing of its first step

`--kinds good` draws good rounds alone, and `--busy 2` keeps two cores busy with
something else.
The exit code is 1 if a round did not end so. `--seed` repeats a run, but for
how fast the machine is; `--outputs` keeps what the workers of such a round
wrote. Links need root and `ip`; without them that kind is left out.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "harness")]

import command_line
import namespaces
import numpy as np
import warm_python

from keras_allreduce.launch.job import free_ports

RULE, STAY = "All workers must", "until training ends"
EXIT_CODE = 3

# What docs/failures.md says of a worker that does not answer, and of two that
# wait for each other.
FROZEN_SECONDS, STALL_SECONDS = 22.0, 5.0


@dataclass(frozen=True)
class Kind:
    """A kind of round.

    Attributes:
        is_good: Whether all must end well.
        code: Exit code of the victim, if it fails otherwise than the others.
        says: What the last line of the victim holds, as a regular expression.
        others_say: The same of the others, where the fault was in a step.
        within_seconds: How long the others may take to say so.
        program: What is trained.
    """

    is_good: bool = False
    code: int | None = None
    says: str = ""
    others_say: str = ""
    within_seconds: float = 0.0
    program: str = "small"


SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "freeze": signal.SIGSTOP,
}
BAD = {
    "kill": Kind(code=-signal.SIGKILL),
    "term": Kind(code=-signal.SIGTERM),
    "freeze": Kind(code=1, says=RULE, within_seconds=FROZEN_SECONDS),
    "exception": Kind(code=1, says="ValueError: the fault", others_say="fault"),
    "exit": Kind(code=EXIT_CODE, others_say=f"SystemExit: {EXIT_CODE}"),
    "early stop": Kind(within_seconds=STALL_SECONDS),
    "wrong call": Kind(within_seconds=STALL_SECONDS),
    "weights": Kind(others_say="weights and optimizer"),
    "rate": Kind(others_say="weights and optimizer"),
    "other model": Kind(code=1, says=RULE, others_say="compile options"),
}
GOOD = {
    "none": Kind(is_good=True),
    "garbage": Kind(is_good=True),
    "link": Kind(is_good=True, program="wide"),
    "suspended": Kind(is_good=True),
    "strategies": Kind(is_good=True, program="strategies"),
    "threads": Kind(is_good=True, program="clipped"),
    "proxy": Kind(is_good=True),
    "slow step": Kind(is_good=True),
    "slow tracing": Kind(is_good=True),
}
KINDS = BAD | GOOD
IN_A_STEP = (
    "exception",
    "exit",
    "early stop",
    "wrong call",
    "weights",
    "rate",
    "slow step",
    "slow tracing",
)

EPOCHS, STEPS = 12, 6
WIDE, WIDE_EPOCHS = 20_000, 3
POLL_SECONDS = 0.02
AS_WITHOUT = "as without a fault"

# Ends with this script, however that ends.
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    pass
"""


@dataclass(frozen=True)
class Fault:
    """What happens in a round.

    Attributes:
        kind: One of `KINDS`.
        rank: Number of the worker to which it happens.
        part: When, as a part of the whole run.
        amount: From 0 to 1: how fast the link is, how long a suspension.
        slow_seconds: How long a slow step, or a slow tracing, takes.
    """

    kind: str
    rank: int
    part: float
    amount: float
    slow_seconds: float = 0.0

    @property
    def how(self) -> Kind:
        """What the workers must do."""
        return KINDS[self.kind]

    @property
    def megabits(self) -> int:
        """What the link of the worker carries in a second."""
        return round(20 * 50**self.amount)

    @property
    def pause_seconds(self) -> float:
        """How long all workers are suspended."""
        return 1 + 29 * self.amount

    def __str__(self) -> str:
        more = {
            "link": f", {self.megabits} Mbit/s",
            "suspended": f", {self.pause_seconds:.0f} s",
            "slow step": f", {self.slow_seconds:g} s",
            "slow tracing": f", {self.slow_seconds:g} s",
        }.get(self.kind, "")
        return f"{self.kind}, worker {self.rank}, at {self.part:.3f}{more}"


@dataclass(frozen=True)
class End:
    """How one worker ended.

    Attributes:
        code: Its exit code; `None` if it had to be killed.
        at: When, in seconds since the epoch.
        said: When it wrote its last line.
        output: What it wrote.
        weights: Its weights after each epoch, an array of rows; `None` if it
            failed.
        began: When it began to make its strategy.
        connected: When it had; `None` if it had not.
    """

    code: int | None
    at: float
    said: float
    output: str
    weights: Any
    began: float
    connected: float | None

    @property
    def last_line(self) -> str:
        """The last line that it wrote."""
        return ["", *self.output.strip().splitlines()][-1]


@dataclass(frozen=True)
class Round:
    """How all workers ended.

    Attributes:
        began: When the processes were started, in seconds since the epoch.
        happened: When the fault did; `None` if it did not.
        ends: The end of each worker.
        left: Numbers of those that have left a process behind.
    """

    began: float
    happened: float | None
    ends: list[End]
    left: list[int]

    @property
    def seconds(self) -> float:
        """How long it took until the last worker had ended."""
        return max(end.at for end in self.ends) - self.began

    def lateness(self, rank: int) -> tuple[float, float]:
        """Seconds from the fault to the last line of a worker, and its end."""
        end = self.ends[rank]
        since = max(self.happened or self.began, end.began)
        return end.said - since, end.at - since

    def has_connected(self) -> bool:
        """Whether all workers had, when the fault happened."""
        return all(
            end.connected is not None
            and self.happened is not None
            and end.connected < self.happened
            for end in self.ends
        )


# The workers -----------------------------------------------------------------


def data() -> tuple[Any, Any]:
    """What all programs train on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * 16, 6)).astype("float32")
    return x, x[:, :1] + 0.1 * rng.normal(size=(STEPS * 16, 1)).astype(
        "float32"
    )


_to_sleep: list[float] = []


def tanh(x: Any) -> Any:
    """An activation that takes long to trace, if it is told to."""
    import keras

    while _to_sleep:
        time.sleep(_to_sleep.pop())
    return keras.ops.tanh(x)


def model_of(strategy: Any, units: int, activation: Any, **options: Any) -> Any:
    """A model in the scope of a strategy; `None`: of one device."""
    import keras

    keras.utils.set_random_seed(1)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(units, activation),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.01, **options), "mse")
    return model


def trained(
    program: str,
    make_strategy: Callable[[], Any],
    callbacks: Sequence[Any] = (),
    activation: Any = "tanh",
) -> Any:
    """Trains a program; returns its weights after each epoch, as rows.

    Args:
        program: What to train.
        make_strategy: Makes a strategy, or `None` for one device.
        callbacks: Of `fit`.
        activation: Of the model.
    """
    import keras

    x, y = data()
    rows = []

    def fit(model: Any, epochs: int) -> None:
        def note(*_: Any) -> None:
            weights = [np.ravel(each) for each in model.get_weights()]
            rows.append(np.concatenate(weights))

        model.fit(
            x,
            y,
            batch_size=16,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(on_epoch_end=note),
                *callbacks,
            ],
        )

    first = make_strategy()
    Path(f"connected{os.environ.get('RANK_OF_ROUND', '')}").touch()
    if program == "small":
        fit(model_of(first, 4, activation), EPOCHS)
    if program == "wide":
        fit(model_of(first, WIDE, activation), WIDE_EPOCHS)
    if program == "clipped":
        # The norm is summed in the update, by all threads.
        options = {"global_clipnorm": 0.01}
        fit(model_of(first, WIDE, activation, **options), WIDE_EPOCHS)
    if program == "strategies":
        one = model_of(first, 4, activation)
        fit(one, 2)
        another = model_of(make_strategy(), 4, activation, momentum=0.9)
        fit(another, 2)
        one.evaluate(x, y, batch_size=16, verbose=0)
        fit(one, 2)
        another.predict(x, batch_size=16, verbose=0)
        fit(another, 2)
    return np.stack(rows)


def train(fault: Fault, timeout_seconds: float, rank: int) -> None:
    """What each worker runs, in a folder of the round."""
    import tensorflow as tf

    import keras_allreduce

    Path(f"began{rank}").touch()
    os.environ["RANK_OF_ROUND"] = str(rank)
    if fault.kind == "threads":
        tf.config.threading.set_intra_op_parallelism_threads(1 + 4 * rank)
    is_victim = rank == fault.rank
    activation: Any = tanh if fault.kind == "slow tracing" else "tanh"
    if is_victim and fault.kind == "other model":
        Path("happened").touch()
        activation = "relu"
    weights = trained(
        fault.how.program,
        lambda: keras_allreduce.MultiWorkerAllReduceStrategy(
            timeout_seconds=timeout_seconds
        ),
        [callback_of(fault)] if is_victim and fault.kind in IN_A_STEP else [],
        activation,
    )
    np.save(f"weights{rank}", weights)


def callback_of(fault: Fault) -> Any:
    """A callback in which the fault happens."""
    import keras

    step = int(fault.part * EPOCHS * STEPS)
    x, y = data()

    class Fail(keras.callbacks.Callback):
        steps = 0

        def on_train_begin(self, logs: Any = None) -> None:
            if fault.kind == "slow tracing":
                _to_sleep.append(fault.slow_seconds)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.steps += 1
            if self.steps != step + 1 or fault.kind == "slow tracing":
                return
            Path("happened").touch()
            if fault.kind == "slow step":
                time.sleep(fault.slow_seconds)
            if fault.kind == "exception":
                raise ValueError("the fault")
            if fault.kind == "exit":
                sys.exit(EXIT_CODE)
            if fault.kind == "early stop":
                self.model.stop_training = True
            if fault.kind == "wrong call":
                self.model.evaluate(x, y, batch_size=16, verbose=0)
            if fault.kind == "weights":
                variable = self.model.layers[-1].bias
                variable.assign(variable + 1)
            if fault.kind == "rate":
                self.model.optimizer.learning_rate = 0.02

    return Fail()


# One round -------------------------------------------------------------------


def run_round(fault: Fault, run_seconds: float, options: argparse.Namespace):
    """Starts workers, makes the fault happen, and waits for all.

    Args:
        fault: The fault.
        run_seconds: How long a run takes.
        options: The command line.

    Returns:
        A `Round`.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        net = None
        if fault.kind == "link":
            net = stack.enter_context(namespaces.network(options.workers))
            slow_down(net, fault)
            addresses = [f"{each}:12345" for each in net.addresses]
        else:
            addresses = [f"127.0.0.1:{p}" for p in free_ports(options.workers)]
        began = time.time()
        workers = [
            start(fault, rank, addresses, folder, options, net)
            for rank in range(options.workers)
        ]
        over = threading.Event()
        outside = threading.Thread(
            target=happen,
            args=[fault, workers, addresses, run_seconds, folder, over],
        )
        outside.start()
        try:
            ends = wait_for(workers, folder, fault, began + options.limit)
        finally:
            over.set()
            outside.join()
            for worker in workers:
                worker.kill()
        happened = time_of(folder / "happened")
        left = [
            rank for rank, worker in enumerate(workers) if is_left(worker.pid)
        ]
    return Round(began, happened, ends, left)


def slow_down(net: Any, fault: Fault) -> None:
    """Puts one worker behind a slow link, in both directions."""
    rate = f"{fault.megabits}mbit"
    namespaces.limit(f"{net.name}-{fault.rank}", "eth0", rate)
    namespaces.limit(f"{net.name}-switch", f"p{fault.rank}", rate)


def start(
    fault: Fault,
    rank: int,
    addresses: list[str],
    folder: Path,
    options: argparse.Namespace,
    net: Any,
) -> warm_python.Process:
    output = folder / f"output{rank}"
    output.touch()
    order = [astuple(fault), options.timeout, rank, options.limit]
    added = command_line.tf_config(addresses, rank)
    if fault.kind == "proxy":
        nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        added |= dict.fromkeys(names, nobody)
    return process(order, folder, output, added, net and net.path(rank))


def process(
    order: list[Any],
    folder: Path,
    output: Path,
    added: dict[str, str],
    namespace: str | None = None,
) -> warm_python.Process:
    """Runs this file as a worker, or as one device."""
    return warm_python.Process(
        [str(Path(__file__).resolve()), "--worker", json.dumps(order)],
        folder=folder,
        environment={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
            **added,
        },
        stdout=output,
        stderr=output,
        namespace=namespace,
    )


def happen(
    fault: Fault,
    workers: list[warm_python.Process],
    addresses: list[str],
    run_seconds: float,
    folder: Path,
    over: threading.Event,
) -> None:
    """Makes what comes from outside happen."""
    if fault.kind in SIGNALS or fault.kind == "suspended":
        over.wait(fault.part * run_seconds)
        (folder / "happened").touch()
    if fault.kind in SIGNALS:
        workers[fault.rank].send_signal(SIGNALS[fault.kind])
    if fault.kind == "suspended":
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for worker in workers:
                worker.send_signal(number)
            if number == signal.SIGSTOP:
                over.wait(fault.pause_seconds)
    port = int(addresses[fault.rank].split(":")[1])
    noise = random.Random(fault.part)
    while fault.kind == "garbage" and not over.wait(0.05):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 1) as connection,
        ):
            connection.sendall(noise.randbytes(noise.randrange(1, 4096)))


def wait_for(
    workers: list[warm_python.Process],
    folder: Path,
    fault: Fault,
    until: float,
) -> list[End]:
    """Waits for all; a frozen one goes on when the others have ended."""
    ends: dict[int, End] = {}
    while len(ends) < len(workers):
        for rank, worker in enumerate(workers):
            if rank in ends:
                continue
            code, now = worker.poll(), time.time()
            if code is None and now < until:
                continue
            output = folder / f"output{rank}"
            ends[rank] = End(
                code,
                now,
                output.stat().st_mtime,
                output.read_text(errors="replace"),
                weights_in(folder / f"weights{rank}.npy"),
                time_of(folder / f"began{rank}") or now,
                time_of(folder / f"connected{rank}"),
            )
            others = [r for r in range(len(workers)) if r != fault.rank]
            if fault.kind == "freeze" and set(others) <= ends.keys():
                workers[fault.rank].send_signal(signal.SIGCONT)
        time.sleep(POLL_SECONDS)
    return [ends[rank] for rank in range(len(workers))]


def weights_in(path: Path) -> Any:
    return np.load(path) if path.exists() else None


def time_of(path: Path) -> float | None:
    """When a worker, or this process, has made the file."""
    return path.stat().st_mtime if path.exists() else None


def is_left(group: int) -> bool:
    """Whether a process of a worker, such as a helper, is still there."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(POLL_SECONDS)
    os.killpg(group, signal.SIGKILL)
    return True


def survivors(fault: Fault, found: Round) -> list[int]:
    """The workers that have failed because of what happened to another."""
    is_alone = fault.how.code is not None and fault.kind != "other model"
    return [
        rank
        for rank, end in enumerate(found.ends)
        if end.code and not (is_alone and rank == fault.rank)
    ]


def is_right(weights: Any, fault: Fault, rank: int, right: Any) -> bool:
    """Whether a worker that ended well has the weights of one device."""
    if weights is None:
        return False
    if fault.kind == "early stop" and rank == fault.rank:
        right = right[: len(weights)]
    return weights.shape == right.shape and np.allclose(
        weights, right, rtol=1e-4, atol=1e-5
    )


def problems(
    fault: Fault, found: Round, right: Any, options: argparse.Namespace
) -> Iterator[str]:
    """Yields what is wrong with the end of a round."""
    for rank in found.left:
        yield f"worker {rank} has left a process behind"
    for rank, end in enumerate(found.ends):
        if end.code is None:
            yield f"worker {rank} hangs"
        elif end.code == 0 and not is_right(end.weights, fault, rank, right):
            yield f"worker {rank} has wrong weights"
        elif end.code and fault.how.is_good:
            yield f"worker {rank} has failed: {end.last_line}"
    if fault.how.is_good:
        return
    yield from problems_of_victim(fault, found)
    for rank in survivors(fault, found):
        yield from problems_of_other(fault, found, rank, options)


def problems_of_victim(fault: Fault, found: Round) -> Iterator[str]:
    """Yields what is wrong with the end of the worker that has the fault."""
    end, how = found.ends[fault.rank], fault.how
    if how.code is None or found.happened is None:
        return
    if end.code == 0 and fault.kind in SIGNALS:
        return  # It came after the end.
    codes = [how.code]
    if fault.kind == "freeze" and not found.has_connected():
        codes.append(-signal.SIGKILL)  # TensorFlow holds Python's lock.
    if end.code not in codes:
        yield f"the victim ended with {end.code}, not {how.code}"
    if not re.search(how.says, end.last_line):
        yield f"the victim says: {end.last_line}"


def problems_of_other(
    fault: Fault, found: Round, rank: int, options: argparse.Namespace
) -> Iterator[str]:
    """Yields what is wrong with the end of a worker that has failed of it."""
    end, how = found.ends[rank], fault.how
    line, (said, ended) = end.last_line, found.lateness(rank)
    named = str(fault.rank) if STAY in line else r"\d"
    if RULE not in line or not re.search(rf"\bworker {named}\b", line):
        yield f"worker {rank} does not say why: {line}"
    if found.has_connected() and not re.search(how.others_say, line):
        yield f"worker {rank} does not name the fault: {line}"
    allowed = how.within_seconds
    if not found.has_connected():
        # Who is not there yet is waited for.
        allowed = max(allowed, options.timeout + STALL_SECONDS)
    if said > allowed + options.margin:
        yield (
            f"worker {rank} said why after {said:.1f} s, and ended after "
            f"{ended:.1f} s: {line}"
        )


# The command -----------------------------------------------------------------


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keeps as many cores busy in the block."""
    command = [sys.executable, "-c", BUSY]
    loops = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> int:
    options = parse()
    with busy(options.busy):
        return run_rounds(options)


def run_rounds(options: argparse.Namespace) -> int:
    """Runs and prints all rounds; returns the exit code."""
    missing = namespaces.missing() if "link" in options.kinds else None
    if missing:
        options.kinds = [kind for kind in options.kinds if kind != "link"]
        print(f"no rounds with links: {missing}")
    right = {
        program: on_one_device(program, options)
        for program in {KINDS[kind].program for kind in options.kinds}
        | {"small"}
    }
    none = Fault("none", 0, 0.0, 0.0)
    # The first takes longer than all others.
    warm, again = (run_round(none, 0.0, options) for _ in range(2))
    for found in (warm, again):
        wrong = list(problems(none, found, right["small"], options))
        if wrong:
            print("A run without a fault must end well.", *wrong, sep="\n")
            print(found.ends[0].output[-3000:])
            return 1
    run_seconds = again.seconds
    print(f"a run takes {run_seconds:.1f} s", flush=True)
    outcomes: dict[str, list[str]] = {kind: [] for kind in options.kinds}
    seconds: dict[str, list[tuple[float, float]]] = {k: [] for k in outcomes}
    failed = 0
    # Ctrl+C, or SIGTERM, ends it after some of the rounds.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for number, fault in enumerate(faults(options), 1):
            found = run_round(fault, run_seconds, options)
            if outcome(found) == AS_WITHOUT and fault.kind == "none":
                # The machine may have been busier before.
                run_seconds = min(run_seconds, found.seconds)
            weights = right[fault.how.program]
            wrong = list(problems(fault, found, weights, options))
            failed += bool(wrong)
            if wrong and options.outputs:
                keep(options.outputs / f"{options.seed}-{number}", found)
            times = [found.lateness(r) for r in survivors(fault, found)]
            seconds[fault.kind] += times
            outcomes[fault.kind].append(outcome(found))
            after = "".join(f", {said:.1f}/{end:.1f} s" for said, end in times)
            print(f"{number}: {fault}: {outcome(found)}{after}")
            for each in wrong:
                print(f"    {each}")
            sys.stdout.flush()
    table(outcomes, seconds)
    rounds = sum(map(len, outcomes.values()))
    print(
        f"{failed} of {rounds} rounds did not end as they should "
        f"(--workers {options.workers} --busy {options.busy} "
        f"--seed {options.seed})"
    )
    return 1 if failed else 0


def on_one_device(program: str, options: argparse.Namespace) -> Any:
    """The weights of one device after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        output.touch()
        order = [program, options.limit]
        code = process(order, Path(folder), output, {}).wait(options.limit)
        if code:
            raise RuntimeError(output.read_text(errors="replace"))
        return np.load(Path(folder, "right.npy"))


def faults(options: argparse.Namespace) -> Iterator[Fault]:
    """Draws the rounds: a third good ones, each kind as often as any other."""
    draw = random.Random(options.seed)
    bad = itertools.cycle([kind for kind in options.kinds if kind in BAD])
    good = itertools.cycle([kind for kind in options.kinds if kind in GOOD])
    has_both = {True, False} == {kind in BAD for kind in options.kinds}
    for number in range(options.rounds):
        is_good = number % 3 == 2 if has_both else options.kinds[0] in GOOD
        yield Fault(
            next(good if is_good else bad),
            draw.randrange(options.workers),
            draw.random(),
            draw.random(),
            options.slow,
        )


def outcome(found: Round) -> str:
    """How the workers of a round ended, in two or three words."""
    codes = [end.code for end in found.ends]
    if not any(codes):
        return AS_WITHOUT
    return "ended in errors" if all(codes) else f"exit codes {codes}"


def keep(folder: Path, found: Round) -> None:
    """Keeps what the workers wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, end in enumerate(found.ends):
        (folder / str(rank)).write_text(end.output)


def table(
    outcomes: dict[str, list[str]],
    seconds: dict[str, list[tuple[float, float]]],
) -> None:
    """Prints what happened, by kind of fault.

    Args:
        outcomes: How the rounds ended.
        seconds: `Round.lateness` of the workers that have failed.
    """
    print(
        "| fault | rounds | as without a fault | why is said after, s "
        "| ended after, s |\n|---|---|---|---|---|"
    )
    for kind, each in outcomes.items():
        times = zip(*seconds[kind], strict=True) if seconds[kind] else ((), ())
        columns = [kind, len(each), each.count(AS_WITHOUT), *map(spread, times)]
        print(f"| {' | '.join(map(str, columns))} |")


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} (up to {max(values):.1f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=[*KINDS, "good"],
        default=list(KINDS),
        help="of rounds; good: all kinds of good rounds",
    )
    parser.add_argument(
        "--busy", type=int, default=0, help="busy loops beside the workers"
    )
    parser.add_argument(
        "--slow",
        type=float,
        default=22,
        help="seconds of a slow step, or a slow tracing",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30,
        help="timeout_seconds; longer than a frozen worker takes to be named",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=5,
        help="seconds to the message, besides what the fault takes",
    )
    parser.add_argument(
        "--limit", type=float, default=180, help="seconds of a round"
    )
    parser.add_argument("--outputs", type=Path, help="folder for outputs")
    options = parser.parse_args()
    if "good" in options.kinds:
        options.kinds = list(GOOD)
    return options


def work(order: str) -> None:
    """Runs as a worker, or as one device."""
    first, *rest, limit = json.loads(order)
    # It also ends if this script is killed before it kills it.
    signal.alarm(int(limit) + 5)
    if not rest:
        np.save("right", trained(first, lambda: None))
        return
    timeout_seconds, rank = rest
    train(Fault(*first), timeout_seconds, rank)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        sys.exit(main())
