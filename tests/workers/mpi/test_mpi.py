"""Workers that `mpirun` starts train as one device does, and fail as one.

The same sums and failures as in `test_multi_worker.py`,
`test_wire.py` and `test_worker_failures.py`, over MPI, and the programs
of the table that are marked for it. Where `mpirun` ends the
job before a worker has noticed, it says which rank failed itself.
"""

import signal
import sys
from pathlib import Path

import mpi_jobs
import numpy as np
import pytest
import test_multi_worker
import test_wire
import warm_python
import workers
from deadlines import wait_until
from test_worker_failures import EITHER

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("needs_mpirun")]

# Where the subject is what mpirun does with a process, it is its own child.
PYTHON = sys.executable

EXAMPLE = Path(__file__).parents[3] / "examples" / "two_workers.py"


# Training -----------------------------------------------------------------


@pytest.fixture(scope="module")
def over_mpi(request):
    """Results of each of two workers, by case."""
    return test_multi_worker.of_cases(mpi_jobs.results, "cases", request)


@pytest.mark.parametrize("name", test_multi_worker.cells_on("mpi"))
def test_workers_train_as_one_device_does(name, over_mpi):
    test_multi_worker.agree(name, over_mpi)


DIFFERENT = {
    "other_activation": "`activation` of layer 'first'",
    "other_batch_size": "batch size: worker 0 (",
    "statistics_of_a_custom_loop": "After a custom training loop",
}


@pytest.mark.nightly
def test_other_models_and_data_are_found_over_mpi_too():
    shuffled = "py_dataset_that_shuffles_itself"
    both = mpi_jobs.results("drift_cases", [*DIFFERENT, shuffled])
    for found in both:
        for name, part in DIFFERENT.items():
            assert found[name]["error"].startswith("WorkersDifferError"), name
            assert part in found[name]["error"]
        np.testing.assert_allclose(found[shuffled]["used"], 1.0, atol=1e-5)


@pytest.mark.parametrize("name", ["batch_normalization"])
def test_workers_have_the_same_moving_statistics(name, over_mpi):
    test_multi_worker.agree_on_statistics(name, over_mpi)


@pytest.mark.nightly
def test_backprop_does_not_wait_for_the_other_workers():
    test_multi_worker.check_what_backprop_waits_for(
        mpi_jobs.results("what_backprop_waits_for")
    )


@pytest.mark.nightly
def test_all_workers_are_told_whom_they_wait_for():
    first, other = mpi_jobs.results("fit_with_a_late_worker")
    assert first == other
    assert first["last_worker"] == [1, 1]


def test_mpi_tells_the_host_of_rank_0_where_nothing_else_does():
    first, other = mpi_jobs.results(
        "fit_where_nothing_says_which_host_is_the_first"
    )
    assert "error" not in first, first["error"]
    assert first == other


def test_the_example_runs_under_mpirun_and_says_so():
    lines = mpi_jobs.run(str(EXAMPLE))
    assert any("between 2 workers over MPI, 0.3 MiB" in line for line in lines)
    first, other = (line for line in lines if line.startswith("weights:"))
    assert first == other


# Sums ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=[3], ids=["3 workers"])
def of_all(request):
    """The parts of all workers, and what each worker has got."""
    return test_wire.parts_and_results(mpi_jobs.results, request.param)


class TestEverySum(test_wire.TestEverySum):
    """Those of `test_wire.py`, with the fixture of this file."""


@pytest.mark.parametrize(
    "size", [2, pytest.param(3, marks=pytest.mark.nightly)]
)
def test_collectives_run_in_any_order(size):
    results = mpi_jobs.results("run_collectives_of_mpi", num_workers=size)
    parts = [np.arange(4.0) + rank for rank in range(size)]
    rows = [[rank, rank] for rank in range(size) for _ in range(rank)]
    for rank, result in enumerate(results):
        expected = {
            "all_reduce": ("float64", np.sum(parts, axis=0)),
            "all_gather": ("float16", np.concatenate(parts)),
            "all_to_all": ("float64", np.stack(parts) + 10 * rank),
            "all_gather_rows": ("int64", np.reshape(rows, [-1, 2])),
        }
        if size == 2:
            expected["swap"] = ("int32", 1 - rank)
        assert {
            kind: (each["dtype"], each["values"])
            for kind, each in result.items()
        } == {
            kind: (dtype, np.asarray(values).tolist())
            for kind, (dtype, values) in expected.items()
        }


