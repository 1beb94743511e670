"""Nobody outside ends or delays the start of the workers.

All sides run in threads of this process, on loopback. Strangers stay connected
until the workers have met, so that no test needs to measure time.
"""

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import workers
from deadlines import wait_until

from keras_allreduce.addresses import parse_address
from keras_allreduce.workers import reports
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.connect import meet
from keras_allreduce.workers.errors import WorkerStartError
from keras_allreduce.workers.ranks import Placement
from keras_allreduce.workers.resolvers import exchange_addresses

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 120
BEGIN = b"keras_allreduce "


@pytest.fixture
def addresses():
    return tuple(f"127.0.0.1:{port}" for port in workers.free_ports(3))


@pytest.fixture
def pool():
    with ThreadPoolExecutor(20) as made:
        yield made


def cluster(addresses, rank):
    tasks = tuple(
        f"/job:worker/replica:0/task:{n}" for n in range(len(addresses))
    )
    return Cluster(tasks, addresses, rank)


def connected(address, data=b""):
    """A connection to whoever listens there, as soon as somebody does."""
    address, made = parse_address(address), []

    def connects():
        with contextlib.suppress(ConnectionError):
            made.append(socket.create_connection((address.host, address.port)))
        return made

    wait_until(connects, f"Nobody listens at {address}.")
    with contextlib.suppress(OSError):
        made[0].sendall(data)
    return made[0]


class Strangers:
    """Connect to an address and send, until the block ends."""

    def __init__(self, address, data, count=1, drip=False):
        self._address = address
        self._data = data
        self._count = count
        self._drip = drip
        self._met = threading.Event()
        self._connections = []

    def __enter__(self):
        self._connections = [
            connected(self._address, self._data) for _ in range(self._count)
        ]
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def _go_on(self):
        while self._drip and not self._met.wait(0.01):
            with contextlib.suppress(OSError):
                self._connections[0].sendall(b"[")

    def __exit__(self, *exception):
        self._met.set()
        self._thread.join()
        for each in self._connections:
            each.close()


def report(**content):
    return BEGIN + json.dumps({"token": "", **content}).encode() + b"\n"


STRANGERS = {
    "half open": {"data": b""},
    "many idle": {"data": b"", "count": 400},
    "browser": {"data": b"GET / HTTP/1.1\r\n\r\n", "count": 5},
    "TLS": {
        "data": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "count": 5,
    },
    "half a beginning": {"data": b"keras_", "count": 5},
    "slow": {"data": BEGIN, "drip": True},
    "endless": {"data": BEGIN + b"x" * 2**20},
    "nested": {"data": BEGIN + b"[" * 50000 + b"]" * 50000 + b"\n"},
    "nested object": {"data": BEGIN + b'{"a":' * 15000 + b"\n"},
    "digits": {"data": BEGIN + b'{"rank": ' + b"9" * 50000 + b"}\n"},
    "not text": {"data": BEGIN + b"\xff\xfe\x00\n"},
    "not an object": {"data": BEGIN + b"[1]\n"},
    "no rank": {"data": report()},
    "rank a list": {"data": report(rank=[1], addresses=[])},
    "addresses a number": {"data": report(rank=1, addresses=1)},
    "unknown rank without addresses": {"data": report(rank=7)},
    "token a list": {"data": report(token=[[]], rank=1, addresses=["a:1"])},
    "another job": {"data": report(token="x", rank=1, addresses=["a:1"])},
}


@pytest.mark.parametrize("name", STRANGERS)
def test_workers_meet_whatever_a_stranger_sends(name, addresses, pool):
    chief = pool.submit(meet, cluster(addresses, 0), TIMEOUT_SECONDS)
    with Strangers(addresses[0], **STRANGERS[name]):
        others = [
            pool.submit(meet, cluster(addresses, rank), TIMEOUT_SECONDS)
            for rank in (1, 2)
        ]
        assert [each.result() for each in (chief, *others)] == [None] * 3


def test_strangers_that_come_and_go_do_not_keep_the_chief(addresses):
    with ThreadPoolExecutor(2) as pool:
        chief = pool.submit(meet, cluster(addresses[:2], 0), 1.0)
        while not chief.done():
            with contextlib.suppress(OSError):
                connected_once = socket.create_connection(
                    ("127.0.0.1", parse_address(addresses[0]).port), 1
                )
                connected_once.close()
        assert "Never reached: worker 1" in chief.result()
        assert "other connections were turned away" in chief.result()


