"""Which transport is chosen, and which MPI is refused; no MPI is started."""

import os
import sys
from types import SimpleNamespace

import pytest
from absl import logging

import keras_allreduce
from keras_allreduce.workers.errors import WorkerStartError
from keras_allreduce.workers.mpi import library, start

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1"}
PMIX = {"PMIX_RANK": "1", "SLURM_PROCID": "1"}
SLURM_ALONE = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning, formatted."""
    found = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: found.append(text % values)
    )
    return found


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(library, "is_installed", lambda: True)


@pytest.mark.usefixtures("installed")
class TestTheTransport:
    @pytest.mark.parametrize(
        ("told", "chosen"),
        [
            (OPEN_MPI, "mpi"),
            (MPICH, "mpi"),
            (PMIX, "mpi"),
            (SLURM_ALONE, "grpc"),
            ({}, "grpc"),
        ],
        ids=["Open MPI", "MPICH", "srun --mpi=pmix", "srun", "by hand"],
    )
    def test_is_mpi_where_mpi_has_started_the_process(self, told, chosen):
        assert start.choose_transport("auto", told) == chosen

    @pytest.mark.parametrize("asked", ["grpc", "mpi"])
    @pytest.mark.parametrize("told", [OPEN_MPI, {}], ids=["mpirun", "by hand"])
    def test_is_the_one_that_is_asked_for(self, asked, told):
        assert start.choose_transport(asked, told) == asked

    def test_is_one_of_three(self):
        with pytest.raises(ValueError, match="one of auto, grpc, mpi"):
            keras_allreduce.MultiWorkerAllReduceStrategy(transport="gloo")


def test_without_mpi4py_it_is_grpc_and_a_warning_says_so(monkeypatch, warnings):
    monkeypatch.setattr(library, "is_installed", lambda: False)
    assert start.choose_transport("auto", OPEN_MPI) == "grpc"
    (warning,) = warnings
    assert "mpi4py is not installed" in warning
    assert "`pip install mpi4py`" in warning


def test_mpi_without_mpi4py_is_an_error_if_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(library, "is_installed", lambda: False)
    with pytest.raises(WorkerStartError, match="needs mpi4py") as error:
        library.load()
    assert 'transport="grpc"' in str(error.value)


def mpi(size=2, level=3):
    """A stand-in for `mpi4py.MPI`."""
    return SimpleNamespace(
        COMM_WORLD=SimpleNamespace(size=size),
        THREAD_SERIALIZED=2,
        Query_thread=lambda: level,
        Get_library_version=lambda: "Some MPI v1.2, built by somebody",
    )


def test_a_world_of_another_size_is_an_error_that_names_the_library():
    library.check_world(mpi(), 2, OPEN_MPI)
    with pytest.raises(WorkerStartError) as error:
        library.check_world(mpi(size=1), 2, OPEN_MPI)
    assert str(error.value).startswith(
        "MPI must connect all 2 workers. Received: a world of 1 from Some MPI "
        "v1.2, in a process that was started with OMPI_COMM_WORLD_SIZE=2."
    )


def test_an_mpi_without_threads_is_an_error(monkeypatch):
    monkeypatch.setattr(library, "is_installed", lambda: True)
    monkeypatch.setitem(
        sys.modules, "mpi4py", SimpleNamespace(MPI=mpi(level=1))
    )
    # As if the script had started it.
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi(level=1))
    with pytest.raises(WorkerStartError, match="MPI_THREAD_SERIALIZED"):
        library.load()


@pytest.mark.parametrize(
    ("cores", "mine", "sharing", "warns"),
    [
        (64, 1, "1", True),
        (64, 64, "1", False),
        (64, 16, "4", False),
        (64, 8, "4", True),
        (2, 1, "2", False),
        (2, 2, "4", False),
    ],
)
def test_a_process_bound_to_few_cores_is_warned(
    monkeypatch, warnings, cores, mine, sharing, warns
):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda pid: set(range(mine)), raising=False
    )
    start.warn_of_binding({"OMPI_COMM_WORLD_LOCAL_SIZE": sharing})
    assert bool(warnings) == warns
    if warns:
        assert f"on {mine} of {cores} cores" in warnings[0]
        assert "--bind-to none" in warnings[0]


@pytest.mark.parametrize(
    ("ranks_here", "address"),
    [(2, "127.0.0.1"), (1, "")],
    ids=["one host", "two of one name"],
)
def test_rank_0_is_on_loopback_for_its_own_host_only(ranks_here, address):
    here = SimpleNamespace(Get_size=lambda: ranks_here, Free=lambda: None)
    comm = SimpleNamespace(
        Get_size=lambda: 2,
        Split_type=lambda kind: here,
        allgather=lambda name: ["localhost", "localhost"],
        bcast=lambda value, root: value,
    )
    mpi = SimpleNamespace(COMM_WORLD=comm, COMM_TYPE_SHARED="shared")
    assert library.address_of_rank_0(mpi) == address
