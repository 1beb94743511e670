"""What the workers of workers_step_time.py are told, and what they answer.

A worker is a process that runs worker_fit.py or ddp_gloo.py with a `Job`. It
leaves its `Result`, and the weights it had after the first step, in the job's
folder.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SKIPPED_STEPS = 10
BATCH_SIZE = 64

STOCK = "MultiWorkerMirroredStrategy (mended)"
OURS = "MultiWorkerAllReduceStrategy"
OURS_BFLOAT16 = f"{OURS} bfloat16"
OURS_MPI = f"{OURS} MPI"
OURS_XLA = f"{OURS} XLA"
OTHER, OTHER_MPI = "other checkout", "other checkout MPI"
DDP = "DistributedDataParallel (gloo)"

ALONE = "no communication"
ALONE_KEPT = "no communication, freed memory kept"
ALONE_XLA = "no communication, freed memory kept XLA"
ALONE_PYTORCH = "PyTorch, no communication"

OPTIONS = {
    OURS: {},
    OURS_BFLOAT16: {"wire_dtype": "bfloat16"},
    OURS_MPI: {"transport": "mpi"},
    OURS_XLA: {},
    OTHER: {},
    OTHER_MPI: {"transport": "mpi"},
    **{
        f"{OURS} {kib} KiB": {"bytes_per_pack": kib * 1024}
        for kib in (256, 512, 1024, 2048, 4096, 25600)
    },
}
"""What MultiWorkerAllReduceStrategy is made with, by name in the tables."""

# MultiWorkerAllReduceStrategy lets malloc keep freed memory, which alone makes
# some models faster: that is no communication saved, so it is in its baseline.
BASELINES = {
    STOCK: ALONE,
    **dict.fromkeys(OPTIONS, ALONE_KEPT),
    OURS_XLA: ALONE_XLA,
    DDP: ALONE_PYTORCH,
}


@dataclass(frozen=True)
class Job:
    """What one worker does. It travels to its process as JSON.

    Attributes:
        strategy: A key or a value of `BASELINES`.
        model: Name of the model.
        devices: Number of logical CPU devices of each worker.
        steps: Number of steps up to the last that is timed.
        folder: Where the answers go.
        addresses: `"host:port"` of each worker.
        interface: Network interface that the addresses belong to.
        package: Folder that the package must come from.
        optimizer: Key of `models.OPTIMIZERS`.
        index: Which of the workers this one is.
    """

    strategy: str
    model: str
    devices: int
    steps: int
    folder: str
    addresses: list[str]
    interface: str
    package: str
    optimizer: str
    index: int = 0

    @property
    def alone(self) -> bool:
        """Whether the workers do not communicate."""
        return self.strategy in BASELINES.values()

    @property
    def all_steps(self) -> int:
        """Number of steps. Who is alone goes on after the timed ones.

        So the cores are shared until the slower worker has ended those too.
        """
        return self.steps + SKIPPED_STEPS * self.alone

    @property
    def local_batch_size(self) -> int:
        """The worker's share of the global batch."""
        num_workers = len(self.addresses)
        return (
            BATCH_SIZE * (self.index + 1) // num_workers
            - BATCH_SIZE * self.index // num_workers
        )


@dataclass(frozen=True)
class Result:
    """What a job came to on one worker.

    `all_reduce_ms` and `overlap` are `nan` for a strategy that has no clocks.
    """

    ms_per_step: float
    all_reduce_ms: float = float("nan")
    overlap: float = float("nan")


class Stopwatch:
    """Times the steps of a job after the first few.

    Args:
        job: The job.
        read_weights: Called after the first step.
        on_start: Called before the first step that is timed.
    """

    def __init__(
        self,
        job: Job,
        read_weights: Callable[[], list[np.ndarray]],
        on_start: Callable[[], object] = lambda: None,
    ):
        self._job = job
        self._read_weights = read_weights
        self._on_start = on_start
        self._ended_steps = 0

    def step_ended(self) -> None:
        """To be called at the end of every step."""
        self._ended_steps += 1
        if self._ended_steps == 1:
            self.weights = self._read_weights()
        if self._ended_steps == SKIPPED_STEPS:
            self._on_start()
            if self._job.alone:
                self._meet()
            self._start = time.perf_counter()
        if self._ended_steps == self._job.steps:
            seconds = time.perf_counter() - self._start
            self.ms_per_step = seconds * 1e3 / (self._job.steps - SKIPPED_STEPS)

    def _meet(self) -> None:
        """Waits until all workers are here. One that fails ends them all."""
        here = [
            Path(self._job.folder, f"here-{index}")
            for index in range(len(self._job.addresses))
        ]
        here[self._job.index].touch()
        while not all(path.exists() for path in here):
            time.sleep(0.001)


def told() -> Job:
    """The job of this process."""
    return Job(**json.loads(sys.argv[1]))


def answer(job: Job, result: Result, weights: list[np.ndarray]) -> None:
    np.savez(Path(job.folder, f"weights-{job.index}.npz"), *weights)
    path = Path(job.folder, f"result-{job.index}")
    path.write_text(json.dumps(asdict(result)))


def read_answer(job: Job) -> tuple[Result, list[np.ndarray]]:
    result = json.loads(Path(job.folder, f"result-{job.index}").read_text())
    with np.load(Path(job.folder, f"weights-{job.index}.npz")) as file:
        return Result(**result), [file[name] for name in file.files]
