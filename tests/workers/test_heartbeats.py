"""What is wrong with a worker, by how its server answers."""

import socket
from dataclasses import replace

import pytest
import tensorflow as tf
from deadlines import wait_until

from keras_allreduce.workers import heartbeats as heartbeats_module
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import WorkerLostError
from keras_allreduce.workers.heartbeats import (
    REFUSALS,
    Answer,
    HeartbeatProbe,
    Heartbeats,
    resolve,
)
from keras_allreduce.workers.timing import TIMING

LIMIT_SECONDS = 20.0
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class FakeServers:
    """The clock, and how the servers of the other workers answer."""

    def __init__(self):
        self.now, self.answer, self.is_another = 1000.0, Answer.YES, False
        self.asked = []

    def clock(self):
        return self.now

    def probe(self, addresses, started):
        self.asked.append(addresses)
        return FakeProbe(self, started)

    def check_peer(self, task, timeout_seconds):
        if self.is_another:
            raise tf.errors.FailedPreconditionError(None, None, task)


class FakeProbe:
    def __init__(self, servers, started):
        self.started, self._servers = started, servers

    def poll(self):
        return self._servers.answer

    def close(self):
        pass


@pytest.fixture
def servers(monkeypatch):
    fake = FakeServers()
    monkeypatch.setattr(heartbeats_module, "runtime", fake)
    monkeypatch.setattr(heartbeats_module, "HeartbeatProbe", fake.probe)
    monkeypatch.setattr(heartbeats_module, "resolve", lambda host, port: host)
    monkeypatch.setattr(
        heartbeats_module, "TIMING", replace(TIMING, answers=0.0)
    )
    return fake


@pytest.fixture
def heartbeats(servers):
    tasks = tuple(f"/job:worker/replica:0/task:{rank}" for rank in range(3))
    cluster = Cluster(tasks, ("a:1", "b:1", "c:1"), 0)
    return Heartbeats(cluster, LIMIT_SECONDS, servers.clock)


def check_after(seconds, servers, heartbeats):
    servers.now += seconds
    return heartbeats.check()


def test_one_that_answers_is_asked_again_after_the_interval(
    servers, heartbeats
):
    assert heartbeats.check() is None
    assert servers.asked == []
    assert check_after(2.0, servers, heartbeats) is None
    assert servers.asked == ["b", "c"]
    assert check_after(1.0, servers, heartbeats) is None
    assert servers.asked == ["b", "c"]
    heartbeats.inspector = Said(waits=True)
    assert heartbeats.check() is None
    assert servers.asked == ["b", "c", "b", "c"]
    assert heartbeats.answers(1)


def test_one_that_does_not_answer_for_the_limit_is_frozen(servers, heartbeats):
    servers.answer = Answer.NOT_YET
    for _ in range(9):
        assert check_after(2.0, servers, heartbeats) is None
    error = check_after(2.0, servers, heartbeats)
    assert isinstance(error, WorkerLostError)
    assert (
        "worker 1 (b:1) has not answered for 20 s: it is frozen, or the "
        "network is cut." in str(error)
    )
    assert not heartbeats.answers(1)


def test_those_that_do_not_answer_are_known_before_the_limit(
    servers, heartbeats
):
    servers.answer = Answer.NOT_YET
    assert check_after(2.0, servers, heartbeats) is None
    assert heartbeats.unanswered() == []
    heartbeats.heard(1)
    assert check_after(2.0, servers, heartbeats) is None
    assert heartbeats.unanswered() == [
        "worker 2 (c:1) has not answered for 4 s: it is frozen, or the "
        "network is cut"
    ]
    heartbeats.inspector = Said(ended=True)
    assert heartbeats.unanswered() == []


def test_one_that_cannot_be_reached_is_given_as_long(servers, heartbeats):
    servers.answer = Answer.NEVER
    assert check_after(19.0, servers, heartbeats) is None
    assert "the network is cut" in str(check_after(1.0, servers, heartbeats))


def test_whatever_arrives_counts_as_an_answer(servers, heartbeats):
    servers.answer = Answer.NOT_YET
    assert check_after(19.0, servers, heartbeats) is None
    heartbeats.heard(1)
    heartbeats.heard(2)
    assert check_after(19.0, servers, heartbeats) is None
    heartbeats.heard_all()
    assert check_after(19.0, servers, heartbeats) is None
    heartbeats.heard(2)
    assert "worker 1 " in str(check_after(1.0, servers, heartbeats))


