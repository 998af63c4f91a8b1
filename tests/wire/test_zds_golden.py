"""ZDS packets as a foreign node proxy and CNI agent write them (golden bytes computed from Istio's zds.proto)."""

from __future__ import annotations

import pytest

from mesh.wire.errors import RemoteProtocolError
from mesh.wire.zds import (
    MAX_PACKET,
    Add,
    Keep,
    Remove,
    SnapshotSent,
    WorkloadInfo,
    WorkloadRequest,
    encode_hello,
    encode_request,
    encode_response,
    parse_hello,
    parse_request,
    parse_response,
)

GOLDEN: list[tuple[WorkloadRequest, str]] = [
    (
        Add("uid-0", WorkloadInfo("client", "default", "client")),
        "0a220a057569642d3012190a06636c69656e74120764656661756c741a06636c69656e74",
    ),
    (Keep("uid-0"), "2a070a057569642d30"),
    (Remove("uid-0"), "120712057569642d30"),
    (SnapshotSent(), "1a00"),
]


@pytest.mark.parametrize(("request_", "golden"), GOLDEN)
def test_requests_are_istios_bytes_both_ways(request_: WorkloadRequest, golden: str) -> None:
    assert encode_request(request_).hex() == golden
    assert parse_request(bytes.fromhex(golden)) == request_


def test_hello_and_responses_are_istios_bytes_both_ways() -> None:
    assert encode_hello().hex() == "0801"
    assert parse_hello(b"\x08\x01") == 1
    assert parse_hello(b"") == 0
    assert encode_response().hex() == "0a00"
    assert encode_response("x").hex() == "0a030a0178"
    assert parse_response(bytes.fromhex("0a00")) == ""
    assert parse_response(bytes.fromhex("0a030a0178")) == "x"


def test_an_add_without_workload_is_read_as_such() -> None:
    assert parse_request(bytes.fromhex("0a070a057569642d30")) == Add("uid-0", None)


@pytest.mark.parametrize(
    "packet",
    ["", "0a", "0aff", "0a050a03", "1a01", "00", "0b", "1aff" * 6, "0a030a01ff", "0a04120208", "8080808080808080808001"],
)
def test_malformed_requests_are_refused(packet: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_request(bytes.fromhex(packet))


def test_packets_longer_than_a_peer_s_buffer_are_neither_written_nor_read() -> None:
    assert len(encode_response("ü" * 2000)) <= MAX_PACKET
    assert parse_response(encode_response("ü" * 2000)).startswith("üü")
    with pytest.raises(RemoteProtocolError, match="packet of"):
        parse_request(encode_request(Keep("x" * MAX_PACKET)))
