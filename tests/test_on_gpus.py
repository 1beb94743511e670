"""What runs on two GPUs, or on the halves of one; skipped without.

NCCL takes the halves of one GPU only if told to, which versions from 2.30 on
can be:

    NCCL_MULTI_RANK_GPU_ENABLE=1 pytest tests/test_on_gpus.py
"""

import functools
import os

import keras
import numpy as np
import programs
import pytest
import tensorflow as tf
import workers
from deadlines import wait_until
from distributed_values import REAL_DTYPES
from five_devices import GPUS

from keras_allreduce import AllReduceStrategy, BatchAllReduce
from keras_allreduce.compat import distribute

pytestmark = pytest.mark.slow

if not GPUS:
    pytest.skip("needs a GPU", allow_module_level=True)

NUM_PHYSICAL = len(tf.config.list_physical_devices("GPU"))
NCCL_RUNS = (
    NUM_PHYSICAL > 1 or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
)
needs_nccl = pytest.mark.skipif(
    not NCCL_RUNS, reason="needs two GPUs or NCCL_MULTI_RANK_GPU_ENABLE=1"
)
ALGORITHMS = [
    "shared_memory",
    "ring",
    pytest.param("nccl", marks=needs_nccl),
]

SUM = tf.distribute.ReduceOp.SUM

# Tests on logical CPU devices say what these are.
NOT_ON_GPUS = {
    "synchronized_batch_normalization_of_one_sample",
    "worker_that_runs_out_of_batches",
}
ON_WORKERS = [
    name for name in programs.programs_on("workers") if name not in NOT_ON_GPUS
]
NAMES = dict.fromkeys([*ON_WORKERS, *programs.programs_on("threads")])


def agree(got, expected):
    """Asserts that what a program came to is what it is on one GPU."""
    keras.tree.assert_same_structure(got, expected)
    for (path, value), wanted in zip(
        keras.tree.flatten_with_path(got),
        keras.tree.flatten(expected),
        strict=True,
    ):
        np.testing.assert_allclose(
            value, wanted, rtol=2e-5, atol=2e-6, err_msg=str(path)
        )


@functools.cache
def on_one_gpu(name):
    return programs.run(name)[0]


@pytest.fixture(autouse=True)
def _without_xla(monkeypatch):
    """Without a strategy Keras compiles with XLA, which rounds otherwise."""
    # Keras compares the methods of a model with those of this class.
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    stock = owner.compile

    def compile_model(self, *args, **kwargs):
        return stock(self, *args, **{"jit_compile": False} | kwargs)

    monkeypatch.setattr(owner, "compile", compile_model)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
