"""The command that measures the all-reduce: what it says, never how fast."""

import json
import sys
from pathlib import Path

import mpi_jobs
import pytest
import tensorflow as tf
import warm_python
from five_devices import DEVICES

import keras_allreduce
from keras_allreduce.benchmark import __main__ as benchmark_main
from keras_allreduce.benchmark import run as benchmark_run
from keras_allreduce.benchmark.options import (
    bytes_of,
    divide,
    loops_for,
    options_of,
    parser,
    sizes_between,
    workers_in,
)
from keras_allreduce.benchmark.run import gradients_of
from keras_allreduce.benchmark.table import (
    Row,
    Setting,
    document,
    fastest,
    line,
    verdict,
)
from keras_allreduce.benchmark.timed_loop import (
    Gradient,
    Message,
    TimedLoop,
    WrongSumError,
)
from keras_allreduce.reduce import algorithms
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.reduce.transport import InProcess

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
TINY = ["--max-bytes", "16K", "--rounds", "2", "--warmup", "0", "--loops", "2"]

MODEL = """
import keras

def small():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])

def mixed():
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.Dense(2, dtype="float64"),
        ]
    )

def with_weights(weights="imagenet"):
    assert weights is None
    return small()

def not_built():
    return keras.Sequential([keras.layers.Dense(4)])

def not_a_model():
    return 3

def with_arguments(units):
    return small()
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "user_model"
    sys.modules.pop("user_model", None)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def options(*words):
    return options_of(parser().parse_args(words))


def row(algorithm, nbytes, seconds, bytes_per_pack=0, replicas=2):
    return Row(
        setting=Setting(algorithm, bytes_per_pack),
        nbytes=nbytes,
        gradients=1,
        num_packs=1,
        plan="",
        replicas=replicas,
        loops=10,
        seconds=tuple(seconds),
    )


class TestSizes:
    def test_without_options_they_go_from_4_kib_to_256_mib(self):
        assert options().sizes == (
            4096,
            16384,
            65536,
            262144,
            1048576,
            4194304,
            16777216,
            67108864,
            268435456,
        )

    def test_they_grow_by_the_factor_and_do_not_pass_the_end(self):
        assert sizes_between(3, 100, 5) == (3, 15, 75)

    @pytest.mark.parametrize(
        ("text", "nbytes"),
        [("17", 17), ("4K", 4096), ("4KiB", 4096), ("2M", 2097152)],
    )
    def test_bytes_are_read(self, text, nbytes):
        assert bytes_of(text) == nbytes

    @pytest.mark.parametrize(
        "text", ["", "K", "4k", "4KB", "-4", "1.5M", "4iB"]
    )
    def test_what_is_not_bytes_is_named(self, text):
        with pytest.raises(ValueError, match="A size is a number of bytes"):
            bytes_of(text)

    def test_a_message_is_divided_into_nearly_equal_gradients(self):
        assert divide(44, "float32", 3) == [4, 4, 3]

    def test_bytes_that_fill_no_element_are_dropped(self):
        assert divide(17, "float64", 1) == [2]

    @pytest.mark.parametrize(
        ("nbytes", "gradients", "workers", "loops"),
        [
            (4096, 1, 1, 100),
            (2**24, 1, 1, 8),
            (2**28, 1, 1, 1),
            (2**28, 161, 1, 10),
            (4096, 1, 2, 10),
            (2**28, 161, 2, 1),
        ],
    )
    def test_what_is_small_or_of_many_parts_loops_more_often(
        self, nbytes, gradients, workers, loops
    ):
        assert loops_for(nbytes, gradients, workers) == loops


class TestTable:
    def test_bandwidths_are_those_of_nccl_tests(self):
        # 8 MB in 4 ms are 2 GB/s; of 4 replicas each sends 2 * 3 / 4 of it.
        one = row("ring", 8_000_000, [0.004], replicas=4)
        assert one.algbw == pytest.approx(2.0)
        assert one.busbw == pytest.approx(3.0)

    def test_a_line_has_the_median_the_p90_and_the_bandwidths(self):
        seconds = [n / 1000 for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 100)]
        words = line(row("ring", 11_000_000, seconds, 4096)).split()
        assert words == [
            "11000000",
            "1",
            "ring",
            "4096",
            "1",
            "10",
            "5500.0",
            "9000.0",
            "2.000",
            "2.000",
        ]

    def test_the_fastest_differs_between_size_classes(self):
        rows = [
            row("ring", 4096, [0.004]),
            row("shared_memory", 4096, [0.001]),
            row("ring", 2**23, [0.001]),
            row("shared_memory", 2**23, [0.002]),
        ]
        found = {
            name: next(iter(times)) for name, times in fastest(rows).items()
        }
        assert found == {
            # 4x faster there weighs more than 2x slower here.
            "overall": Setting("shared_memory", 0),
            "up to 64 KiB": Setting("shared_memory", 0),
            "above 4 MiB": Setting("ring", 0),
        }

    def test_the_verdict_names_the_second_and_the_ratio(self):
        rows = [
            row("ring", 4096, [0.003], 1024),
            row("ring", 4096, [0.002]),
        ]
        assert verdict(rows) == [
            "# fastest overall: ring, packs of default size "
            "(1.50x as fast as ring, packs of 1024 bytes)",
            "# fastest up to 64 KiB: ring, packs of default size "
            "(1.50x as fast as ring, packs of 1024 bytes)",
        ]

    def test_the_fastest_is_one_that_a_strategy_can_select(self):
        rows = [row("MPI_Allreduce", 4096, [0.001]), row("mpi", 4096, [0.002])]
        found = fastest(rows)
        assert list(found["overall"]) == [Setting("mpi", 0)]
        assert verdict(rows)[0].startswith("# fastest overall: mpi,")

    def test_one_setting_alone_is_called_so(self):
        assert "One setting" in verdict([row("ring", 4096, [0.1])])[-1]

    def test_the_document_has_what_the_table_has(self):
        found = document({"keras": "3"}, [row("ring", 1000, [0.001, 0.003])])
        assert json.loads(json.dumps(found)) == {
            "keras": "3",
            "rows": [
                {
                    "bytes": 1000,
                    "gradients": 1,
                    "algorithm": "ring",
                    "bytes_per_pack": 0,
                    "num_packs": 1,
                    "plan": "",
                    "loops": 10,
                    "rounds": 2,
                    "median_us": 2000.0,
                    "p90_us": 3000.0,
                    "algbw_gbps": 0.0005,
                    "busbw_gbps": 0.0005,
                }
            ],
            "fastest": [
                {"sizes": "overall", "algorithm": "ring", "bytes_per_pack": 0},
                {
                    "sizes": "up to 64 KiB",
                    "algorithm": "ring",
                    "bytes_per_pack": 0,
                },
            ],
        }


class TestCluster:
    def test_processes_of_mpirun_are_counted(self):
        told = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
        assert workers_in(told) == 4

    def test_chief_and_workers_are_counted(self):
        config = {
            "cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]},
            "task": {"type": "worker", "index": 0},
        }
        assert workers_in({"TF_CONFIG": json.dumps(config)}) == 3


BAD = {
    "end below start": (
        "--min-bytes 8K --max-bytes 4K",
        "--max-bytes must not be below --min-bytes",
    ),
    "not a size": ("--max-bytes 4X", "A size is a number of bytes"),
    "no bytes": ("--min-bytes 0", "A size must be positive"),
    "factor": ("--factor 1", "--factor must be at least 2"),
    "replicas": ("--replicas 0", "--replicas must be at least 1"),
    "one replica": ("--replicas 1", "One replica has nothing to reduce"),
    "rounds": ("--rounds 0", "--rounds must be at least 1"),
    "warmup": ("--warmup -1", "--warmup must be at least 0"),
    "loops": ("--loops 0", "--loops must be at least 1"),
    "algorithm": ("--algorithm tree", "invalid choice: 'tree'"),
    "nccl without GPUs": ("--algorithm nccl", "runs between GPUs only"),
    "dtype": ("--dtype string", "invalid choice: 'string'"),
    "pack": ("--model a:b --bytes-per-pack 1M,x", "A size is a number"),
    "pack of one gradient": ("--bytes-per-pack 1M", "travels alone"),
    "more gradients than elements": (
        "--min-bytes 16 --gradients 5",
        "an element for each gradient",
    ),
    "model and sizes": ("--model a:b --max-bytes 4K", "--max-bytes is for"),
    "model without a callable": ("--model keras", "must be module:callable"),
    "module not there": ("--model no_such:x", "There is no --model no_such:x"),
    "callable not there": (
        "--model keras.applications:Nothing",
        "There is no --model keras.applications:Nothing",
    ),
    "model not callable": ("--model keras:__version__", "must be callable"),
    "abbreviated": ("--max 4K", "unrecognized arguments"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_options_end_with_code_2_and_the_rule(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark_main.main(words.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_cluster_that_is_none_ends_with_code_2(monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", "{")
    with pytest.raises(SystemExit) as error:
        benchmark_main.main([])
    assert error.value.code == 2
    assert "TF_CONFIG must be JSON" in capsys.readouterr().err


class TestModel:
    def test_its_variables_have_the_gradients(self, user_module):
        assert gradients_of(f"{user_module}:small", None) == [
            Gradient((3, 4), tf.float32),
            Gradient((4,), tf.float32),
        ]

    def test_gradients_keep_their_dtypes_unless_one_is_given(self, user_module):
        name = f"{user_module}:mixed"
        found = [gradient.dtype.name for gradient in gradients_of(name, None)]
        assert found == ["float32", "float32", "float64", "float64"]
        assert {g.dtype for g in gradients_of(name, "float16")} == {tf.float16}

    def test_no_weights_are_loaded(self, user_module):
        assert len(gradients_of(f"{user_module}:with_weights", None)) == 2

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("not_built", "must make a built keras.Model"),
            ("not_a_model", "must make a built keras.Model"),
            ("with_arguments", "must be callable without arguments"),
        ],
    )
    def test_what_makes_no_model_is_named(self, user_module, name, message):
        with pytest.raises(ValueError, match=message):
            gradients_of(f"{user_module}:{name}", None)


def printed(capsys, *words):
    assert benchmark_main.main(words) == 0
    return capsys.readouterr().out


class TestRun:
    @pytest.mark.parametrize("replicas", [2, 3])
    def test_all_algorithms_of_the_host_are_measured(self, replicas, capsys):
        out = printed(
            capsys, *TINY, "--algorithm", "all", "--replicas", str(replicas)
        )
        rows = [text.split() for text in out.splitlines() if text[0] != "#"]
        names = algorithms.runnable(DEVICES[:replicas])
        assert {"ring", "shared_memory"} <= {*names}
        assert [words[:6] for words in rows] == [
            [nbytes, "1", name, "default", "1", "2"]
            for nbytes in ("4096", "16384")
            for name in names
        ]
        assert f"# {replicas} replicas: 1 worker(s)" in out
        assert "# fastest overall: " in out
        assert "# fastest up to 64 KiB: " in out
        assert out.endswith("# Every sum was checked: all are right.\n")

    @pytest.mark.parametrize(
        "dtype",
        [
            "bfloat16",
            "int32",
            *(
                pytest.param(name, marks=pytest.mark.nightly)
                for name in ("float16", "float32", "float64", "int64")
            ),
        ],
    )
    def test_sums_are_exact_in_every_dtype(self, dtype, capsys):
        printed(
            capsys,
            *["--dtype", dtype, "--replicas", "5", "--gradients", "3"],
            *["--min-bytes", "70K", "--max-bytes", "70K"],
            *["--rounds", "1", "--algorithm", "all"],
        )

    def test_the_gradients_of_a_model_travel_in_packs(
        self, user_module, capsys
    ):
        out = printed(
            capsys,
            *["--model", f"{user_module}:mixed", "--bytes-per-pack", "0,8"],
            *["--rounds", "1", "--loops", "3", "--json"],
        )
        found = json.loads(out)
        assert found["model"] == "user_model:mixed"
        # 3x4 + 4 float32 and 4x2 + 2 float64, in a pack for each dtype.
        assert [
            (row["bytes"], row["gradients"], row["num_packs"])
            for row in found["rows"]
        ] == [(144, 4, 2), (144, 4, 4)]

    def test_one_json_document_is_all_that_is_printed(self, capsys):
        found = json.loads(printed(capsys, *TINY, "--json"))
        assert found["replicas"] == 2
        assert found["workers"] == 1
        assert found["dtype"] == "float32"
        assert found["tensorflow"] == tf.__version__
        assert found["keras_allreduce"] == keras_allreduce.__version__
        assert len(found["devices"]) == 2
        assert [row["bytes"] for row in found["rows"]] == [4096, 16384]
        for row in found["rows"]:
            assert row["algorithm"] == "shared_memory"
            assert row["plan"].startswith("batch_all_reduce: 1 all-reduces")
            assert row["rounds"] == 2
            assert 0 < row["median_us"] <= row["p90_us"]


class WrongAtOneElement(InProcess):
    """Adds 1 to one element of the last pack of one replica."""

    def __init__(self, element):
        self.element = element

    def sum_packs(self, algorithm, packs, devices):
        sums = super().sum_packs(algorithm, packs, devices)
        total = sums[-1][1]
        wrong = tf.one_hot(self.element, 77)
        sums[-1][1] = total + tf.reshape(wrong, total.shape)
        return sums


class WithoutTheLastReplica(InProcess):
    """Leaves out one replica, on all."""

    def sum_packs(self, algorithm, packs, devices):
        return super().sum_packs(
            algorithm, [[*pack[:-1], 0 * pack[-1]] for pack in packs], devices
        )


class WrongInsideTheLoop(InProcess):
    """Is right only where it is traced for the last time."""

    traced = 0

    def sum_packs(self, algorithm, packs, devices):
        sums = super().sum_packs(algorithm, packs, devices)
        self.traced += 1
        if self.traced == 1:
            sums = [[total + 1 for total in pack] for pack in sums]
        return sums


def sums_by(transport):
    """A `BatchAllReduce` that sums as `transport` does."""
    ops = BatchAllReduce()
    ops._transport = transport
    return ops


class TestWrongSums:
    def seconds(self, ops, loops=2):
        devices = keras_allreduce.host_devices(3)
        strategy = keras_allreduce.AllReduceStrategy(devices, ops)
        message = Message(strategy, [Gradient((7, 11), tf.float32)] * 2)
        number = tf.constant(3)
        values = message.make(number)
        return TimedLoop(message, strategy, 8).seconds(values, number, loops)

    def test_the_right_sum_is_taken(self):
        assert self.seconds(BatchAllReduce()) > 0

    def test_a_replica_that_is_left_out_is_seen(self):
        with pytest.raises(WrongSumError, match="elements wrong in gradient 0"):
            self.seconds(sums_by(WithoutTheLastReplica()))

    @pytest.mark.parametrize("element", [0, 40, 76])
    def test_one_wrong_element_on_one_replica_is_seen(self, element):
        message = (
            r"1 of 77 elements wrong in gradient 0 \(float32, shape \(7, 11\)\)"
            " on replica 1"
        )
        with pytest.raises(WrongSumError, match=message):
            self.seconds(sums_by(WrongAtOneElement(element)))

    def test_a_wrong_sum_before_the_last_is_seen(self):
        with pytest.raises(WrongSumError, match="in one of 4 loops"):
            self.seconds(sums_by(WrongInsideTheLoop()), loops=4)

    def test_the_command_ends_with_code_1(self, monkeypatch, capsys):
        monkeypatch.setattr(
            InProcess,
            "sum_packs",
            lambda self, algorithm, packs, _: packs,
        )
        assert benchmark_main.main([*TINY, "--json"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "wrong: shared_memory, packs of default size: The sum" in err

    def test_a_dtype_that_cannot_hold_the_sum_is_refused(self):
        class Many:
            num_replicas_in_sync = 40

        with pytest.raises(ValueError, match="bfloat16 does not hold"):
            Message(Many(), [Gradient((2,), tf.bfloat16)])


def test_the_command_runs_by_itself():
    ended = warm_python.run(
        ["-m", "keras_allreduce.benchmark", *TINY, "--replicas", "3"],
        folder=REPOSITORY,
    )
    assert ended.returncode == 0, ended.stderr
    assert (
        "# 3 replicas: 1 worker(s) with 3 x logical CPU device" in ended.stdout
    )


def test_two_workers_measure_together_and_the_chief_prints():
    ended = warm_python.run(
        [
            *["-m", "keras_allreduce.launch", "--workers", "2"],
            *["--devices-per-worker", "2", "-m", "keras_allreduce.benchmark"],
            *[*TINY, "--json", "--gradients", "2", "--bytes-per-pack", "0,2K"],
        ],
        folder=REPOSITORY,
        forks=True,
    )
    assert ended.returncode == 0, ended.stderr
    tag, text = ended.stdout.split("] ", 1)
    assert tag == "[worker 0"
    found = json.loads(text)
    assert (found["workers"], found["replicas"]) == (2, 4)
    assert [
        (row["bytes"], row["algorithm"], row["num_packs"])
        for row in found["rows"]
    ] == [
        (4096, "grpc", 1),
        (4096, "grpc", 2),
        (16384, "grpc", 1),
        (16384, "grpc", 2),
    ]
    assert "between 2 workers over gRPC" in found["rows"][0]["plan"]


@pytest.mark.nightly
@pytest.mark.usefixtures("needs_mpirun")
def test_workers_of_mpirun_measure_grpc_mpi_and_a_plain_allreduce():
    *_, document = mpi_jobs.run(
        *["-m", "keras_allreduce.benchmark", "--algorithm", "all"],
        *["--min-bytes", "4K", "--max-bytes", "4K", "--rounds", "1"],
        *["--warmup", "0", "--json"],
    )
    found = json.loads(document)
    assert (found["workers"], found["replicas"]) == (2, 2)
    assert [(row["algorithm"], row["num_packs"]) for row in found["rows"]] == [
        ("grpc", 1),
        ("mpi", 1),
        ("MPI_Allreduce", None),
    ]
    plans = [row["plan"] for row in found["rows"]]
    assert "between 2 workers over gRPC" in plans[0]
    assert "between 2 workers over MPI" in plans[1]


def test_gpus_of_workers_are_measured_by_the_name_of_nccl(monkeypatch):
    monkeypatch.setattr(benchmark_run, "workers_in", lambda: 2)
    monkeypatch.setattr(benchmark_run, "_has_gpus", lambda: True)
    monkeypatch.setattr(benchmark_run, "has_nccl", lambda: True)
    monkeypatch.setattr(
        benchmark_run, "MultiWorkerAllReduceStrategy", lambda **given: given
    )
    made = benchmark_run.strategies_for(options("--max-bytes", "1M"))
    assert made == {"nccl": {"fit_log": False}}


def test_an_algorithm_between_workers_is_refused(monkeypatch, capsys):
    task = {"type": "worker", "index": 0}
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(SystemExit):
        benchmark_main.main(["--algorithm", "ring"])
    assert "there is one algorithm" in capsys.readouterr().err


def test_replicas_and_what_the_launcher_says_must_agree(monkeypatch, capsys):
    task = {"type": "worker", "index": 0}
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    monkeypatch.setenv("KERAS_ALLREDUCE_HOST_DEVICES", "2")
    with pytest.raises(SystemExit):
        benchmark_main.main(["--replicas", "3"])
    assert "--devices-per-worker of the launcher" in capsys.readouterr().err
