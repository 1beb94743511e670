"""Makes things go wrong at random times, and looks at how the workers end.

    python benchmarks/random_faults.py --faults 200

Each round starts all workers anew on loopback, forked from a process that has
imported TensorFlow, and lets one fault happen to one of them, at a time drawn
from the whole run: from the start of the processes to the last step. After a
round

- no worker still runs, and no process is left, not even a helper of a worker;
- a worker that ended well has, bit for bit and after each epoch, the weights of
  a run without a fault; one that was told to stop early has them as far as it
  came, where that was the end of an epoch;
- a worker that failed, and was not the victim, says why in its last line,
  which has the rule ("All workers must ...") and names a worker: the victim, if
  the rule is that all must stay until training ends;
- it did so within `--margin` seconds (5), plus what that line says it has
  waited for. How long its process then takes to end depends on how busy the
  machine is; the table has both.

    fault        what happens to one worker
    kill         SIGKILL
    term         SIGTERM
    freeze       SIGSTOP, and SIGCONT when the others have ended
    exception    a callback raises
    early stop   a callback stops training in the middle of an epoch
    wrong call   a callback evaluates
    weights      a callback sets a weight
    rate         a callback sets the learning rate
    garbage      random bytes are sent to its port, the whole time
    none         nothing

The exit code is 1 if a round did not end so. `--seed` repeats a run, but for
how fast the machine is; `--outputs` keeps what the workers of such a round
wrote.
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
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "harness")]

import warm_python

from keras_allreduce.launch.job import free_ports

SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "freeze": signal.SIGSTOP,
}
CALLBACKS = ["exception", "early stop", "wrong call", "weights", "rate"]
KINDS = [*SIGNALS, *CALLBACKS, "garbage", "none"]

EPOCHS, STEPS = 12, 6
RULE, STAY = "All workers must", "until training ends"
POLL_SECONDS = 0.02
AS_WITHOUT = "as without a fault"

# What a message says that its worker has waited for.
SAYS = re.compile(r"timeout_seconds=(\d+)|(?:for|after) (\d+) s\b")


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a round.

    Attributes:
        kind: One of `KINDS`.
        rank: Number of the worker to which it happens.
        part: When, as a part of the whole run.
    """

    kind: str
    rank: int
    part: float

    def __str__(self) -> str:
        return f"{self.kind}, worker {self.rank}, at {self.part:.3f}"


@dataclass(frozen=True)
class End:
    """How one worker ended.

    Attributes:
        code: Its exit code; `None` if it had to be killed.
        at: When, in seconds since the epoch.
        said: When it wrote its last line.
        output: What it wrote.
        weights: Its weights after each epoch, in hexadecimal digits, a line
            each; `None` if it failed.
        began: When it made its strategy.
    """

    code: int | None
    at: float
    said: float
    output: str
    weights: str | None
    began: float

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
        """From the fault to the last line of a worker, and to its end.

        Returns:
            Seconds, less those that the line says.
        """
        end = self.ends[rank]
        says = [
            int(each)
            for found in SAYS.findall(end.last_line)
            for each in found
            if each
        ]
        since = max(self.happened or self.began, end.began)
        since += max(says, default=0)
        return end.said - since, end.at - since


# The workers -----------------------------------------------------------------


def train(fault: Fault, timeout_seconds: float, rank: int) -> None:
    """What each worker runs, in a folder of the round."""
    import keras
    import numpy as np

    import keras_allreduce

    Path(f"began{rank}").touch()
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        timeout_seconds=timeout_seconds
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * 16, 6)).astype("float32")
    y = rng.normal(size=(STEPS * 16, 1)).astype("float32")
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    lines = []

    def note(_epoch: int, _logs: Any) -> None:
        weights = b"".join(w.tobytes() for w in model.get_weights())
        lines.append(f"{weights.hex()}\n")

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=note)]
    if rank == fault.rank:
        callbacks.append(callback_of(fault, keras, x, y))
    model.fit(
        x, y, batch_size=16, epochs=EPOCHS, verbose=0, callbacks=callbacks
    )
    Path(f"weights{rank}").write_text("".join(lines))