# Failures -----------------------------------------------------------------


def ends(function, *arguments, **options):
    """Exit code and output of a job that has to end by itself, all of it."""
    options = {"python": warm_python.executable()} | options
    with mpi_jobs.running(function, *arguments, **options) as job:
        code = job.wait()
        assert code is not None, job.output
        all_gone(job)
        return code, job.output


def all_gone(job):
    """Waits until all processes of a job, whose `mpirun` has ended, have."""
    wait_until(
        lambda: not any(rank.is_there for rank in job.ranks),
        lambda: job.output,
    )


def test_a_killed_worker_ends_all_and_is_named_by_mpirun():
    code, output = ends("fit_and_signal", "SIGKILL", 1, 600, python=PYTHON)
    assert code != 0
    assert "rank 1" in output
    assert "signal 9" in output


@pytest.mark.nightly
@EITHER
def test_a_frozen_worker_ends_all_in_an_error(index):
    code, output = ends("fit_and_signal", "SIGSTOP", index, 600)
    assert code != 0
    stay = f"{test_multi_worker.STAY} worker {index} ("
    assert "UnavailableError" in output
    tag = "[keras_allreduce:WorkerLostError]"
    assert f"aborted by: {tag} {stay}" in output
    assert f"keras_allreduce: {stay}" in output
    assert "it is frozen" in output


@pytest.mark.nightly
def test_a_worker_that_raises_ends_all():
    code, output = ends("fit_and_raise", 1)
    assert code != 0
    assert "KeyError: 'of the script'" in output


@pytest.mark.nightly
def test_a_worker_that_falls_behind_ends_all_after_the_timeout():
    code, output = ends("fit_and_fall_behind", 5)
    assert code != 0
    assert "All workers must take part in every step within" in output


def test_a_worker_that_leaves_before_the_others_is_named():
    code, output = ends("fit_and_leave", 1)
    assert code != 0
    assert "worker 1 (127.0.0.1:" in output
    assert "has ended its script" in output


@pytest.mark.nightly
@EITHER
def test_a_worker_that_never_makes_a_strategy_is_named(index):
    code, output = ends("start_without", index, 3)
    assert code != 0
    assert f"Never reached: rank {index}" in output


@pytest.mark.parametrize(
    "name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.nightly)]
)
def test_a_signal_to_mpirun_ends_all(name):
    python = PYTHON if name == "SIGINT" else warm_python.executable()
    with mpi_jobs.running("fit_until_ended", 600, python=python) as job:
        job.wait_for("an epoch has ended", 0)
        job.process.send_signal(getattr(signal, name))
        assert job.wait() not in (0, None), job.output
        all_gone(job)


def test_mpi4py_without_an_mpi_is_one_clear_error():
    code, output = ends(
        "fit_until_ended",
        60,
        environment=2 * [{"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}],
    )
    assert code != 0
    assert "WorkerStartError: mpi4py must find an MPI library." in output
    assert 'or pass `transport="grpc"`' in output


@pytest.mark.nightly
def test_another_mpi_than_that_of_mpirun_is_one_clear_error():
    # Each is alone in the world of MPI, as no mpirun has started it.
    told = [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(rank)}
        for rank in range(2)
    ]
    with workers.running("fit_until_ended", 60, environment=told) as pair:
        for worker in pair:
            assert worker.wait() not in (0, None), worker.output
            assert "MPI must connect all 2 workers." in worker.output
            assert "a world of 1 from Open MPI" in worker.output
            assert "OMPI_COMM_WORLD_SIZE=2" in worker.output
