"""Parses the addresses of workers, `host:port`. No TensorFlow, no look-ups."""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """Where a worker listens.

    Attributes:
        host: Host name or IP address; an IPv6 address without brackets.
        port: From 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def endpoint(self) -> tuple[str, int]:
        """Equal for two spellings of one address; names are not looked up.

        A worker listens on all addresses of its host, so that `localhost`,
        `127.0.0.1` and `[::1]` are one.
        """
        host = self.host.lower().removesuffix(".")
        if host == "localhost":
            return _LOOPBACK, self.port
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host, self.port
        return _LOOPBACK if address.is_loopback else str(address), self.port


def parse_address(text: Any) -> Address:
    """Splits `"host:port"` or `"[fd00::1]:port"`.

    Raises:
        ValueError: If it is neither, with the likely remedy: a scheme, blanks
            and an IPv6 address without brackets are not accepted.
    """
    host, _, port = str(text).rpartition(":")
    problem = _problem(text, host, port)
    if problem is not None:
        raise ValueError(
            "The address of a worker must be a host and a port, such as "
            f"'10.0.0.1:12345' or '[fd00::1]:12345'. Received: {text!r}"
            f"{problem}"
        )
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def parse_addresses(texts: Iterable[Any]) -> tuple[Address, ...]:
    """Parses the addresses of all workers of a job.

    Raises:
        ValueError: If one is not an address, or if two are the same one in
            whatever spelling.
    """
    addresses = tuple(parse_address(text) for text in texts)
    counts = Counter(address.endpoint for address in addresses)
    twice = [each for each in addresses if counts[each.endpoint] > 1]
    if twice:
        # In order, each spelling once.
        listed = ", ".join(dict.fromkeys(map(str, twice)))
        raise ValueError(
            "Every worker must have its own address. Received: "
            f"{listed}, listed twice or more. On one machine each needs "
            "another port."
        )
    return addresses


def _problem(text: Any, host: str, port: str) -> str | None:
    """The fault, as the end of a message, or `None`."""
    if not isinstance(text, str):
        return ", which is not a string."
    if "://" in text:
        return f". Leave out the scheme: {text.partition('://')[2]!r}"
    if text != text.strip() or any(map(str.isspace, text)):
        return ". Leave out the blanks."
    # `isdecimal` alone takes the digits of every script.
    if not (port.isascii() and port.isdecimal() and len(port) <= 5):
        return ", which does not end in a port."
    if not 0 < int(port) < 65536:
        return ". A port is from 1 to 65535."
    if host.startswith("[") or ":" in host:
        return _problem_of_ipv6(text, host)
    if not _HOST_NAME.fullmatch(host):
        return ", which has no valid host."
    return None


def _problem_of_ipv6(text: str, host: str) -> str | None:
    if not (host.startswith("[") and host.endswith("]")):
        return f". An IPv6 address stands in brackets: '[{host}]:...'"
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return f", where {text[1 : len(host) - 1]!r} is not an IPv6 address."
    return None
