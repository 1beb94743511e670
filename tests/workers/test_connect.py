"""TF_CONFIG and other descriptions of a cluster, good and bad."""

import json

import pytest

import keras_allreduce
from keras_allreduce.workers import connect
from keras_allreduce.workers.cluster import check_cluster
from keras_allreduce.workers.connect import read_cluster

TWO = ["a:1", "b:2"]


def described(cluster, task):
    return json.dumps({"cluster": cluster, "task": task})


def worker(index):
    return {"type": "worker", "index": index}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{}",
        '{"cluster": {}, "task": {}}',
        described({"worker": ["a:1"]}, worker(0)),
        described(
            {"worker": TWO, "evaluator": ["c:3"]},
            {"type": "evaluator", "index": 0},
        ),
        described({"worker": TWO}, {"type": "evaluator", "index": 0}),
    ],
    ids=[
        "none",
        "empty",
        "object",
        "no cluster",
        "one worker",
        "evaluator",
        "evaluator of TFJob",
    ],
)
def test_one_worker_trains_alone(text, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    assert read_cluster(None) is None


def test_the_chief_comes_first(monkeypatch):
    monkeypatch.setenv(
        "TF_CONFIG",
        described({"worker": TWO, "chief": ["c:3"]}, worker("1")),
    )
    cluster = read_cluster(None)
    assert cluster.addresses == ("c:3", "a:1", "b:2")
    assert cluster.rank == 2
    assert cluster.others == [0, 1]
    assert cluster.names([0, 2]) == "chief 0 (c:3), worker 1 (b:2)"


BAD = {
    "not JSON": ("{'cluster'", "must be JSON"),
    "a list": ("[1]", "must have a `cluster`"),
    "no cluster": ('{"task": {"type": "worker"}}', "must have a `cluster`"),
    "no task": ('{"cluster": {"worker": ["a:1", "b:2"]}}', "have a `task`"),
    "no index": (
        described({"worker": TWO}, {"type": "worker"}),
        "have a `task`",
    ),
    "index too large": (described({"worker": TWO}, worker(2)), "index=2"),
    "index negative": (described({"worker": TWO}, worker(-1)), "index=-1"),
    "index a word": (described({"worker": TWO}, worker("x")), "index='x'"),
    "type not known": (
        described({"worker": TWO}, {"type": "boss", "index": 0}),
        "type='boss'",
    ),
    "type not listed": (
        described({"worker": TWO}, {"type": "chief", "index": 0}),
        "type='chief'",
    ),
    "no port": (described({"worker": ["a", "b:2"]}, worker(0)), "'a'"),
    "port a word": (described({"worker": ["a:x", "b:2"]}, worker(0)), "'a:x'"),
    "port too large": (
        described({"worker": ["a:65536", "b:2"]}, worker(0)),
        "'a:65536'",
    ),
    "listed twice": (
        described({"worker": ["a:1", "a:1"]}, worker(0)),
        "a:1, listed twice",
    ),
    "one address in two spellings": (
        described({"worker": ["localhost:1", "127.0.0.1:1"]}, worker(0)),
        "localhost:1, 127.0.0.1:1, listed twice",
    ),
    "scheme": (
        described({"worker": ["grpc://a:1", "b:2"]}, worker(0)),
        "Leave out the scheme: 'a:1'",
    ),
    "blanks": (described({"worker": ["a:1 ", "b:2"]}, worker(0)), "'a:1 '"),
    "bare IPv6": (
        described({"worker": ["fd00::1:1", "b:2"]}, worker(0)),
        "stands in brackets",
    ),
    "index missing in a dictionary": (
        described({"worker": {"0": "a:1", "2": "b:2"}}, worker(0)),
        "indices ['0', '2']",
    ),
    "index twice in a dictionary": (
        described({"worker": {"0": "a:1", "00": "b:2"}}, worker(0)),
        "indices ['0', '00']",
    ),
    "nested too deep": ("[" * 100000, "must be JSON"),
    "addresses a string": (described({"worker": "a:1"}, worker(0)), "cluster="),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tf_config_is_a_value_error_with_a_remedy(name, monkeypatch):
    text, match = BAD[name]
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="Received") as caught:
        read_cluster(None)
    assert match in str(caught.value)


def test_a_dictionary_of_addresses_is_in_the_order_of_its_indices():
    jobs = {"worker": {"10": "k:1", **{str(n): f"w{n}:1" for n in range(10)}}}
    cluster = check_cluster(jobs, "worker", 10)
    assert cluster.addresses[:3] == ("w0:1", "w1:1", "w2:1")
    assert cluster.addresses[cluster.rank] == "k:1"


def test_ipv6_addresses_have_ports_too():
    assert check_cluster({"worker": ["[::1]:1", "[::1]:2"]}, "worker", 1)


PROXY = {"http_proxy": "http://proxy:3128"}
WORKERS = "a,fd00::1"


@pytest.mark.parametrize(
    ("environment", "exceptions"),
    [
        ({}, None),
        ({"no_proxy": "x"}, None),
        (PROXY, WORKERS),
        ({**PROXY, "no_proxy": ".site,10.0.0.1"}, f".site,10.0.0.1,{WORKERS}"),
        (
            {**PROXY, "no_proxy": "x", "no_grpc_proxy": "y"},
            f"y,{WORKERS}",
        ),
        ({"grpc_proxy": "p:1"}, WORKERS),
    ],
)
def test_the_workers_are_kept_from_a_proxy(
    environment, exceptions, monkeypatch
):
    for name in (*connect._PROXIES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    addresses = ["a:1", "[fd00::1]:1"]
    connect._keep_from_proxy(check_cluster({"worker": addresses}, "worker", 0))
    before = environment.get("no_grpc_proxy")
    found = connect.os.environ.get("no_grpc_proxy")
    assert found == (exceptions or before)


def test_each_strategy_numbers_its_groups_unless_that_is_set(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    make = keras_allreduce.MultiWorkerAllReduceStrategy

    def key_bases():
        return [make().extended._collective_key_base for _ in range(2)]

    first, second = key_bases()
    assert second == first + 100
    monkeypatch.setattr(make, "_collective_key_base", 7)
    assert key_bases() == [7, 7]
