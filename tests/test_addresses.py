"""Addresses of workers: right, or an error at once."""

import pytest

from keras_allreduce.addresses import Address, parse_address, parse_addresses

GOOD = {
    "name": ("host:12345", Address("host", 12345)),
    "full name": ("a-1.b_c.example.:1", Address("a-1.b_c.example.", 1)),
    "IPv4": ("10.0.0.1:65535", Address("10.0.0.1", 65535)),
    "IPv6": ("[fd00::1]:80", Address("fd00::1", 80)),
    "IPv6 of a link": ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80)),
}


@pytest.mark.parametrize(("text", "address"), GOOD.values(), ids=GOOD)
def test_an_address_is_read_and_written(text, address):
    assert parse_address(text) == address
    assert str(address) == text


BAD = {
    "no port": ("a", "does not end in a port"),
    "empty port": ("a:", "does not end in a port"),
    "port a word": ("a:x", "does not end in a port"),
    "port of other digits": ("a:١٢", "does not end in a port"),
    "port with a sign": ("a:+1", "does not end in a port"),
    "port zero": ("a:0", "A port is from 1 to 65535"),
    "port too high": ("a:65536", "A port is from 1 to 65535"),
    "port of many digits": ("a:" + "9" * 10000, "does not end in a port"),
    "no host": (":1", "has no valid host"),
    "scheme": ("grpc://10.0.0.1:1", "Leave out the scheme: '10.0.0.1:1'"),
    "blank before": (" a:1", "Leave out the blanks"),
    "blank inside": ("a :1", "Leave out the blanks"),
    "new line": ("a:1\n", "Leave out the blanks"),
    "path": ("a/b:1", "has no valid host"),
    "bare IPv6": ("fd00::1:80", "stands in brackets: '[fd00::1]:...'"),
    "IPv6 without port": ("[fd00::1]", "does not end in a port"),
    "half a bracket": ("[fd00::1:80", "stands in brackets"),
    "brackets around a name": ("[host]:80", "'host' is not an IPv6 address"),
    "number": (12345, "is not a string"),
    "none": (None, "is not a string"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_no_address_is_an_error_with_the_remedy(text, message):
    with pytest.raises(ValueError, match="must be a host and a port") as caught:
        parse_address(text)
    assert message in str(caught.value)


SAME = {
    "same text": ("a:1", "a:1"),
    "upper case": ("a:1", "A:1"),
    "dot at the end": ("a.b:1", "a.b.:1"),
    "loopback by name": ("localhost:1", "127.0.0.1:1"),
    "loopback of IPv6": ("[::1]:1", "127.0.0.1:1"),
    "other loopback": ("127.0.0.2:1", "127.0.0.1:1"),
    "zeros of IPv6": ("[fd00::1]:1", "[fd00:0:0::1]:1"),
    "zeros of a port": ("a:1", "a:01"),
}


@pytest.mark.parametrize("texts", SAME.values(), ids=SAME)
def test_one_address_in_two_spellings_is_found(texts):
    with pytest.raises(ValueError, match="must have its own address"):
        parse_addresses(texts)


def test_hosts_that_share_a_port_and_ports_that_share_a_host_differ():
    texts = ["a:1", "b:1", "a:2", "localhost:1", "[::1]:2"]
    assert [str(each) for each in parse_addresses(texts)] == texts
