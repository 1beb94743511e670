"""Rank and size as launchers tell them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_allreduce.workers.ranks import (
    first_host,
    hint_of,
    placement_of,
)

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-77@1",
}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[9-10]",
    "SLURM_PROCID": "2",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "3"}
BY_HAND = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}


def no_domain():
    return "host"


def pod():
    return "train-1.train.default.svc.cluster.local"


FOUND = {
    "Open MPI on one host": (OPEN_MPI, 3, 4, "127.0.0.1"),
    "Open MPI on several": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        3,
        4,
        "",
    ),
    # srun starts one daemon of mpirun per node, whose variables are there too.
    "Open MPI in a Slurm job": (
        {**SLURM, **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        3,
        4,
        "n9",
    ),
    "MPICH on one host": (MPICH, 1, 2, "127.0.0.1"),
    "Slurm": (SLURM, 2, 4, "n9"),
    "Slurm on one node": (
        {**SLURM, "SLURM_STEP_NUM_NODES": "1"},
        2,
        4,
        "127.0.0.1",
    ),
    "leader by hand": ({**SLURM, "MASTER_ADDR": "n10"}, 2, 4, "n10"),
    "all by hand": (BY_HAND, 0, 2, "a"),
    "by hand without a leader": ({"RANK": "1", "WORLD_SIZE": "2"}, 1, 2, ""),
    "by hand on one host": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        1,
        2,
        "127.0.0.1",
    ),
    "by hand on several hosts": (
        {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        1,
        4,
        "",
    ),
}


@pytest.mark.parametrize(
    ("environment", "rank", "size", "leader"), FOUND.values(), ids=FOUND
)
def test_a_launcher_says_who_this_is(environment, rank, size, leader):
    found = placement_of(environment, no_domain)
    assert (found.rank, found.size, found.leader) == (rank, size, leader)


@given(st.integers(2, 64), st.integers(-2, 66))
def test_a_rank_is_one_of_its_size(size, rank):
    environment = {**BY_HAND, "RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
    if 0 <= rank < size:
        found = placement_of(environment, no_domain)
        assert (found.rank, found.size) == (rank, size)
    else:
        with pytest.raises(ValueError, match="Received"):
            placement_of(environment, no_domain)


def test_the_first_pod_of_a_kubernetes_job_leads():
    found = placement_of(KUBERNETES, pod)
    assert (found.rank, found.size) == (1, 3)
    assert found.leader == "train-0.train.default.svc.cluster.local"


def test_a_pod_without_a_service_has_no_leader():
    assert placement_of(KUBERNETES, lambda: "train-1").leader == ""


ALONE = {
    "nothing": {},
    "one process": {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    "a batch script": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "one task in a step": {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    "a job without a size": {"JOB_COMPLETION_INDEX": "1"},
    "a rank without a size": {"RANK": "0"},
    "one by hand": {"RANK": "0", "WORLD_SIZE": "1"},
}


@pytest.mark.parametrize("environment", ALONE.values(), ids=ALONE)
def test_a_process_that_was_started_alone_has_no_place(environment):
    assert placement_of(environment, no_domain) is None


def test_what_may_mean_several_processes_is_a_hint():
    assert "SLURM_NTASKS=4" in hint_of(ALONE["a batch script"])
    assert "WORLD_SIZE" in hint_of(ALONE["a job without a size"])
    assert hint_of({"SLURM_NTASKS": "1"}) is None
    assert hint_of({}) is None


def test_ranks_of_one_job_look_at_the_same_ports_and_other_jobs_elsewhere():
    one = placement_of(SLURM)
    same = placement_of({**SLURM, "SLURM_PROCID": "0"})
    other = placement_of({**SLURM, "SLURM_STEP_ID": "1"})
    assert one.ports == same.ports
    assert not set(one.ports) & set(other.ports)
    # Linux hands out the ports from 32768 on by itself.
    assert all(20000 <= port < 32768 for port in one.ports)


def test_master_port_is_the_only_port():
    assert placement_of({**SLURM, "MASTER_PORT": "5000"}).ports == (5000,)


BAD = {
    "rank a word": ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "x"}, "_RANK='x'"),
    "rank missing": ({"PMI_SIZE": "2"}, "PMI_RANK=''"),
    "rank too high": ({**MPICH, "PMI_RANK": "2"}, "rank 2 of 2"),
    "rank negative": ({**BY_HAND, "RANK": "-1"}, "RANK='-1'"),
    "port": ({**SLURM, "MASTER_PORT": "65536"}, "MASTER_PORT='65536'"),
}


@pytest.mark.parametrize(("environment", "message"), BAD.values(), ids=BAD)
def test_a_variable_that_makes_no_sense_is_named(environment, message):
    with pytest.raises(ValueError, match="Received") as caught:
        placement_of(environment, no_domain)
    assert message in str(caught.value)


HOSTS = {
    "one": ("n1", "n1"),
    "several": ("n10,n9", "n10"),
    "range": ("n[09-11]", "n09"),
    "ranges": ("n[9,12-14],m5", "n9"),
    "range and more": ("r[1-2]n[03-04]-ib,x", "r1n03-ib"),
    "empty": ("", ""),
}


@pytest.mark.parametrize(("node_list", "host"), HOSTS.values(), ids=HOSTS)
def test_the_first_node_of_slurms_list(node_list, host):
    assert first_host(node_list) == host


@given(
    st.sampled_from(["n", "node-", "r1n"]),
    st.integers(0, 99),
    st.integers(0, 99),
    st.booleans(),
)
def test_the_first_node_of_a_range(prefix, first, length, is_padded):
    begin, end = (
        f"{n:0{3 if is_padded else 1}}" for n in (first, first + length)
    )
    assert first_host(f"{prefix}[{begin}-{end}],other") == f"{prefix}{begin}"
