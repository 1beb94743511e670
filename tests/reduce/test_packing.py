"""`unpack(pack(x)) == x`, whatever x is."""

import numpy as np
import pytest
import tensorflow as tf
from distributed_values import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from keras_allreduce.reduce.packing import pack, unpack

# Scalars, empty tensors, and dimensions of 1 among others.
SHAPES = st.lists(
    st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6
)


def values(shapes, dtype):
    count = 0
    tensors = []
    for shape in shapes:
        size = int(np.prod(shape))
        numbers = np.arange(count, count + size).reshape(shape)
        tensors.append(tf.cast(tf.constant(numbers), dtype))
        count += size
    return tensors


def assert_same(got, expected):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@given(SHAPES, st.sampled_from(DTYPES))
def test_unpack_is_the_inverse_of_pack(shapes, dtype):
    gradients = values(shapes, dtype)
    assert_same(unpack(pack(gradients), gradients), gradients)


@pytest.mark.parametrize(
    "dtype", [tf.bfloat16, tf.float32, tf.complex64], ids=lambda d: d.name
)
@pytest.mark.parametrize(
    "specs",
    [[[None], [2, None]], [[None, 3], [2], []], [None, [None]]],
    ids=["some dimensions", "with known ones", "rank"],
)
def test_shapes_unknown_while_tracing_are_restored(specs, dtype):
    signature = [tf.TensorSpec(spec, dtype) for spec in specs]

    @tf.function(input_signature=[signature])
    def there_and_back(gradients):
        restored = unpack(pack(gradients), gradients)
        for ours, theirs in zip(restored, gradients, strict=True):
            assert str(ours.shape) == str(theirs.shape)
        return restored

    for size in (0, 1, 4):
        shapes = [
            [size if length is None else length for length in spec]
            for spec in ([None] if spec is None else spec for spec in specs)
        ]
        gradients = values(shapes, dtype)
        assert_same(there_and_back(gradients), gradients)


def test_a_pack_is_the_gradients_one_after_another():
    packed = pack([tf.constant([[1, 2], [3, 4]]), tf.constant(5)])
    assert packed.numpy().tolist() == [1, 2, 3, 4, 5]


def test_a_lone_gradient_is_not_copied():
    gradient = tf.ones([2, 3])
    packed = pack([gradient])
    assert packed is gradient
    assert unpack(packed, [gradient])[0] is gradient


def test_a_pack_may_come_back_in_another_dtype():
    gradients = [tf.constant([1, 2]), tf.constant(4)]
    halves = unpack(pack(gradients) / 2, gradients)
    assert [half.numpy().tolist() for half in halves] == [[0.5, 1.0], 2.0]
