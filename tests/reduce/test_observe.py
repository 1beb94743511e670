"""The plan line, and who is told of what is reduced."""

import dataclasses
import logging

import pytest
import tensorflow as tf
from distributed_values import per_replica
from graph_walk import ops_of_type

from keras_allreduce import BatchAllReduce
from keras_allreduce.reduce.buckets import Bucket
from keras_allreduce.reduce.observe import observe
from keras_allreduce.reduce.plan import ReducePlan

SUM = tf.distribute.ReduceOp.SUM

PLAN = ReducePlan(
    num_gradients=8,
    num_sparse=0,
    algorithm="ring",
    reason="",
    num_packs=2,
    nbytes=3 * 2**20,
    dtypes=("float32",),
    num_replicas=4,
)

LINES = {
    "usual": (
        {},
        "batch_all_reduce: 8 all-reduces with algorithm = ring, num_packs = 2 "
        "(3.0 MiB float32), num_replicas = 4",
    ),
    "small": (
        {"nbytes": 2**10},
        "batch_all_reduce: 8 all-reduces with algorithm = ring, num_packs = 2 "
        "(1.0 KiB float32), num_replicas = 4",
    ),
    "unknown size": (
        {"nbytes": None},
        "batch_all_reduce: 8 all-reduces with algorithm = ring, num_packs = 2 "
        "(size not known float32), num_replicas = 4",
    ),
    "several dtypes": (
        {"dtypes": ("float16", "float32")},
        "batch_all_reduce: 8 all-reduces with algorithm = ring, num_packs = 2 "
        "(3.0 MiB float16+float32), num_replicas = 4",
    ),
    "sparse": (
        {"num_sparse": 1},
        "batch_all_reduce: 8 all-reduces with algorithm = ring, num_packs = 2 "
        "(3.0 MiB float32), num_replicas = 4, 1 sparse gathered",
    ),
    "a reason": (
        {"reason": "this TensorFlow is built without NCCL"},
        "batch_all_reduce: 8 all-reduces with algorithm = ring, num_packs = 2 "
        "(3.0 MiB float32), num_replicas = 4; this TensorFlow is built "
        "without NCCL",
    ),
}


@pytest.mark.parametrize(("changes", "line"), LINES.values(), ids=LINES.keys())
def test_the_plan_begins_with_the_words_of_tensorflow(changes, line):
    assert str(dataclasses.replace(PLAN, **changes)) == line


@pytest.fixture
def reduce():
    """Sums [5] and [3] of float32 and [2] of float16, two in a pack."""
    values = [
        per_replica([tf.ones([size], dtype)] * 2)
        for size, dtype in (
            (5, tf.float32),
            (2, tf.float16),
            (3, tf.float32),
        )
    ]

    def reduce():
        pairs = [(value, value) for value in values]
        results = BatchAllReduce("shared_memory", 64).batch_reduce(SUM, pairs)
        return [result.values for result in results]

    return reduce


EXPECTED = ReducePlan(
    num_gradients=3,
    num_sparse=0,
    algorithm="shared_memory",
    reason="",
    num_packs=2,
    nbytes=36,
    dtypes=("float16", "float32"),
    num_replicas=2,
    packs=(
        Bucket(indices=(1,), dtype="float16", nbytes=4),
        Bucket(indices=(2, 0), dtype="float32", nbytes=32),
    ),
)


def test_an_observer_is_told_what_is_sent(reduce):
    with observe() as records:
        reduce()
    (record,) = records
    assert record.plan == EXPECTED
    assert record.started <= record.ended
    sizes = [
        [[gradient.shape[0] for gradient in g] for g in pack.gradients]
        for pack in record.packs
    ]
    assert sizes == [[[2], [2]], [[3, 5], [3, 5]]]
    assert [len(pack.results) for pack in record.packs] == [2, 2]


def test_packs_name_the_gradients_that_come_after_a_sparse_one():
    rows = tf.IndexedSlices(
        tf.ones([1, 2]), tf.constant([0]), tf.constant([4, 2])
    )
    values = [
        per_replica([rows] * 2),
        *map(per_replica, [[tf.ones([5])] * 2] * 2),
    ]
    with observe() as records:
        BatchAllReduce("shared_memory", 64).batch_reduce(
            SUM, [(value, value) for value in values]
        )
    packs = [pack.indices for pack in records[0].plan.packs]
    assert packs == [(2, 1), (0,)]


def test_an_observer_of_a_graph_sees_the_tensors_of_each_pack(reduce):
    with observe() as records:
        graph = tf.function(reduce).get_concrete_function().graph
    (record,) = records
    assert record.plan == EXPECTED
    sums = set(ops_of_type(graph, "AddN"))
    for pack in record.packs:
        # Handed out from the sum by reference.
        assert {r.op.inputs[0].op for r in pack.results} <= sums


def test_the_innermost_observer_is_told(reduce):
    with observe() as outer:
        with observe() as inner:
            reduce()
        assert (len(outer), len(inner)) == (0, 1)
        reduce()
    assert (len(outer), len(inner)) == (1, 1)


@pytest.fixture
def logged():
    """Lines that TensorFlow's log gets."""
    lines = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = Collect()
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_without_an_observer_what_is_traced_is_logged(reduce, logged):
    traced = tf.function(reduce)
    traced()
    traced()
    plans = [line for line in logged if "batch_all_reduce" in line]
    assert plans == [str(EXPECTED)]


def test_what_runs_eagerly_is_not_logged(reduce, logged):
    reduce()
    assert not [line for line in logged if "batch_all_reduce" in line]


def test_with_an_observer_nothing_is_logged(reduce, logged):
    with observe():
        tf.function(reduce)()
    assert not [line for line in logged if "batch_all_reduce" in line]