class TestOneProcess:
    @pytest.mark.parametrize("name", NAMES)
    def test_two_gpus_train_as_one_does(self, algorithm, name):
        strategy = AllReduceStrategy(GPUS, algorithm=algorithm)
        got, _ = programs.run(name, strategy)
        agree(got, on_one_gpu(name))

    @pytest.mark.parametrize("in_graph", [True, False], ids=["graph", "eager"])
    @pytest.mark.parametrize("dtype", REAL_DTYPES)
    def test_each_gpu_gets_the_sums(self, algorithm, dtype, in_graph):
        # Packs of two values each, so that launches have to follow in order.
        ops = BatchAllReduce(algorithm, bytes_per_pack=10 * dtype.size)
        strategy = AllReduceStrategy(GPUS, cross_device_ops=ops)

        def replica():
            context = tf.distribute.get_replica_context()
            number = tf.cast(context.replica_id_in_sync_group + 1, dtype)
            values = [tf.range(5) + index for index in range(7)]
            values = [tf.cast(value, dtype) * number for value in values]
            return context.all_reduce(SUM, values)

        step = tf.function(strategy.run) if in_graph else strategy.run
        for index, total in enumerate(step(replica)):
            parts = strategy.experimental_local_results(total)
            for part, gpu in zip(parts, GPUS, strict=True):
                wanted = (np.arange(5) + index) * 3
                assert np.array_equal(tf.cast(part, tf.float64), wanted)
                # What a function returns is on the first GPU, and whole
                # numbers of 32 bits are on the host.
                if dtype != tf.int32 and not in_graph:
                    assert part.device.lower().endswith(gpu[1:])

    def test_both_gpus_hold_the_same_rows(self, algorithm):
        strategy = AllReduceStrategy(GPUS, algorithm=algorithm)
        rng = np.random.default_rng(0)
        with strategy.scope():
            layers = [keras.layers.Embedding(5, 64), keras.layers.Dense(1)]
            model = keras.Sequential([keras.Input([40]), *layers])
            model.compile("adam", "mse")
        words = rng.integers(0, 5, [64, 40])
        model.fit(words, rng.normal(size=[64, 40, 1]), epochs=3, verbose=0)
        for variable in model.trainable_variables:
            one, other = (part.numpy() for part in variable.value.values)
            assert np.array_equal(one, other), variable.path

    def test_both_gpus_hold_the_same_bits(self, algorithm):
        strategy = AllReduceStrategy(GPUS, algorithm=algorithm)
        rng = np.random.default_rng(0)
        images = rng.normal(size=(50, 16, 16, 3)).astype("float32")
        with strategy.scope():
            model = keras.Sequential(
                [
                    keras.layers.Conv2D(8, 3, activation="relu"),
                    keras.layers.MaxPooling2D(),
                    keras.layers.BatchNormalization(),
                    keras.layers.Flatten(),
                    keras.layers.Dense(10),
                ]
            )
            model.compile("adam", "mse", metrics=["mae"])
        history = model.fit(
            images,
            rng.normal(size=(50, 10)),
            batch_size=16,
            epochs=3,
            verbose=0,
        ).history
        assert history["loss"][-1] < history["loss"][0]
        for variable in model.trainable_variables:
            one, other = (part.numpy() for part in variable.value.values)
            assert np.array_equal(one, other), variable.path

    def test_the_cost_is_measured(self, algorithm):
        strategy = AllReduceStrategy(GPUS, algorithm=algorithm)
        with strategy.scope():
            layers = [keras.layers.Dense(2000) for _ in range(4)]
            model = keras.Sequential(layers)
            model.compile("sgd", "mse")
        data = np.ones([64, 2000], "float32")
        model.fit(data, data, batch_size=32, epochs=10, verbose=0)
        stats = strategy.all_reduce_stats()
        assert stats.num_replicas == 2
        assert stats.nbytes == 4 * 2000 * 2001 * 4
        assert 0 < stats.exposed_ms <= stats.all_reduce_ms
        # No memory moves 10 TB/s.
        assert 0 < stats.all_reduce_gbps < 10_000

    def test_mixed_precision(self, algorithm):
        data = np.ones([16, 8], "float32")

        def weights(strategy):
            keras.utils.set_random_seed(3)
            with strategy.scope():
                layers = [
                    keras.layers.Dense(8, "tanh", dtype="mixed_float16")
                    for _ in range(3)
                ]
                model = keras.Sequential([keras.Input([8]), *layers])
                sgd = keras.optimizers.SGD(0.1)
                model.compile(keras.optimizers.LossScaleOptimizer(sgd), "mse")
            model.fit(data, data, batch_size=8, epochs=3, verbose=0)
            return model.get_weights()

        got = weights(AllReduceStrategy(GPUS, algorithm=algorithm))
        wanted = weights(tf.distribute.get_strategy())
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3)


def test_the_default_is_nccl_where_gpus_are_real():
    ops = AllReduceStrategy(GPUS).extended._cross_device_ops
    virtual = "NCCL does not work between virtual GPUs"
    expected = ("nccl", "") if NUM_PHYSICAL > 1 else ("shared_memory", virtual)
    assert ops.choose(GPUS) == expected


def test_this_tensorflow_has_nccl():
    assert distribute.has_nccl()


# Two workers with a GPU each, or with one that they share.
ON_GPUS = [
    {
        "CUDA_VISIBLE_DEVICES": str(index % max(NUM_PHYSICAL, 1)),
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    for index in range(2)
]


@pytest.fixture(scope="module")
def on_workers(request):
    """Results of each of two workers with a GPU, by case."""
    return workers.results(
        "cases", workers.selected(request), environment=ON_GPUS
    )


@needs_nccl
@pytest.mark.parametrize("name", ON_WORKERS)
def test_workers_with_a_gpu_each_train_as_one_does(name, on_workers):
    first, other = [result[name] for result in on_workers]
    assert "error" not in first, first["error"]
    assert other.get("weights") == first.get("weights")
    agree(first, on_one_gpu(name))


LOST = "All workers must stay until training ends. Received: worker"


@needs_nccl
class TestFailuresOfWorkers:
    @pytest.mark.parametrize("index", [0, 1], ids=["chief", "other"])
    def test_a_killed_worker_ends_the_other_in_an_error(self, index):
        code, output = workers.end_of_the_other("SIGKILL", index, ON_GPUS)
        assert code not in (0, None), output
        assert f"{LOST} {index} (127.0.0.1:" in output.splitlines()[-1]

    def test_a_frozen_worker_ends_the_other_in_an_error(self):
        code, output = workers.end_of_the_other("SIGSTOP", 1, ON_GPUS)
        assert code not in (0, None), output
        assert f"{LOST} 1 (127.0.0.1:" in output
        assert "it is frozen" in output.splitlines()[-1]

    def test_a_gpu_without_memory_ends_both_in_an_error(self):
        with workers.running(
            "fit_and_run_out_of_memory", 1, environment=ON_GPUS
        ) as (chief, other):
            wait_until(
                lambda: (
                    "is out of memory" in chief.output
                    or chief.process.poll() is not None
                )
            )
            code, output = workers.end_of(chief, "worker 1 without memory")
            assert code not in (0, None), output
            assert other.wait() == 1, other.output
            assert "OOM when allocating tensor" in other.output
        assert f"{LOST} 1 (127.0.0.1:" in output.splitlines()[-1]
