"""Workers that Ray Train starts, for the tests; none outlives its test.

Each calls a function of `worker_script.py`, as those of `workers.py` do, and
`running` and `results` are called as those are. This file is also the script
that starts Ray.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mpi_jobs
from deadlines import DEADLINE_SECONDS


def missing():
    """What the tests of Ray need and is not there; empty: nothing."""
    if importlib.util.find_spec("ray") is None:
        return 'Ray is not installed: pip install "ray[train]"'
    return ""


@contextlib.contextmanager
def running(
    function,
    *arguments,
    deadline_seconds=DEADLINE_SECONDS,
    num_workers=2,
    environment=None,
):
    """Starts workers that call a function of `worker_script.py`.

    Args:
        function: Name of the function.
        *arguments: What it is called with; goes through JSON.
        deadline_seconds: When processes that are still there are killed.
        num_workers: Number of workers.
        environment: Variables of each worker, besides those of this process.

    Yields:
        List of `mpi_jobs.Rank`. At the end of the block all are gone.
    """
    without = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    added = environment or num_workers * [{}]
    with tempfile.TemporaryDirectory() as name:
        for index in range(num_workers):
            Path(name, str(index)).mkdir()
        order = {"folder": name, "call": [function, *arguments], "added": added}
        with open(Path(name, "driver"), "wb") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(order)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **without,
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                    "CUDA_VISIBLE_DEVICES": "-1",
                },
            )
        end = time.monotonic() + deadline_seconds
        ranks = [
            mpi_jobs.Rank(index, Path(name, str(index)), process, end)
            for index in range(num_workers)
        ]
        try:
            yield ranks
        finally:
            for rank in ranks:
                if rank.is_there:
                    os.kill(rank.pid, signal.SIGKILL)
            # Ends the processes of Ray, too.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


def results(function, *arguments, **options):
    """What the function returns on each worker; see `running`.

    Raises:
        RuntimeError: If a worker fails or is too slow, with its output.
    """
    with running(function, *arguments, **options) as ranks:
        code = ranks[0].wait()
        if code != 0:
            driver = ranks[0].folder.parent / "driver"
            outputs = [driver.read_text(errors="replace")[-6000:]]
            outputs += [rank.output[-6000:] for rank in ranks]
            raise RuntimeError("\n--- ".join([f"Exit code {code}", *outputs]))
        return [rank.result for rank in ranks]


def train(order):
    """Calls the function, on every worker."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    os.environ.update(order["added"][rank])
    # Ray sets it, for tf_keras.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    folder = Path(order["folder"], str(rank))
    (folder / "pid").write_text(str(os.getpid()))
    with (
        open(folder / "output", "w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        import worker_script

        function, *arguments = order["call"]
        result = getattr(worker_script, function)(*arguments)
    (folder / "result").write_text(json.dumps(result))


def main():
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    order = json.loads(sys.argv[1])
    num_workers = len(order["added"])
    ray.init(num_cpus=num_workers + 1, include_dashboard=False)
    TensorflowTrainer(
        train,
        train_loop_config=order,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=False),
        run_config=RunConfig(storage_path=order["folder"]),
    ).fit()


if __name__ == "__main__":
    main()
