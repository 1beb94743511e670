"""What is wrong with a worker, by how its server answers."""

import pytest
import tensorflow as tf

from keras_allreduce.workers import heartbeats as heartbeats_module
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.heartbeats import IS_GONE, Heartbeats

LIMIT_SECONDS = 20.0


class FakeServers:
    """The clock, and how the servers of the other workers answer."""

    def __init__(self):
        self.now, self.error, self.takes = 1000.0, None, 0.0

    def monotonic(self):
        return self.now

    def check_peer(self, task, timeout_seconds):
        self.now += self.takes
        if self.error is not None:
            raise self.error(None, None, task)


@pytest.fixture
def servers(monkeypatch):
    fake = FakeServers()
    monkeypatch.setattr(heartbeats_module, "runtime", fake)
    monkeypatch.setattr(heartbeats_module, "time", fake)
    return fake


@pytest.fixture
def heartbeats(servers):
    tasks = tuple(f"/job:worker/replica:0/task:{rank}" for rank in range(3))
    return Heartbeats(Cluster(tasks, ("a:1", "b:1", "c:1"), 0), LIMIT_SECONDS)


def test_one_that_answers_is_asked_again_after_the_interval(
    servers, heartbeats
):
    assert heartbeats.due(2.0) == []
    servers.now += 2.0
    assert heartbeats.due(2.0) == [1, 2]
    assert heartbeats.ask(1) is None
    assert heartbeats.due(2.0) == [2]
    assert heartbeats.answers(1)


def test_one_that_does_not_answer_for_the_limit_is_frozen(servers, heartbeats):
    servers.error, servers.takes = tf.errors.DeadlineExceededError, 2.0
    found = [heartbeats.ask(1) for _ in range(10)]
    assert found[:9] == [None] * 9
    assert found[9] == (
        "has not answered for 20 s: it is frozen, or the network is cut."
    )
    assert not heartbeats.answers(1)


def test_a_process_that_was_frozen_itself_blames_nobody(servers, heartbeats):
    servers.error, servers.takes = tf.errors.DeadlineExceededError, 100.0
    assert heartbeats.ask(1) is None
    servers.takes = 2.0
    assert heartbeats.ask(1) is None


def test_a_closed_port_is_asked_again_before_the_worker_is_gone(
    servers, heartbeats
):
    servers.error = tf.errors.UnavailableError
    assert heartbeats.ask(2) is None
    assert heartbeats.are_unsure
    assert heartbeats.due(2.0) == [2]
    assert heartbeats.ask(2) is None
    assert heartbeats.ask(2) == IS_GONE
    assert not heartbeats.are_unsure


def test_a_port_that_opens_again_was_never_gone(servers, heartbeats):
    servers.error = tf.errors.UnavailableError
    assert heartbeats.ask(2) is None
    servers.error = None
    assert heartbeats.ask(2) is None
    assert not heartbeats.are_unsure


def test_one_that_was_started_again_is_another(servers, heartbeats):
    servers.error = tf.errors.FailedPreconditionError
    assert "was started again" in heartbeats.ask(1)