def callback_of(fault: Fault, keras: Any, x: Any, y: Any) -> Any:
    """A callback in which the fault happens, if it is one of `CALLBACKS`."""
    step = int(fault.part * EPOCHS * STEPS)

    class Fail(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.steps += 1
            if self.steps != step + 1 or fault.kind not in CALLBACKS:
                return
            Path("happened").touch()
            if fault.kind == "exception":
                raise ValueError("the fault")
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
        addresses = [f"127.0.0.1:{p}" for p in free_ports(options.workers)]
        began = time.time()
        workers = [
            start(fault, rank, addresses, folder, options)
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


def start(
    fault: Fault,
    rank: int,
    addresses: list[str],
    folder: Path,
    options: argparse.Namespace,
) -> warm_python.Process:
    config = {
        "cluster": {"worker": addresses},
        "task": {"type": "worker", "index": rank},
    }
    output = folder / f"output{rank}"
    output.touch()
    facts = [fault.kind, fault.rank, fault.part]
    order = [facts, options.timeout, rank, options.limit]
    return warm_python.Process(
        [str(Path(__file__).resolve()), "--worker", json.dumps(order)],
        folder=folder,
        environment={
            **os.environ,
            "TF_CONFIG": json.dumps(config),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
        },
        stdout=output,
        stderr=output,
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
    if fault.kind in SIGNALS:
        over.wait(fault.part * run_seconds)
        (folder / "happened").touch()
        workers[fault.rank].send_signal(SIGNALS[fault.kind])
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
                text_of(folder / f"weights{rank}"),
                time_of(folder / f"began{rank}") or now,
            )
            others = [r for r in range(len(workers)) if r != fault.rank]
            if fault.kind == "freeze" and set(others) <= ends.keys():
                workers[fault.rank].send_signal(signal.SIGCONT)
        time.sleep(POLL_SECONDS)
    return [ends[rank] for rank in range(len(workers))]


def text_of(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


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
    is_victim = fault.kind in ("kill", "term", "freeze", "exception")
    return [
        rank
        for rank, end in enumerate(found.ends)
        if end.code and not (is_victim and rank == fault.rank)
    ]


def is_right(weights: str | None, fault: Fault, rank: int, right: str) -> bool:
    """Whether a worker that ended well has the weights that it must have."""
    if fault.kind == "early stop" and rank == fault.rank:
        return bool(weights) and right.startswith(str(weights))
    return weights == right


def problems(
    fault: Fault, found: Round, right: str, margin_seconds: float
) -> Iterator[str]:
    """Yields what is wrong with the end of a round."""
    for rank in found.left:
        yield f"worker {rank} has left a process behind"
    for rank, end in enumerate(found.ends):
        if end.code is None:
            yield f"worker {rank} hangs"
        elif end.code == 0 and not is_right(end.weights, fault, rank, right):
            yield f"worker {rank} has wrong weights"
        elif end.code and fault.kind in ("none", "garbage"):
            yield f"worker {rank} has failed: {end.last_line}"
    for rank in survivors(fault, found):
        line, (said, ended) = found.ends[rank].last_line, found.lateness(rank)
        named = str(fault.rank) if STAY in line else r"\d"
        if RULE not in line or not re.search(rf"\bworker {named}\b", line):
            yield f"worker {rank} does not say why: {line}"
        if said > margin_seconds:
            yield (
                f"worker {rank} said why after {said:.1f} s, and ended after "
                f"{ended:.1f} s: {line}"
            )


# The command -----------------------------------------------------------------


def main() -> int:
    options = parse()
    none = Fault("none", 0, 0.0)
    # The first takes longer than all others.
    rounds = [run_round(none, 0.0, options) for _ in range(2)]
    ends = rounds[-1].ends
    right = ends[0].weights
    if right is None or any(end.weights != right for end in ends):
        print("A run without a fault must end well.", ends[0].output[-3000:])
        return 1
    run_seconds = rounds[-1].seconds
    print(f"a run takes {run_seconds:.1f} s", flush=True)
    outcomes: dict[str, list[str]] = {kind: [] for kind in options.kinds}
    seconds: dict[str, list[tuple[float, float]]] = {k: [] for k in outcomes}
    failed = 0
    # Ctrl+C, or SIGTERM, ends it after some of the rounds.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for number, fault in enumerate(faults(options), 1):
            found = run_round(fault, run_seconds, options)
            if outcome(found) == AS_WITHOUT:
                # The machine may have been busier before.
                run_seconds = min(run_seconds, found.seconds)
            wrong = list(problems(fault, found, right, options.margin))
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
    print(f"{failed} of {rounds} rounds did not end as they should")
    return 1 if failed else 0


def faults(options: argparse.Namespace) -> Iterator[Fault]:
    """Draws the faults, each kind as often as any other."""
    draw = random.Random(options.seed)
    kinds = itertools.islice(itertools.cycle(options.kinds), options.faults)
    for kind in kinds:
        yield Fault(kind, draw.randrange(options.workers), draw.random())


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
    parser.add_argument("--faults", type=int, default=20, help="rounds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="of faults"
    )
    parser.add_argument(
        "--timeout", type=float, default=20, help="timeout_seconds"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=5,
        help="seconds to the message, besides what it says",
    )
    parser.add_argument(
        "--limit", type=float, default=180, help="seconds of a round"
    )
    parser.add_argument("--outputs", type=Path, help="folder for outputs")
    return parser.parse_args()


def work(order: str) -> None:
    """Runs as a worker."""
    fault, timeout_seconds, rank, limit = json.loads(order)
    # It also ends if this script is killed before it kills it.
    signal.alarm(int(limit) + 5)
    train(Fault(*fault), timeout_seconds, rank)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        sys.exit(main())
