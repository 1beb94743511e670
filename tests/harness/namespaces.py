"""A network of one namespace per worker, with links as slow as one likes.

    worker 0          switch          worker 1
    eth0 --------- p0 [br0] p1 --------- eth0
    10.77.0.1                        10.77.0.2

Each box is a network namespace of Linux, each line a veth pair. Nothing is
added to the network of the machine itself, and nothing leads out. Both ends
of a link pass on at most `rate`, so that it holds in either direction.

Needs root and the commands `ip` and `tc` of iproute2.
"""

import contextlib
import functools
import itertools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

PREFIX = "keras-allreduce"

# A token bucket lets this much pass at once after a pause: as little as does
# not slow 10 Gbit/s down, so that small packs feel the rate too.
BURST = "128kb"
LONGEST_QUEUE = "20ms"

_numbers = itertools.count()


@dataclass(frozen=True)
class Network:
    """Namespaces that reach each other and nobody else.

    Attributes:
        name: What the names of its namespaces begin with.
        addresses: Address of each worker.
    """

    name: str
    addresses: tuple[str, ...]

    def path(self, worker):
        """Path of a worker's namespace."""
        return f"/var/run/netns/{self.name}-{worker}"

    def command(self, worker, command):
        """The command line that runs `command` in a worker's namespace.

        `ip` becomes the command, so that signals to the process reach it.
        """
        return ["ip", "netns", "exec", f"{self.name}-{worker}", *command]

    def cut(self, worker):
        """Pulls the worker's cable out of the switch."""
        _run(f"ip -n {self.name}-switch link set p{worker} down")


@functools.cache
def missing():
    """Why there can be no namespaces here, or `None` if there can."""
    tools = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if tools:
        return f"no command {' and '.join(tools)} (Debian: iproute2)"
    if os.geteuid():
        return "network namespaces need root"
    try:
        with network(1, rate="1gbit"):
            return None
    except RuntimeError as error:
        return f"network namespaces are not allowed: {error}"


@contextlib.contextmanager
def network(
    num_workers,
    rate=None,
    burst=BURST,
    queue=LONGEST_QUEUE,
    mtu=1500,
    window=None,
):
    """Joins a namespace per worker.

    Args:
        num_workers: Number of workers.
        rate: What a link carries in each direction, as `tc` writes it:
            `"1gbit"`. `None`: as much as it can. A list: of each worker, up
            and down.
        burst: What a link passes on at once after a pause, as `tc` writes it.
        queue: How long a packet waits at most before it is dropped.
        mtu: Largest packet in bytes.
        window: Bytes that a connection sends ahead at most. `None`: as many as
            TCP finds out.

    Yields:
        `Network`. At the end of the block its namespaces are gone; a process
        that is still inside one no longer reaches anybody.

    Raises:
        RuntimeError: If a command fails, with what it said.
    """
    _remove_those_of_dead_processes()
    net = Network(
        f"{prefix()}{next(_numbers)}",
        tuple(f"10.77.0.{worker + 1}" for worker in range(num_workers)),
    )
    with contextlib.ExitStack() as stack:
        for worker in range(num_workers):
            stack.callback(_remove, f"{net.name}-{worker}")
        # Goes first, and takes both ends of all links with it.
        stack.callback(_remove, f"{net.name}-switch")
        _add_namespace(f"{net.name}-switch")
        _run(f"ip -n {net.name}-switch link add br0 type bridge")
        _run(f"ip -n {net.name}-switch link set br0 up")
        for worker, address in enumerate(net.addresses):
            rates = rate[worker] if isinstance(rate, list) else (rate, rate)
            _add_worker(net.name, worker, address, mtu)
            if window:
                _limit_window(f"{net.name}-{worker}", window)
            ends = _ends(net.name, worker)
            for (namespace, device), its_rate in zip(ends, rates, strict=True):
                if its_rate:
                    limit(namespace, device, its_rate, burst, queue)
        yield net


def prefix():
    """What all names that this process gives begin with."""
    return f"{PREFIX}-{os.getpid()}-"


def _ends(name, worker):
    """Both ends of a worker's link: namespace and device."""
    return ((f"{name}-{worker}", "eth0"), (f"{name}-switch", f"p{worker}"))


def _add_worker(name, worker, address, mtu):
    (own, _), (switch, port) = _ends(name, worker)
    _add_namespace(own)
    _run(f"ip -n {own} link add eth0 type veth peer name {port} netns {switch}")
    _run(f"ip -n {own} address add {address}/24 dev eth0")
    _run(f"ip -n {switch} link set {port} master br0")
    for namespace, device in _ends(name, worker):
        _run(f"ip -n {namespace} link set {device} mtu {mtu} up")


def limit(namespace, device, rate, burst=BURST, queue=LONGEST_QUEUE):
    """Lets one end of a link pass on at most `rate`, as `tc` writes it."""
    _run(
        f"tc -n {namespace} qdisc add dev {device} root tbf "
        f"rate {rate} burst {burst} latency {queue}"
    )


def _limit_window(namespace, nbytes):
    setting = "/proc/sys/net/ipv4/tcp_wmem"
    sizes = f"{min(4096, nbytes)} {nbytes} {nbytes}"
    write = f"echo {sizes} > {setting}"
    _run(["ip", "netns", "exec", namespace, "sh", "-c", write])


def _add_namespace(name):
    _run(f"ip netns add {name}")
    _run(f"ip -n {name} link set lo up")


def _remove(name):
    if name in all_names():
        _run(f"ip netns delete {name}")


def _remove_those_of_dead_processes():
    for name in all_names():
        found = re.match(rf"{PREFIX}-(\d+)-", name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            # Another process may be doing the same.
            with contextlib.suppress(RuntimeError):
                _remove(name)


def all_names():
    """Names of all network namespaces, of this process and of others."""
    return [line.split()[0] for line in _run("ip netns list").splitlines()]


def _run(command):
    words = command if isinstance(command, list) else command.split()
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"`{command}` failed: {said}")
    return done.stdout
