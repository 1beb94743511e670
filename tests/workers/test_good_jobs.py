"""A good job goes on, however slow, old or busy its machines and links are."""

import os
import signal
import time

import mpi_jobs
import namespaces
import pytest
import ray_jobs
import workers
from deadlines import PATIENCE_SECONDS

pytestmark = pytest.mark.slow

FAST, SLOW = ("1gbit", "1gbit"), ("20mbit", "20mbit")
LINKS = {
    "one of three": [FAST, SLOW, FAST],
    "up slower than down": [FAST, ("20mbit", "1gbit")],
    "down slower than up": [("1gbit", "20mbit"), FAST],
}


@pytest.fixture(
    params=[
        pytest.param(workers, id="gRPC"),
        pytest.param(mpi_jobs, id="MPI", marks=pytest.mark.nightly),
        pytest.param(ray_jobs, id="Ray", marks=pytest.mark.nightly),
    ]
)
def jobs(request):
    """The module that starts workers: by hand over gRPC, by mpirun, by Ray."""
    if request.param is not workers and request.param.missing():
        pytest.skip(request.param.missing())
    return request.param


@pytest.mark.nightly
@pytest.mark.parametrize("name", LINKS)
def test_a_slow_link_ends_nobody(name, jobs):
    if namespaces.missing():
        pytest.skip(namespaces.missing())
    if jobs is ray_jobs:
        pytest.skip("Ray is started on one machine here.")
    rates = LINKS[name]
    with namespaces.network(len(rates), rate=rates) as network:
        first, *others = jobs.results(
            "fit_large_gradients",
            12000,
            2,
            num_workers=len(rates),
            network=network,
        )
    assert all(each == first for each in others)


def test_workers_with_other_numbers_of_threads_take_the_chiefs_weights(jobs):
    threads = [{"TF_NUM_INTRAOP_THREADS": number} for number in ("1", "8")]
    chief, other = jobs.results("fit_clipped", 4, environment=threads)
    assert chief == other


def test_strategies_take_turns_in_any_order(jobs):
    chief, other = jobs.results("use_two_strategies")
    assert chief == other
    # Two more epochs of the first two, and two models from the start.
    assert len(chief) == 4


def test_a_proxy_is_not_asked_for_the_workers(jobs):
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "elsewhere"}
    results = jobs.results("fit_epochs", 1, environment=[proxy, proxy])
    assert results == [True, True]


@pytest.mark.nightly
def test_a_job_that_is_suspended_as_a_whole_goes_on(jobs):
    with jobs.running("fit_epochs", 60) as pair:
        while not all("has ended" in worker.output for worker in pair):
            codes = [worker.process.poll() for worker in pair]
            assert codes == [None, None], [worker.output for worker in pair]
            time.sleep(0.05)
        # What has started them, too.
        pids = [pid for each in pair for pid in (each.process.pid, each.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        # Longer than a worker that does not answer may take.
        time.sleep(2 * PATIENCE_SECONDS)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert [worker.wait() for worker in pair] == [0, 0], [
            worker.output[-3000:] for worker in pair
        ]
