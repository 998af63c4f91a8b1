import pytest

from mesh.model.address import SocketAddress
from mesh.wire.forwarded import Forwarded, parse_forwarded, parse_forwarded_host, write_forwarded

CLIENT = SocketAddress.parse("10.79.0.11:40000")


def test_it_is_written_as_the_golden_vector_has_it() -> None:
    written = write_forwarded(CLIENT, "server.default.svc.cluster.local")
    assert written == 'for="10.79.0.11:40000";host=server.default.svc.cluster.local'
    assert parse_forwarded(written) == Forwarded(CLIENT, "server.default.svc.cluster.local")


def test_the_host_is_left_out_when_no_service_was_addressed() -> None:
    assert write_forwarded(SocketAddress.parse("[fd00::1]:1"), None) == 'for="[fd00::1]:1"'
    assert parse_forwarded('for="[fd00::1]:1"') == Forwarded(SocketAddress.parse("[fd00::1]:1"), None)


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("host=a", "a"),
        ('host="a"', "a"),
        ("HOST=a", "a"),
        ("for=1.2.3.4; host=a", "a"),
        ("host=a;host=b", "a"),
        ("for=x,host=a", "a"),
        ("host=", None),
        ("host", None),
        ("", None),
        ("hosts=a", None),
        ("host=é", None),
        ('host=""', None),
        ("host=" + 253 * "a", 253 * "a"),
        ("host=" + 254 * "a", None),
    ],
)
def test_the_first_host_is_found(value: str, host: str | None) -> None:
    assert parse_forwarded_host(value) == host


@pytest.mark.parametrize("value", ["for=10.0.0.1", "for=unknown", 'for="_hidden"', 'for="10.0.0.1:0"', "for=", 'for="'])
def test_a_client_that_is_no_address_is_absent(value: str) -> None:
    assert parse_forwarded(value).client is None
