"""Packs in the graph: how many, and that none waits for another's gradients."""

import sys

import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ancestors, ops_of_type
from small_model import summed_in_turn

from keras_allreduce import BatchAllReduce
from keras_allreduce.compat import distribute
from keras_allreduce.workers.between_workers import (
    BetweenWorkers,
    WorkerAllReduce,
)
from keras_allreduce.workers.collectives import CollectiveGroup, Collectives
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.wire import Wire

pytestmark = pytest.mark.slow

SUM = tf.distribute.ReduceOp.SUM


def traced(op, shapes, options=None, replicas=2):
    """The graph in which `op` reduces gradients of these shapes.

    Returns:
        `placeholders[variable][replica]` and the reduced values.
    """
    with tf.Graph().as_default():
        placeholders = []
        for shape in shapes:
            placeholders.append([])
            for device in DEVICES[:replicas]:
                with tf.device(device):
                    placeholders[-1].append(
                        tf.compat.v1.placeholder(tf.float32, shape)
                    )
        values = [distribute.PerReplica(tuple(p)) for p in placeholders]
        results = op.batch_reduce(SUM, [(v, v) for v in values], options)
    return placeholders, results


def sums_in(results):
    graph = results[0].values[0].graph
    return ops_of_type(graph, "AddN")


PACK_SIZES = {
    "one gradient": (8, 5),
    "two gradients": (16, 3),
    "all": (2**20, 1),
}


@pytest.mark.parametrize(
    ("bytes_per_pack", "num_packs"), PACK_SIZES.values(), ids=PACK_SIZES.keys()
)
def test_bytes_per_pack_is_the_capacity_of_a_pack(bytes_per_pack, num_packs):
    op = BatchAllReduce("shared_memory", bytes_per_pack)
    _, results = traced(op, [[2]] * 5)
    assert len(sums_in(results)) == num_packs


@pytest.mark.parametrize(
    ("bytes_per_pack", "num_packs"), PACK_SIZES.values(), ids=PACK_SIZES.keys()
)
def test_the_caller_may_choose_bytes_per_pack(bytes_per_pack, num_packs):
    op = BatchAllReduce("shared_memory", 16)
    options = tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=bytes_per_pack
    )
    _, results = traced(op, [[2]] * 5, options)
    assert len(sums_in(results)) == num_packs


def test_a_caller_who_does_not_choose_gets_the_size_of_the_op():
    options = tf.distribute.experimental.CommunicationOptions()
    op = BatchAllReduce("shared_memory", 16)
    _, results = traced(op, [[2]] * 5, options)
    assert len(sums_in(results)) == 3


@pytest.mark.parametrize("algorithm", ["ring", "shared_memory"])
def test_no_result_waits_for_a_gradient_outside_its_pack(algorithm):
    # 8 bytes each: two in a pack, from the last. [9] travels alone.
    shapes = [[2], [2], [9], [2], [2], [2]]
    packs = [{5, 4}, {3, 1}, {2}, {0}]
    placeholders, results = traced(
        BatchAllReduce(algorithm, 16), shapes, replicas=3
    )
    variable_of = {
        tensor.op: variable
        for variable, tensors in enumerate(placeholders)
        for tensor in tensors
    }
    for variable, result in enumerate(results):
        (pack,) = [pack for pack in packs if variable in pack]
        for tensor in result.values:
            waits_for = ancestors(tensor.op) & variable_of.keys()
            assert {variable_of[op] for op in waits_for} == pack
            assert len(waits_for) == 3 * len(pack)


def test_a_pack_leaves_while_backprop_goes_on():
    strategy = tf.distribute.MirroredStrategy(
        DEVICES[:2], cross_device_ops=BatchAllReduce("shared_memory", 1)
    )
    with strategy.scope():
        kernels = [tf.Variable(tf.ones([2, 2])) for _ in range(3)]

    @tf.function
    def run():
        sums = strategy.run(lambda: summed_in_turn(kernels))
        return strategy.experimental_local_results(sums[0])

    sums = ops_of_type(run.get_concrete_function().graph, "AddN")
    products = [
        sum(op.type == "MatMul" for op in ancestors(total)) for total in sums
    ]
    # On each replica: 3 of the forward pass, one for each layer above that the
    # gradient comes down through, and one for the kernel itself.
    assert products == [2 * 4, 2 * 5, 2 * 6]


def test_no_collective_between_workers_waits_for_another():
    between = Collectives(CollectiveGroup(3, DEVICES[0]), InFlight())
    transport = BetweenWorkers(Wire(between, 3), between, 3)
    op = WorkerAllReduce(transport, 3, bytes_per_pack=1)

    @tf.function
    def step():
        # Small, so exchanged, and large, so round the ring; and what else
        # TensorFlow would put into its chain.
        gradients = [tf.ones([size]) for size in (10, 10, 5000, 5000)]
        tf.print("here", output_stream=sys.stderr)
        values = [distribute.PerReplica((each,)) for each in gradients]
        totals = op.batch_reduce(SUM, [(v, v) for v in values])
        return [total.values for total in totals]

    graph = step.get_concrete_function().graph
    collectives = [
        op for op in graph.get_operations() if op.type.startswith("Collective")
    ]
    assert len(collectives) == 4
    for collective in collectives:
        waits_for = {op.type for op in ancestors(collective)}
        assert "PrintV2" not in waits_for
        assert not ancestors(collective) & set(collectives)
