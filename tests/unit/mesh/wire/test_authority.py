import pytest

from mesh.model.address import SocketAddress
from mesh.wire.authority import HostPort, parse_authority
from mesh.wire.errors import RemoteProtocolError


@pytest.mark.parametrize("text", ["10.0.0.1:80", "[fd00::1]:15008", "255.255.255.255:65535", "[::]:1"])
def test_addresses_are_parsed(text: str) -> None:
    parsed = parse_authority(text)
    assert isinstance(parsed, SocketAddress)
    assert str(parsed) == text


def test_a_mapped_address_is_the_ipv4_one() -> None:
    assert parse_authority("[::ffff:10.0.0.1]:80") == parse_authority("10.0.0.1:80")


@pytest.mark.parametrize(
    "text", ["reviews.default.svc.cluster.local:9080", "localhost:1", "a-b.c_d.example:443", "1.2.3.4.example:80", "x1:80"]
)
def test_hostnames_are_parsed(text: str) -> None:
    parsed = parse_authority(text)
    assert isinstance(parsed, HostPort)
    assert str(parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":80", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:+80", "10.0.0.1: 80", "10.0.0.1:٨٠",
        "10.0.0.1:80 ", "10.0.0.256:80", "10.0.0:80", "10.0.0.1.5:80", "010.0.0.1:80", "fd00::1:80", "[fd00::1]", "[fd00::1]80",
        "[fd00::g]:80", "[10.0.0.1]:80", "[fe80::1%eth0]:80", "[]:80", "user@host:80", "host", "host:", "host:0", "host:99999", "-host:80",
        "host-:80", "ho st:80", ".host:80", "host.:80", "a..b:80", "*.example:80", "http://host:80", "host:80/", "host:80:80",
        "h" * 64 + ":80", "h." * 127 + "hh:80", "h" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_authority(text)
