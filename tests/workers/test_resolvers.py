"""Workers that a launcher has started find each other without TF_CONFIG."""

import os

import pytest
import tensorflow as tf
import workers
from absl import logging

import keras_allreduce
from keras_allreduce.workers.resolvers import resolver_for

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "Open MPI": {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{rank}",
    },
    "Slurm": {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": "{job}",
        "SLURM_PROCID": "{rank}",
    },
    "by hand": {
        "RANK": "{rank}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "{port}",
    },
}


@pytest.fixture(autouse=True)
def _started_alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_", "TF_CONFIG")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            name, marks=[] if name == "by hand" else pytest.mark.nightly
        )
        for name in LAUNCHERS
    ],
)
def test_processes_of_a_launcher_train_as_workers(launcher):
    values = {"job": os.getpid(), "port": workers.free_ports(1)[0]}
    environment = [
        {"TF_CONFIG": ""}
        | {
            name: text.format(rank=rank, **values)
            for name, text in LAUNCHERS[launcher].items()
        }
        for rank in range(2)
    ]
    assert workers.results("describe", environment=environment) == [
        {"resolver": "LauncherClusterResolver", "index": rank, "workers": 2}
        for rank in range(2)
    ]


def test_a_launcher_that_does_not_say_where_rank_0_is_gets_an_error(
    monkeypatch,
):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(ValueError, match=r"OMPI_COMM_WORLD_SIZE=2") as caught:
        resolver_for(None, 1.0)
    assert "Set MASTER_ADDR" in str(caught.value)
    assert "TF_CONFIG='{}'" in str(caught.value)


def test_rank_and_size_without_an_address_are_an_error_not_n_models(
    monkeypatch,
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE=2, and no MAST"):
        resolver_for(None, 1.0)


def test_an_empty_tf_config_trains_alone_under_a_launcher(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("TF_CONFIG", "{}")
    assert not resolver_for(None, 1.0).cluster_spec().as_dict()


def test_tf_config_overrides_what_a_launcher_says(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv(
        "TF_CONFIG",
        '{"cluster": {"worker": ["a:1", "b:1"]}, '
        '"task": {"type": "worker", "index": 0}}',
    )
    spec = resolver_for(None, 1.0).cluster_spec().as_dict()
    assert spec == {"worker": ["a:1", "b:1"]}


def test_a_batch_script_that_srun_did_not_start_is_warned(monkeypatch):
    warnings = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *words: warnings.append(text % words)
    )
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert resolver_for(None, 1.0) is None
    assert len(warnings) == 1
    assert "trains alone" in warnings[0]
    assert "SLURM_NTASKS=4" in warnings[0]


def test_without_a_launcher_nothing_is_said(monkeypatch):
    monkeypatch.setattr(logging, "warning", None)
    assert resolver_for(None, 1.0) is None


def test_the_resolver_by_itself_needs_a_launcher():
    with pytest.raises(ValueError, match="started several processes"):
        keras_allreduce.LauncherClusterResolver()


EVALUATORS = {
    "not in the cluster, as TFJob has it": '{"worker": ["a:1", "b:1"]}',
    "in the cluster": '{"worker": ["a:1", "b:1"], "evaluator": ["c:1"]}',
}


@pytest.mark.parametrize("cluster", EVALUATORS.values(), ids=EVALUATORS)
def test_an_evaluator_has_nobody_to_wait_for(cluster, monkeypatch):
    monkeypatch.setenv(
        "TF_CONFIG",
        f'{{"cluster": {cluster}, '
        '"task": {"type": "evaluator", "index": 0}, "environment": "cloud"}',
    )
    for given in (
        None,
        tf.distribute.cluster_resolver.TFConfigClusterResolver(),
    ):
        resolver = resolver_for(given, 1.0)
        assert resolver.task_type == "evaluator"
        assert resolver.task_id == 0
        assert not resolver.cluster_spec().as_dict()
        strategy = keras_allreduce.MultiWorkerAllReduceStrategy(given)
        assert strategy.extended.num_workers == 1
        assert strategy.cluster_resolver.task_type == "evaluator"


def test_another_resolver_is_taken_as_it_is():
    given = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": ["a:1", "b:1"]}),
        task_type="worker",
        task_id=1,
    )
    assert resolver_for(given, 1.0) is given
