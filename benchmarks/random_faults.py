"""Makes things go wrong at random times, and looks at how the workers end.

    python benchmarks/random_faults.py --faults 200

Each round starts all workers anew on loopback and lets one fault happen to one
of them, at a time drawn from the whole run: from the start of the processes to
the last step. After a round

- no worker still runs: those that are left end by themselves within the limit;
- no process is left, not even a helper of a worker;
- a worker that ended well has, bit for bit, the weights of a run without a
  fault;
- a worker that failed, and was not the victim, says why in a line that begins
  with the rule ("All workers must ...").

    fault        what happens to one worker
    kill         SIGKILL
    term         SIGTERM
    freeze       SIGSTOP
    exception    a callback raises
    early stop   a callback stops training in the middle of an epoch
    wrong call   a callback evaluates
    weights      a callback sets a weight
    rate         a callback sets the learning rate
    garbage      random bytes are sent to its port, the whole time
    none         nothing

The exit code is 1 if a round did not end so. `--seed` repeats a run, but for
how fast the machine is.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "freeze": signal.SIGSTOP,
}
CALLBACKS = ["exception", "early stop", "wrong call", "weights", "rate"]
KINDS = [*SIGNALS, *CALLBACKS, "garbage", "none"]

EPOCHS, STEPS = 40, 6
TIMEOUT_SECONDS = 60
RULE = "All workers must"


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
        seconds: From the start of the round.
        output: What it wrote.
        weights: Its weights in hexadecimal digits; `None` if it failed.
    """

    code: int | None
    seconds: float
    output: str
    weights: str | None


# The workers -----------------------------------------------------------------


def train(fault: Fault, result: Path) -> None:
    """What each worker runs."""
    import keras
    import numpy as np

    import keras_allreduce

    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        timeout_seconds=TIMEOUT_SECONDS
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * 16, 6)).astype("float32")
    y = rng.normal(size=(STEPS * 16, 1)).astype("float32")
    keras.utils.set_random_seed(1)
    with strategy.scope():
        layers = [keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([6]), *layers])
        model.compile(keras.optimizers.Adam(0.01), "mse")
    callbacks = []
    if strategy.cluster_resolver.task_id == fault.rank:
        callbacks = [callback_of(fault, keras, x, y)]
    model.fit(
        x, y, batch_size=16, epochs=EPOCHS, verbose=0, callbacks=callbacks
    )
    weights = b"".join(w.tobytes() for w in model.get_weights())
    result.write_text(weights.hex())


