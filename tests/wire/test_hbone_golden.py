"""The bytes that a ztunnel must understand, and those that it sends (HPACK's order and coding are free)."""

from struct import iter_unpack

import pytest
from hpack import Decoder

from mesh.model.address import SocketAddress
from mesh.model.workload import Workload
from mesh.testing.hbone import StoppedClock, deliver
from mesh.wire.baggage import baggage_of
from mesh.wire.forwarded import write_forwarded
from mesh.wire.frames import DEFAULT_WINDOW, PREFACE, FrameType, frame_header, header_frames, window_update_frame
from mesh.wire.hbone import HboneClient, HboneConnection, HboneServer, TunnelRequested, TunnelResponded
from mesh.wire.headers import HeaderWriter

AUTHORITY = "10.79.0.12:8080"
HEADERS = {
    "baggage": "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=client,service.name=client,service.version=v1",
    "forwarded": 'for="10.79.0.11:43210";host=server.default.svc.cluster.local',
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
}

METHOD = bytes.fromhex("4207434f4e4e454354")  # CONNECT, into the table
TARGET = bytes.fromhex("010f31302e37392e302e31323a38303830")  # a literal without indexing
BAGGAGE = bytes.fromhex(  # into the table
    "400762616767616765786b38732e636c75737465722e6e616d653d4b756265726e657465732c6b38732e6e616d6573706163652e6e616d653d64656661756c742c"
    "6b38732e6465706c6f796d656e742e6e616d653d636c69656e742c736572766963652e6e616d653d636c69656e742c736572766963652e76657273696f6e3d7631"
)
CHANGING = bytes.fromhex(  # forwarded and traceparent, literals without indexing
    "0009666f727761726465643c666f723d2231302e37392e302e31313a3433323130223b686f73743d7365727665722e64656661756c742e7376632e636c75737465"
    "722e6c6f63616c000b7472616365706172656e743730302d30616637363531393136636434336464383434386562323131633830333139632d6237616436623731"
    "36393230333333312d3030"
)
OURS_FIRST = METHOD + TARGET + BAGGAGE + CHANGING
OURS_LATER = b"\xbf" + TARGET + b"\xbe" + CHANGING
# As an encoder writes it that indexes and Huffman-codes everything, like the h2 crate under ztunnel.
FOREIGN = bytes.fromhex(
    "4287bdab4e9c17b7ff418b081775f5c0b84571e03c0f40858c734c398bd6eaf2172516a125b17a874960cd6c65b2a2a4a8faeaf217a87495158c855ea1d258242c"
    "a3b684fd75790bc85ae83faa4b5257a87496025062d49fa416cee62157a87496025062d49fa416cee62157ee5b1063d50770ff408794f6781d92164fac94f641fc"
    "840bbafae05c21b8d322083f9fb9ce84c082d9dcb62f21651db425747722e4a2d424b62f41c83a3f40884d83216b1d85a93fa7001600e575c6c2f85c248d33248f"
    "34d3c58c41091e03217c8b46e8e4723742e3e2032cb215800f"
)
FIELDS = [(":method", "CONNECT"), (":authority", AUTHORITY), *HEADERS.items()]


def test_the_golden_headers_are_what_we_say_of_the_golden_client() -> None:
    client = Workload("uid", "client-1", "default", workload_name="client", canonical_name="client", canonical_revision="v1")
    assert baggage_of(client) == HEADERS["baggage"]
    assert write_forwarded(SocketAddress.parse("10.79.0.11:43210"), "server.default.svc.cluster.local") == HEADERS["forwarded"]


def test_a_connect_is_written_in_these_bytes() -> None:
    writer, decoder = HeaderWriter(), Decoder()
    assert writer.request(AUTHORITY, HEADERS) == OURS_FIRST
    assert writer.request(AUTHORITY, HEADERS) == OURS_LATER
    assert decoder.decode(OURS_FIRST) == decoder.decode(OURS_LATER) == FIELDS


@pytest.mark.parametrize("block", [OURS_FIRST, FOREIGN])
def test_a_connect_is_read_from_these_bytes(block: bytes) -> None:
    server = HboneServer(now=StoppedClock())
    wire = PREFACE + frame_header(0, FrameType.SETTINGS, 0, 0) + header_frames(1, block, end_stream=False, max_frame_size=16384)
    assert deliver(server, wire) == [TunnelRequested(1, AUTHORITY, SocketAddress.parse(AUTHORITY), HEADERS)]


def test_an_answer_is_read_from_these_bytes() -> None:
    client = HboneClient(now=StoppedClock())
    client.request_tunnel(AUTHORITY, HEADERS)
    block = bytes.fromhex("8840858c734c398b") + b"\x03a=b"
    wire = frame_header(0, FrameType.SETTINGS, 0, 0) + header_frames(1, block, end_stream=False, max_frame_size=16384)
    assert deliver(client, wire) == [TunnelResponded(1, 200, {"baggage": "a=b"})]


@pytest.mark.parametrize(
    ("core", "preface", "advertised"),
    [
        (HboneClient, PREFACE, {2: 0, 4: 4 << 20, 5: 1 << 20, 6: 16_384}),
        (HboneServer, b"", {3: 200, 4: 4 << 20, 5: 1 << 20, 6: 65_536}),
    ],
)
def test_we_advertise_what_ztunnel_does(core: type[HboneConnection], preface: bytes, advertised: dict[int, int]) -> None:
    outgoing = core(now=StoppedClock()).take_outgoing()
    assert outgoing.startswith(preface)
    settings = outgoing[len(preface) :]
    length = int.from_bytes(settings[:3])
    said = dict(iter_unpack(">HI", settings[9 : 9 + length]))
    assert said == advertised
    assert settings[9 + length :] == window_update_frame(0, (16 << 20) - DEFAULT_WINDOW)