ANSWERS = {
    "nothing": b"",
    "garbage": b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\n",
    "endless": b"x" * 2**20,
    "nested": BEGIN + b"[" * 50000 + b"\n",
    "a problem that is no text": BEGIN + b'{"problem": []}\n',
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_stranger_in_place_of_the_chief_does_not_keep_a_worker(
    name, addresses, pool
):
    port = parse_address(addresses[0]).port
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(0.1)
        worker = pool.submit(meet, cluster(addresses, 1), 1.0)
        held = []
        while not worker.done():
            with contextlib.suppress(OSError):
                held.append(server.accept()[0])
                held[-1].sendall(ANSWERS[name])
        for each in held:
            each.close()
        assert "Never reached: worker 0" in worker.result()


def test_a_worker_of_another_job_is_told_so_and_ends_nobody(addresses, pool):
    two = addresses[:2]
    chief = pool.submit(meet, cluster(two, 0), TIMEOUT_SECONDS, "ours")
    other = pool.submit(meet, cluster(two, 1), 1.0, "theirs")
    assert "it expects another job token" in other.result()
    own = pool.submit(meet, cluster(two, 1), TIMEOUT_SECONDS, "ours")
    assert [chief.result(), own.result()] == [None, None]


def test_two_workers_with_one_index_are_told_at_once(addresses, pool):
    chief = pool.submit(meet, cluster(addresses, 0), TIMEOUT_SECONDS)
    # Both have the port of worker 1, which only a real worker 1 listens on.
    content = {"rank": 1, "addresses": addresses, "problem": None}
    twins = [
        pool.submit(
            reports.deliver,
            [parse_address(addresses[0])],
            content,
            "",
            TIMEOUT_SECONDS,
            TIMEOUT_SECONDS,
            2**20,
        )
        for _ in range(2)
    ]
    problem = chief.result()
    assert "two processes are worker 1" in problem
    assert [twin.result()["problem"] for twin in twins] == [problem] * 2


def test_a_worker_that_starts_again_before_all_are_there_is_no_twin(
    addresses, pool
):
    chief = pool.submit(meet, cluster(addresses, 0), TIMEOUT_SECONDS)
    first = connected(
        addresses[0], report(rank=1, addresses=addresses, problem=None)
    )
    assert b"received" in first.recv(1000)
    first.close()
    others = [
        pool.submit(meet, cluster(addresses, rank), TIMEOUT_SECONDS)
        for rank in (1, 2)
    ]
    assert [each.result() for each in (chief, *others)] == [None] * 3


def placement(rank, ports, size=3):
    (port,) = ports
    return Placement(rank, size, "a test", "127.0.0.1", "job", port)


def test_all_ranks_learn_the_same_addresses_by_rank(pool):
    ports = workers.free_ports(1)
    found = [
        pool.submit(
            exchange_addresses, placement(rank, ports), TIMEOUT_SECONDS, "job"
        )
        for rank in (2, 0, 1)
    ]
    two, zero, one = (each.result() for each in found)
    assert zero == one == two
    assert len({parse_address(each) for each in zero}) == 3


@pytest.mark.parametrize("name", STRANGERS)
def test_addresses_are_exchanged_whatever_a_stranger_sends(name, pool):
    ports = workers.free_ports(1)
    zero = pool.submit(
        exchange_addresses, placement(0, ports, 2), TIMEOUT_SECONDS, ""
    )
    with Strangers(f"127.0.0.1:{ports[0]}", **STRANGERS[name]):
        one = pool.submit(
            exchange_addresses, placement(1, ports, 2), TIMEOUT_SECONDS, ""
        )
        assert zero.result() == one.result()


@pytest.mark.parametrize("present", [0, 1])
def test_a_rank_that_never_comes_is_named(present):
    ports = workers.free_ports(1)
    with pytest.raises(
        WorkerStartError, match=rf"Never reached: rank {1 - present}\."
    ) as caught:
        exchange_addresses(placement(present, ports, 2), 0.5, "job")
    assert "timeout_seconds=0.5" in str(caught.value)
    assert "MASTER_ADDR" in str(caught.value)


def test_ranks_of_jobs_of_other_sizes_are_told_at_once(pool):
    ports = workers.free_ports(1)
    found = [
        pool.submit(
            exchange_addresses,
            placement(rank, ports, size),
            TIMEOUT_SECONDS,
            "job",
        )
        for rank, size in ((0, 3), (1, 2))
    ]
    for each in found:
        with pytest.raises(WorkerStartError, match="must be of one job"):
            each.result()


def test_rank_0_takes_the_next_port_if_another_job_has_the_first(pool):
    first, *_ = Placement(0, 2, "a test", "127.0.0.1", "job 7").ports
    with socket.create_server(("127.0.0.1", first)) as server:
        server.settimeout(0.1)
        found = [
            pool.submit(
                exchange_addresses,
                Placement(rank, 2, "a test", "127.0.0.1", "job 7"),
                TIMEOUT_SECONDS,
                "job 7",
            )
            for rank in (0, 1)
        ]
        while not all(each.done() for each in found):
            with contextlib.suppress(OSError):
                server.accept()[0].close()
        assert found[0].result() == found[1].result()