def callback_of(fault: Fault, keras: Any, x: Any, y: Any) -> Any:
    """A callback in which the fault happens, if it is one of `CALLBACKS`."""
    step = int(fault.part * EPOCHS * STEPS)

    class Fail(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.steps += 1
            if self.steps != step + 1:
                return
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


def run_round(fault: Fault, num: int, run_seconds: float, limit: float):
    """Starts workers, makes the fault happen, and waits for all.

    Args:
        fault: The fault.
        num: Number of workers.
        run_seconds: How long a run takes.
        limit: Seconds after which a worker hangs.

    Returns:
        The `End` of each worker, and numbers of those whose processes are
        left.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        addresses = [f"127.0.0.1:{port}" for port in free_ports(num)]
        began = time.monotonic()
        workers = [start(fault, rank, addresses, folder) for rank in range(num)]
        happened = threading.Event()
        stack.callback(happened.set)
        threading.Thread(
            target=happen,
            args=[fault, workers, addresses, began, run_seconds, happened],
            daemon=True,
        ).start()
        ends = wait_for(workers, folder, fault, began, limit)
        left = [
            rank for rank, worker in enumerate(workers) if is_left(worker.pid)
        ]
    return ends, left


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(
    fault: Fault, rank: int, addresses: list[str], folder: Path
) -> subprocess.Popen:
    config = {
        "cluster": {"worker": addresses},
        "task": {"type": "worker", "index": rank},
    }
    fault_text = json.dumps([fault.kind, fault.rank, fault.part])
    with open(folder / f"output{rank}", "wb") as output:
        return subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                fault_text,
                str(folder / f"weights{rank}"),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "TF_CONFIG": json.dumps(config),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "CUDA_VISIBLE_DEVICES": "-1",
            },
        )


def happen(
    fault: Fault,
    workers: list[subprocess.Popen],
    addresses: list[str],
    began: float,
    run_seconds: float,
    happened: threading.Event,
) -> None:
    """Makes what comes from outside happen."""
    if fault.kind in SIGNALS:
        happened.wait(began + fault.part * run_seconds - time.monotonic())
        if workers[fault.rank].poll() is None:
            workers[fault.rank].send_signal(SIGNALS[fault.kind])
    port = int(addresses[fault.rank].split(":")[1])
    noise = random.Random(fault.part)
    while fault.kind == "garbage" and not happened.wait(0.05):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 1) as connection,
        ):
            connection.sendall(noise.randbytes(noise.randrange(1, 4096)))


def wait_for(
    workers: list[subprocess.Popen],
    folder: Path,
    fault: Fault,
    began: float,
    limit: float,
) -> list[End]:
    """Waits for all, for a frozen one until the others have ended."""
    frozen = [fault.rank] if fault.kind == "freeze" else []
    ends: dict[int, End] = {}
    for rank in sorted(range(len(workers)), key=lambda rank: rank in frozen):
        worker, code = workers[rank], None
        with contextlib.suppress(subprocess.TimeoutExpired):
            if rank in frozen:
                # It would go on; nobody ends it but this.
                worker.wait(0.1)
            else:
                worker.wait(max(0.1, began + limit - time.monotonic()))
            code = worker.returncode
        seconds = time.monotonic() - began
        if worker.poll() is None:
            worker.kill()
            worker.wait()
        result = folder / f"weights{rank}"
        ends[rank] = End(
            code,
            seconds,
            (folder / f"output{rank}").read_text(errors="replace"),
            result.read_text() if result.exists() else None,
        )
    return [ends[rank] for rank in range(len(workers))]


def is_left(group: int) -> bool:
    """Whether a process of a worker, such as a helper, is still there."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return True


def problems(fault: Fault, ends: list[End], left: list[int], right: str):
    """Yields what is wrong with the end of a round."""
    for rank in left:
        yield f"worker {rank} has left a process behind"
    for rank, end in enumerate(ends):
        is_victim = rank == fault.rank and fault.kind in [*SIGNALS, *CALLBACKS]
        if end.code is None and not (is_victim and fault.kind == "freeze"):
            yield f"worker {rank} hangs"
        elif end.code == 0 and end.weights != right:
            yield f"worker {rank} has wrong weights"
        elif end.code != 0 and fault.kind in ("none", "garbage"):
            yield f"worker {rank} has failed:\n{end.output[-3000:]}"
        elif end.code and not is_victim and RULE not in end.output:
            yield f"worker {rank} does not say why:\n{end.output[-3000:]}"


# The command -----------------------------------------------------------------


def main() -> int:
    arguments = parse()
    if arguments.worker:
        fault, path = arguments.worker
        train(Fault(*json.loads(fault)), Path(path))
        return 0
    draw = random.Random(arguments.seed)
    none = Fault("none", 0, 0.0)
    ends, _ = run_round(none, arguments.workers, 0.0, arguments.limit)
    right, run_seconds = ends[0].weights, max(end.seconds for end in ends)
    if right is None or any(end.weights != right for end in ends):
        print("A run without a fault must end well.", ends[0].output[-3000:])
        return 1
    print(f"a run takes {run_seconds:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {}
    failed = 0
    for number in range(arguments.faults):
        # Each kind as often as any other.
        fault = Fault(
            arguments.kinds[number % len(arguments.kinds)],
            draw.randrange(arguments.workers),
            draw.random(),
        )
        ends, left = run_round(
            fault, arguments.workers, run_seconds, arguments.limit
        )
        seconds.setdefault(fault.kind, []).append(
            max(end.seconds for end in ends)
        )
        found = list(problems(fault, ends, left, right))
        failed += bool(found)
        codes = [end.code for end in ends]
        print(f"{number + 1}: {fault}: exit codes {codes}", *found, sep="\n  ")
        sys.stdout.flush()
    for kind, each in seconds.items():
        print(
            f"{kind}: {len(each)} rounds, median {statistics.median(each):.1f}"
            f" s, longest {max(each):.1f} s"
        )
    print(f"{failed} of {arguments.faults} rounds did not end as they should")
    return 1 if failed else 0


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
        "--limit", type=float, default=180, help="seconds of a round"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
