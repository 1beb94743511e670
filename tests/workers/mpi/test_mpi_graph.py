"""Collectives over MPI as TensorFlow sees them; a list stands in for MPI."""

import threading

import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ancestors, ops_of_type

from keras_allreduce.workers.collectives import CollectiveGroup
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.mpi.collectives import MpiCollectives
from keras_allreduce.workers.mpi.messages import Buffers

pytestmark = pytest.mark.slow


class Submitted:
    """An engine that leaves it to the test what comes back, and when."""

    def __init__(self, expected=1):
        self.calls = []
        self.all_here = threading.Barrier(2)
        self._expected = expected

    def run(self, call):
        self.calls.append(call)
        if len(self.calls) == self._expected:
            threading.Thread(target=self.all_here.wait, args=(60,)).start()


def collectives_of(engine, size=3):
    return MpiCollectives(engine, CollectiveGroup(size, DEVICES[0]), InFlight())


def received(values):
    array = Buffers().take(np.shape(values), np.dtype("float32"))
    array[...] = values
    return array


def answered(engine, step, value, answer):
    """What a step returns while another thread answers its collectives."""

    def answer_when_all_are_here():
        engine.all_here.wait(60)
        answer()

    answering = threading.Thread(target=answer_when_all_are_here)
    answering.start()
    result = step(value)
    answering.join()
    return result


def test_any_number_of_collectives_is_in_flight_without_a_thread():
    # Far more than TensorFlow has threads, and the last comes back first.
    count = 100
    engine = Submitted(count)
    collectives = collectives_of(engine)

    @tf.function
    def step(values):
        return [
            collectives.all_reduce(value, "pack")
            for value in tf.unstack(values)
        ]

    def answer():
        for call in reversed(engine.calls):
            call.deliver(received(call.own + 0.5))

    values = tf.reshape(tf.range(2.0 * count), [count, 2])
    results = answered(engine, step, values, answer)
    for index, result in enumerate(results):
        assert result.numpy().tolist() == [2 * index + 0.5, 2 * index + 1.5]


def test_what_is_sent_and_received_is_not_copied():
    engine = Submitted()
    collectives = collectives_of(engine)
    memory = received([1.0, 2.0])

    sent = tf.constant([3.0, 4.0])
    result = answered(
        engine,
        tf.function(lambda value: collectives.all_reduce(value, "pack")),
        sent,
        lambda: engine.calls[0].deliver(memory),
    )
    assert address(result) == memory.ctypes.data
    assert engine.calls[0].own.ctypes.data == address(sent)


def test_what_the_caller_receives_is_not_copied():
    memory = received([1.0, 2.0])

    class AtOnce:
        def run(self, call):
            return memory

    collectives = collectives_of(AtOnce())
    step = tf.function(lambda value: collectives.all_reduce(value, "pack"))
    result = step(tf.constant([3.0, 4.0]))
    assert result.numpy().tolist() == [1.0, 2.0]
    assert address(result) == memory.ctypes.data


def address(tensor):
    return np.from_dlpack(tensor).ctypes.data


def test_a_name_is_that_of_the_place_in_the_graph_and_not_of_the_graph():
    engine = Submitted(2)
    collectives = collectives_of(engine)
    names = [names_in_a_graph(engine, collectives) for _ in range(2)]
    assert len(names[0]) == 2
    assert names[0] == names[1]


def names_in_a_graph(engine, collectives):
    """Traces two collectives, runs them, and returns their names."""
    engine.calls.clear()

    @tf.function
    def step(value):
        first = collectives.all_reduce(value, "pack")
        return first + collectives.all_reduce(value, "pack")

    def answer():
        for call in engine.calls:
            call.deliver(received(call.own))

    answered(engine, step, tf.constant([1.0, 2.0]), answer)
    return {call.name for call in engine.calls}


def test_no_collective_over_mpi_waits_for_another():
    collectives = collectives_of(Submitted())

    @tf.function
    def step(values):
        tf.print("here")
        return [
            collectives.all_reduce(value, "pack")
            for value in tf.unstack(values, 4)
        ]

    spec = tf.TensorSpec([4, 2])
    graph = step.get_concrete_function(spec).graph
    runs = ops_of_type(graph, "PyFunc")
    choices = ops_of_type(graph, "If")
    assert len(runs) == len(choices) == 4
    # What waits for a result is in the branch that needs it.
    assert not ops_of_type(graph, "QueueDequeueV2")
    functions = {
        function.signature.name: {node.op for node in function.node_def}
        for function in graph.as_graph_def().library.function
    }
    for op in choices:
        assert (
            "QueueDequeueV2" not in functions[op.get_attr("then_branch").name]
        )
        assert "QueueDequeueV2" in functions[op.get_attr("else_branch").name]
    for ops in (runs, choices):
        for op in ops:
            assert not ancestors(op) & set(ops)
            assert "PrintV2" not in {each.type for each in ancestors(op)}


def test_memory_is_used_again_when_the_last_tensor_of_it_is_gone():
    buffers = Buffers()
    first = buffers.take((3,), np.dtype("float32"))
    address = first.ctypes.data
    assert address % 64 == 0
    tensor = tf.experimental.dlpack.from_dlpack(first.__dlpack__())
    del first
    assert buffers.take((3,), np.dtype("int32")).ctypes.data != address
    del tensor
    # Of as many bytes, whatever the dtype.
    again = buffers.take((6,), np.dtype("uint16"))
    assert again.ctypes.data == address


def test_an_array_without_elements_has_memory_too():
    assert Buffers().take((0, 4), np.dtype("float32")).shape == (0, 4)
