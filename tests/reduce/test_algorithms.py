"""The registry: what a new algorithm takes, and what each one has."""

import numpy as np
import pytest
import tensorflow as tf
from distributed_values import local, per_replica
from five_devices import DEVICES
from test_pack_sizes import DOCUMENT, table_of

from keras_allreduce import AllReduceStrategy, BatchAllReduce
from keras_allreduce.benchmark import options
from keras_allreduce.devices import on_each
from keras_allreduce.reduce import algorithms, pack_sizes
from keras_allreduce.reduce.algorithm import Algorithm
from keras_allreduce.reduce.observe import observe
from keras_allreduce.reduce.pack_sizes import PackSize

SUM = tf.distribute.ReduceOp.SUM


# The new file: every replica adds up everything by itself.


def all_reduce(packs, devices):
    return [
        on_each(devices, lambda pack=pack: tf.add_n(pack)) for pack in packs
    ]


def refuses(devices):
    return "" if len(devices) < 4 else "runs on up to 3 devices"


TOY = Algorithm(
    "everywhere", all_reduce, takes=tf.float32.__eq__, refuses=refuses
)


@pytest.fixture
def toy(monkeypatch):
    """The two lines."""
    monkeypatch.setitem(algorithms.ALGORITHMS, "everywhere", TOY)
    monkeypatch.setitem(pack_sizes.DEFAULTS, "everywhere", PackSize(16))


@pytest.mark.usefixtures("toy")
class TestANewAlgorithm:
    def test_sums_in_packs_of_its_size(self):
        values = [per_replica([tf.ones([2]), tf.ones([2])]) for _ in range(5)]
        with observe() as records:
            sums = BatchAllReduce("everywhere").batch_reduce(
                SUM, [(value, value) for value in values]
            )
        for total in sums:
            for replica in local(total):
                np.testing.assert_array_equal(replica, [2, 2])
        plan = records[0].plan
        assert (plan.algorithm, plan.num_packs) == ("everywhere", 3)

    def test_leaves_dtypes_that_it_does_not_take_to_shared_memory(self):
        value = per_replica([tf.constant([1, 2]), tf.constant([3, 4])])
        total = BatchAllReduce("everywhere").reduce(SUM, value, value)
        assert [part.numpy().tolist() for part in local(total)] == [[4, 6]] * 2

    def test_refuses_devices_by_its_own_rule(self):
        with pytest.raises(
            ValueError,
            match=r"algorithm='everywhere' runs on up to 3 devices\. "
            r"Received: devices=.*cpu:3.*Use algorithm='auto'",
        ):
            BatchAllReduce("everywhere").choose(DEVICES[:4])
        assert "everywhere" in algorithms.runnable(DEVICES[:3])
        assert "everywhere" not in algorithms.runnable(DEVICES[:4])

    def test_trains(self):
        strategy = AllReduceStrategy(DEVICES[:2], algorithm="everywhere")
        with strategy.scope():
            variable = tf.Variable([0.0])

        def step():
            context = tf.distribute.get_replica_context()
            rank = tf.cast(context.replica_id_in_sync_group, tf.float32)
            (total,) = context.all_reduce(SUM, [tf.stack([rank + 1])])
            variable.assign_add(total)

        tf.function(strategy.run)(step)
        assert local(variable)[0].numpy().tolist() == [3]

    def test_may_be_asked_for(self):
        assert "everywhere" in pack_sizes.algorithm_names()
        with pytest.raises(ValueError, match="shared_memory, everywhere"):
            BatchAllReduce("elsewhere")


def test_every_algorithm_has_the_size_of_its_packs():
    assert set(algorithms.ALGORITHMS) == set(pack_sizes.DEFAULTS)


def test_every_algorithm_is_called_by_its_name():
    for name, algorithm in algorithms.ALGORITHMS.items():
        assert algorithm.name == name


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
def test_the_documents_tell_the_cost_of_every_algorithm(algorithm):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"\n| `{algorithm}` | " in text.split("\n## ")[0]
    assert f"\n## {algorithm}\n" in text
    which = "".join(row[0] for row in table_of("Algorithm selection"))
    assert f"`{algorithm}`" in which


def test_the_benchmark_takes_every_algorithm():
    assert set(options.ALGORITHMS) == {*algorithms.ALGORITHMS, "auto", "all"}


def test_no_packs_make_no_ops():
    for algorithm in algorithms.ALGORITHMS.values():
        assert algorithm.all_reduce([], DEVICES[:2]) == []
