"""What crosses between workers, and what it is made of again.

The sums of several workers are in `test_wire.py`, also in the toy format.
"""

import numpy as np
import pytest
import tensorflow as tf
from distributed_values import per_replica
from five_devices import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from toy_wire_format import NAME, ScaledFloat16

from keras_allreduce import MultiWorkerAllReduceStrategy
from keras_allreduce.reduce.observe import observe
from keras_allreduce.workers import wire_formats
from keras_allreduce.workers.between_workers import (
    BetweenWorkers,
    WorkerAllReduce,
)
from keras_allreduce.workers.collectives import CollectiveGroup, Collectives
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.wire import Wire
from keras_allreduce.workers.wire_formats import EXACT, WIRE_FORMATS

MOVED = (tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)
DTYPES = [tf.bfloat16, tf.float16, tf.float32, tf.float64, tf.int32, tf.int64]


@pytest.fixture
def toy(monkeypatch):
    """The one entry."""
    monkeypatch.setitem(WIRE_FORMATS, NAME, ScaledFloat16())
    return WIRE_FORMATS[NAME]


CARRIED = [
    (each, dtype)
    for each in [*WIRE_FORMATS.values(), ScaledFloat16()]
    for dtype in DTYPES
    if each.carries(dtype)
]
# The first dimension counts rows; those that nothing is in have no scale.
SHAPES = st.tuples(st.integers(0, 4), st.integers(1, 4)) | st.tuples(
    *[st.integers(1, 3)] * 3
)


@given(st.sampled_from(CARRIED), SHAPES, st.integers(-7, 3))
def test_every_format_decodes_what_it_has_encoded(carried, shape, least):
    wire_format, dtype = carried
    numbers = np.arange(np.prod(shape)).reshape(shape) + least
    rows = tf.constant(numbers, dtype)
    encoded = wire_format.encode(rows)
    assert encoded.dtype in MOVED
    assert len(encoded) == len(rows)
    decoded = wire_format.decode(encoded, rows)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, rows)
    # Each row by itself.
    for index in range(len(rows)):
        one = rows[index : index + 1]
        np.testing.assert_array_equal(
            wire_format.decode(encoded[index : index + 1], one), one
        )


@pytest.mark.parametrize(
    ("name", "dtype", "carried"),
    [
        ("exact", tf.int32, True),
        ("exact", tf.bfloat16, True),
        ("bfloat16", tf.float32, True),
        ("bfloat16", tf.float64, True),
        ("bfloat16", tf.float16, False),
        ("bfloat16", tf.bfloat16, False),
        ("float16", tf.bfloat16, False),
        ("float16", tf.int64, False),
        ("float16", tf.complex64, False),
    ],
)
def test_wider_floats_are_carried(name, dtype, carried):
    assert WIRE_FORMATS[name].carries(dtype) == carried


@pytest.mark.parametrize(
    ("name", "dtype", "nbytes"),
    [
        ("exact", tf.float32, 400),
        ("bfloat16", tf.float32, 200),
        ("float16", tf.float64, 100),
    ],
)
def test_the_bytes_on_the_wire_are_known(name, dtype, nbytes):
    assert WIRE_FORMATS[name].nbytes(400, dtype) == nbytes


def test_what_cannot_be_moved_crosses_bit_for_bit():
    bits = tf.bitcast(tf.range(2**16, dtype=tf.int32), tf.int16)[:, 0]
    rows = tf.bitcast(bits, tf.bfloat16)
    decoded = EXACT.decode(EXACT.encode(rows), rows)
    np.testing.assert_array_equal(tf.bitcast(decoded, tf.int16), bits)


class Gathers:
    """`HostCollectives` of a worker that gathers the rows of two others."""

    device = DEVICES[0]

    def __init__(self, *others):
        self._others = others

    def sums(self, tensor):
        return False

    def all_gather(self, tensor, purpose):
        return tf.concat([tensor, *self._others], 0)


@pytest.mark.parametrize(
    ("dtype", "large"), [(tf.bfloat16, 256), (tf.float16, 2048)], ids=str
)
def test_half_precision_of_several_workers_is_added_in_float32(dtype, large):
    # In half precision large + 1 is rounded to large.
    one = EXACT.encode(tf.ones([1, 1], dtype))
    wire = Wire(Gathers(one, one), 3)
    total = wire.all_reduce(tf.constant([large], dtype), "gradients")
    assert total.dtype == dtype
    assert float(total[0]) == large + 2


class TestANewFormat:
    def test_may_be_asked_for(self, toy):
        names = wire_formats.wire_dtypes()
        assert {"bfloat16", "float16", NAME} <= {*names}
        with pytest.raises(ValueError, match=f"one of {', '.join(names)}, or"):
            MultiWorkerAllReduceStrategy(wire_dtype="int4")

    def test_is_not_there_before(self):
        with pytest.raises(ValueError, match=f"Received: wire_dtype='{NAME}'"):
            MultiWorkerAllReduceStrategy(wire_dtype=NAME)

    def test_is_an_object_of_its_class(self):
        with pytest.raises(TypeError, match=r"subclass of `keras_allreduce.W"):
            MultiWorkerAllReduceStrategy(compression="float16")

    def test_replaces_the_argument_that_names_a_dtype(self):
        with pytest.raises(ValueError, match=f"either .*compression='{NAME}'"):
            MultiWorkerAllReduceStrategy(
                wire_dtype="float16", compression=ScaledFloat16()
            )

    def test_carries_gradients_and_is_named_in_the_plan(self, toy):
        between = Collectives(CollectiveGroup(2, DEVICES[0]), InFlight())
        transport = BetweenWorkers(Wire(between, 2, toy), between, 2)
        ops = WorkerAllReduce(transport, 2)

        @tf.function
        def step():
            value = per_replica([tf.ones([3, 4]), tf.ones([3, 4])])
            (total,) = ops.sum([value])
            return total.values

        with observe() as records:
            graph = step.get_concrete_function().graph
        (gather,) = [
            op
            for op in graph.get_operations()
            if op.type == "CollectiveGatherV2"
        ]
        assert gather.inputs[0].dtype == tf.float16
        assert gather.inputs[0].shape.as_list() == [1, 1 + 3 * 4]
        assert str(records[0].plan).endswith(
            "between 2 workers over gRPC, 0.0 KiB sent by each in a step as "
            f"{NAME}"
        )
