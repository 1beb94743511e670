"""The ring: its schedule as drawn, and who sends to whom."""

import itertools
import re

import pytest
import tensorflow as tf

from keras_allreduce.reduce import ring


def test_four_ranks_send_what_is_drawn():
    assert ring.schedule(4) == [
        [0, 1, 2, 3],
        [3, 0, 1, 2],
        [2, 3, 0, 1],
        [1, 2, 3, 0],
        [0, 1, 2, 3],
        [3, 0, 1, 2],
    ]


def test_the_picture_in_the_docstring_is_the_schedule():
    drawn = re.findall(r"step \d +((?:\d +){3}\d)\n", ring.__doc__)
    assert [[int(n) for n in row.split()] for row in drawn] == ring.schedule(4)


@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_every_rank_sends_every_chunk_but_one_in_each_half(num_ranks):
    steps = ring.schedule(num_ranks)
    halves = steps[: num_ranks - 1], steps[num_ranks - 1 :]
    for half in halves:
        assert len(half) == num_ranks - 1
        for rank in range(num_ranks):
            assert len({step[rank] for step in half}) == num_ranks - 1
    for step in steps:
        assert sorted(step) == list(range(num_ranks))


@pytest.mark.parametrize("num_ranks", range(2, 6))
def test_a_rank_passes_on_the_chunk_it_has_just_received(num_ranks):
    steps = ring.schedule(num_ranks)
    for earlier, later in itertools.pairwise(steps):
        for rank in range(num_ranks):
            assert later[(rank + 1) % num_ranks] == earlier[rank]


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (0, [0, 0, 0]),
        (1, [1, 0, 0]),
        (2, [1, 1, 0]),
        (3, [1, 1, 1]),
        (7, [3, 2, 2]),
        (13, [5, 4, 4]),
    ],
)
def test_chunks_differ_by_one_at_most(size, sizes):
    assert ring.chunk_sizes(size, 3) == sizes


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_rank_sends_to_the_next_one_only(num_ranks):
    devices = [f"/device:CPU:{rank}" for rank in range(num_ranks)]
    with tf.Graph().as_default() as graph:
        pack = []
        for device in devices:
            with tf.device(device):
                pack.append(tf.compat.v1.placeholder(tf.float32, [13]))
        ring.all_reduce([pack], devices)

    sent = dict.fromkeys(range(num_ranks), 0)
    for operation in graph.get_operations():
        receiver = devices.index(operation.device)
        for tensor in operation.inputs:
            sender = devices.index(tensor.op.device)
            if sender != receiver:
                assert receiver == (sender + 1) % num_ranks
                sent[sender] += 1
    assert sent == dict.fromkeys(range(num_ranks), 2 * (num_ranks - 1))