def test_a_late_answer_counts_from_when_it_was_asked_for(servers, heartbeats):
    servers.answer = Answer.NOT_YET
    assert check_after(5.0, servers, heartbeats) is None
    servers.answer = Answer.YES
    assert check_after(14.0, servers, heartbeats) is None
    servers.answer = Answer.NOT_YET
    assert check_after(19.0, servers, heartbeats) is None
    assert check_after(1.0, servers, heartbeats) is not None


def test_a_closed_port_is_asked_again_before_the_worker_is_gone(
    servers, heartbeats
):
    servers.answer = Answer.CLOSED
    for _ in range(REFUSALS - 1):
        assert check_after(2.0, servers, heartbeats) is None
        assert heartbeats.are_unsure
    assert "its port is closed" in str(check_after(0.0, servers, heartbeats))
    assert not heartbeats.are_unsure


def test_a_port_that_opens_again_was_never_gone(servers, heartbeats):
    servers.answer = Answer.CLOSED
    assert check_after(2.0, servers, heartbeats) is None
    servers.answer = Answer.YES
    assert heartbeats.check() is None
    assert not heartbeats.are_unsure


def test_one_that_was_started_again_is_another(servers, heartbeats):
    assert heartbeats.check(all_now=True) is None
    servers.is_another = True
    assert "was started again" in str(heartbeats.check(all_now=True))


class Said:
    def __init__(self, ended=False, failure=None, waits=False):
        self.ended, self.failure, self.waits = ended, failure, waits

    def has_ended(self, rank):
        return self.ended

    def failure_of(self, rank):
        return self.failure


@pytest.mark.parametrize("answer", [Answer.CLOSED, Answer.NEVER])
def test_one_that_has_ended_may_be_gone_unless_it_is_needed(
    answer, servers, heartbeats
):
    heartbeats.inspector = Said(ended=True)
    servers.answer = answer
    for _ in range(20):
        assert check_after(2.0, servers, heartbeats) is None
    heartbeats.needs_all = True
    error = str(check_after(2.0, servers, heartbeats))
    assert "has ended its script, while this worker still needs it" in error


def test_one_that_has_said_why_it_fails_fails_all_of_the_same(
    servers, heartbeats
):
    why = WorkerLostError("why")
    heartbeats.inspector = Said(failure=why)
    servers.answer = Answer.CLOSED
    found = [check_after(2.0, servers, heartbeats) for _ in range(REFUSALS)]
    assert found[-1] is why


def server(reply):
    """A socket that answers its first connection; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(60)
    return listener, resolve(*listener.getsockname()[:2])


def ask(probe):
    """Polls until there is an answer."""
    wait_until(lambda: probe.poll() is not Answer.NOT_YET)
    return probe.poll()


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (SETTINGS, Answer.YES),
        (b"HTTP/1.1 400 Bad Request\r\n", Answer.CLOSED),
        (b"", Answer.CLOSED),
    ],
    ids=["gRPC", "another server", "hangs up"],
)
def test_a_server_of_grpc_answers_with_its_settings(reply, answer):
    listener, addresses = server(reply)
    with listener:
        probe = HeartbeatProbe(addresses, 0.0)
        connection, _ = listener.accept()
        assert probe.poll() is Answer.NOT_YET
        with connection:
            assert connection.recv(100).startswith(b"PRI * HTTP/2.0")
            connection.sendall(reply)
        assert ask(probe) is answer
        probe.close()


def test_a_process_that_is_frozen_accepts_and_says_nothing():
    listener, addresses = server(b"")
    with listener:
        probe = HeartbeatProbe(addresses, 0.0)
        for _ in range(100):
            assert probe.poll() is Answer.NOT_YET
        probe.close()


def test_a_port_on_which_nobody_listens_is_closed():
    listener, addresses = server(b"")
    listener.close()
    assert ask(HeartbeatProbe(addresses, 0.0)) is Answer.CLOSED


def test_the_next_address_of_a_host_is_asked_if_one_is_closed():
    closed, nowhere = server(b"")
    closed.close()
    listener, addresses = server(SETTINGS)
    with listener:
        probe = HeartbeatProbe([*nowhere, *addresses], 0.0)
        wait_until(
            lambda: probe.poll() is not Answer.NOT_YET or not probe._left
        )
        connection, _ = listener.accept()
        with connection:
            connection.sendall(SETTINGS)
            assert ask(probe) is Answer.YES
        probe.close()


def test_tensorflows_own_server_answers():
    port = tf.distribute.Server.create_local_server().target.rpartition(":")[2]
    probe = HeartbeatProbe(resolve("localhost", int(port)), 0.0)
    assert ask(probe) is Answer.YES
    probe.close()
