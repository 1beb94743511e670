"""How the launcher deals out the GPUs of a machine, without one."""

import os

import pytest

from keras_allreduce.launch.gpus import deal, visible_gpus
from keras_allreduce.launch.options import environments, parse


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Pretends that the machine has a number of GPUs."""

    def pretend(count):
        listed = [f"echo 'GPU {i}: H100 (UUID: GPU-{i})'" for i in range(count)]
        program = tmp_path / "nvidia-smi"
        program.write_text("\n".join(["#!/bin/sh", *listed, ""]))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    return pretend


def gpus_of_workers(arguments, script):
    options = parse([*arguments, str(script)])
    addresses = [f"127.0.0.1:{index}" for index in range(options.num_workers)]
    return [
        environment.get("CUDA_VISIBLE_DEVICES")
        for environment in environments(options, addresses).values()
    ]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.touch()
    return path


DEALS = {
    "one each": (2, "--workers 2", ["0", "1"]),
    "an equal share": (4, "--workers 2", ["0,1", "2,3"]),
    "none is left over for a third": (5, "--workers 2", ["0,1", "2,3"]),
    "as many as asked for": (
        8,
        "--workers 2 --devices-per-worker 3",
        ["0,1,2", "3,4,5"],
    ),
    "one worker has what the environment says": (4, "--workers 1", [None]),
    "a machine without": (0, "--workers 2", [None, None]),
    "several hosts": (4, "--hosts a:1,b:1 --host-index 0", [None]),
}


@pytest.mark.parametrize(
    ("count", "arguments", "dealt"), DEALS.values(), ids=DEALS.keys()
)
def test_workers_share_the_gpus(machine, script, count, arguments, dealt):
    machine(count)
    assert gpus_of_workers(arguments.split(), script) == dealt


def test_host_devices_are_for_a_machine_without_gpus(machine, script):
    arguments = ["--workers", "2", "--devices-per-worker", "2", str(script)]
    for count, told in [(0, True), (4, False)]:
        machine(count)
        added = environments(parse(arguments), ["a:1", "a:2"])[0]
        assert ("KERAS_ALLREDUCE_HOST_DEVICES" in added) is told


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("2,3", ("2", "3")),
        (" GPU-1 ", ("GPU-1",)),
        ("1,-1,2", ("1",)),
        ("-1", ()),
        ("", ()),
    ],
)
def test_only_those_that_cuda_shows(machine, visible, gpus):
    machine(4)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == gpus


def test_a_machine_without_the_driver_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == ()
    # It may be set everywhere.
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == ()


def test_too_few_are_an_error(machine, script, capsys):
    machine(3)
    with pytest.raises(SystemExit, match="2"):
        parse(["--workers", "2", "--devices-per-worker", "2", str(script)])
    assert (
        "2 workers with 2 each need 4 GPUs. Received: "
        "CUDA_VISIBLE_DEVICES=0,1,2. CUDA_VISIBLE_DEVICES=-1 trains on "
        "logical CPU devices."
    ) in capsys.readouterr().err


def test_workers_are_on_one_gpu_only_if_nccl_is_told_so():
    with pytest.raises(ValueError, match="3 workers with 1 each need 3 GPUs"):
        deal(["0", "1"], 3, None)
    assert deal(["0", "1"], 3, None, shared=True) == (("0",), ("1",), ("0",))
