"""Workers train over a slow network as one device does, and notice a cut.

Each worker is in a network namespace of its own (`namespaces.py`), with its own
address, behind a link of 1 Gbit/s.
"""

import subprocess
import time

import namespaces
import pytest
import workers
from test_multi_worker import agree

pytestmark = pytest.mark.nightly

CASES = ["even_batches", "uneven_last_batch", "evaluate_and_predict"]


@pytest.fixture(scope="module", autouse=True)
def _namespaces_are_allowed():
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def network():
    with namespaces.network(2, rate="1gbit") as net:
        yield net


@pytest.fixture(scope="module")
def on_a_slow_network():
    """Results of each of two workers, by case."""
    with namespaces.network(2, rate="1gbit") as net:
        return workers.results("cases", CASES, network=net)


def said_by(*command):
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout


def test_the_network_of_this_machine_stays_as_it_is(network):
    links = said_by("ip", "-oneline", "link")
    routes = said_by("ip", "route")
    with namespaces.network(2, rate="1gbit"):
        assert said_by("ip", "-oneline", "link") == links
        assert said_by("ip", "route") == routes


def own_names():
    """Namespaces that this process has made and not removed."""
    names = namespaces.all_names()
    return [name for name in names if name.startswith(namespaces.prefix())]


def test_the_namespaces_are_gone_after_an_error():
    before = own_names()

    def fail_inside():
        with namespaces.network(3):
            assert len(own_names()) == len(before) + 4
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert own_names() == before


def test_the_namespaces_are_gone_if_the_network_cannot_be_made():
    before = own_names()
    with (
        pytest.raises(RuntimeError, match="nonsense"),
        namespaces.network(2, rate="nonsense"),
    ):
        pass
    assert own_names() == before


def test_both_ends_of_a_link_have_the_rate(network):
    for namespace, device in [("0", "eth0"), ("switch", "p0")]:
        queues = said_by(
            "tc", "-n", f"{network.name}-{namespace}", "qdisc", "show", "dev",
            device,
        )  # fmt: skip
        assert "tbf" in queues
        assert "rate 1Gbit" in queues


@pytest.mark.parametrize("name", CASES)
def test_workers_train_as_one_device_does(name, on_a_slow_network):
    agree(name, on_a_slow_network)


@pytest.mark.parametrize("index", [0, 1], ids=["chief", "other"])
def test_a_cut_link_ends_both_workers_in_an_error(index, network):
    with workers.running("fit_until_ended", 60, network=network) as pair:
        while not all("has ended" in worker.output for worker in pair):
            codes = [worker.process.poll() for worker in pair]
            assert codes == [None, None], [worker.output for worker in pair]
            time.sleep(0.05)
        network.cut(index)
        start = time.monotonic()
        for worker in pair:
            code = worker.wait()
            seconds = time.monotonic() - start
            print(f"worker {worker.index}: {seconds:.1f} s, exit code {code}")
            print(worker.output[-3000:])
            assert code not in (0, None), worker.output
            # Both, by questions to the other that get no answer.
            assert "has not answered for" in worker.output
            assert f"worker {1 - worker.index} (" in worker.output
