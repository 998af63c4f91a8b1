import pytest
from hpack import Encoder

from mesh.model.address import SocketAddress
from mesh.testing.hbone import HbonePair, StoppedClock, deliver
from mesh.wire.authority import HostPort
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import (
    END_STREAM,
    MAX_STREAM_ID,
    PREFACE,
    FrameType,
    frame_header,
    goaway_frame,
    header_frames,
    rst_stream_frame,
)
from mesh.wire.hbone import (
    GoingAway,
    HboneServer,
    Limits,
    RequestRefused,
    TunnelData,
    TunnelEnded,
    TunnelRequested,
    TunnelReset,
    TunnelResponded,
)
from mesh.wire.headers import HeaderReader, parse_response

SETTINGS = frame_header(0, FrameType.SETTINGS, 0, 0)
CONNECT = ((":method", "CONNECT"), (":authority", "10.0.0.1:80"))


class Asking:
    """A server, and a hand-made client's requests."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.clock = StoppedClock()
        self.server = HboneServer(now=self.clock, limits=limits or Limits())
        self.encoder = Encoder()
        deliver(self.server, PREFACE + SETTINGS)
        self.server.take_outgoing()

    def headers(self, stream: int, *fields: tuple[str, str], end: bool = False) -> bytes:
        return header_frames(stream, self.encoder.encode(fields), end_stream=end, max_frame_size=16384)


def status_of(outgoing: bytes) -> tuple[int, bool]:
    """The status in the HEADERS at the beginning of what a server sent, and whether they end their stream."""
    length = int.from_bytes(outgoing[:3])
    assert outgoing[3] == FrameType.HEADERS
    return parse_response(HeaderReader(65536).read(outgoing[9 : 9 + length])).status, outgoing[4] & END_STREAM != 0


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    return frame_header(len(payload), FrameType.DATA, flags, stream) + payload


def test_a_connect_is_reported_with_its_target_and_headers() -> None:
    peer = Asking()
    events = deliver(peer.server, peer.headers(1, *CONNECT, ("baggage", "a=b"), ("baggage", "c=d")))
    assert events == [TunnelRequested(1, "10.0.0.1:80", SocketAddress.parse("10.0.0.1:80"), {"baggage": "a=b,c=d"})]


def test_a_hostname_is_a_target_too() -> None:
    peer = Asking()
    (event,) = deliver(peer.server, peer.headers(1, (":authority", "a.default.svc.cluster.local:80"), (":method", "CONNECT")))
    assert isinstance(event, TunnelRequested)
    assert event.target == HostPort("a.default.svc.cluster.local", 80)


@pytest.mark.parametrize(
    ("because", "fields"),
    [
        ("expected method CONNECT, got GET", [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "10.0.0.1:80")]),
        ("no valid authority pseudo header: invalid authority: ''", [(":method", "CONNECT")]),
        ("no valid authority pseudo header: invalid authority: '10.0.0.1'", [(":method", "CONNECT"), (":authority", "10.0.0.1")]),
    ],
)
def test_no_connect_to_a_valid_authority_is_answered_with_400_and_the_connection_goes_on(
    because: str, fields: list[tuple[str, str]]
) -> None:
    peer = Asking()
    assert deliver(peer.server, peer.headers(1, *fields)) == [RequestRefused(1, 400, because)]
    outgoing = peer.server.take_outgoing()
    assert outgoing.endswith(rst_stream_frame(1, ErrorCode.NO_ERROR))
    assert status_of(outgoing) == (400, True)
    assert peer.server.active_streams == 0
    assert [type(event) for event in deliver(peer.server, data(1, b"late") + peer.headers(3, *CONNECT))] == [TunnelRequested]


def test_a_complete_wrong_request_is_answered_without_a_reset() -> None:
    peer = Asking()
    request = peer.headers(1, (":method", "GET"), (":scheme", "https"), (":path", "/"), end=True)
    assert [type(event) for event in deliver(peer.server, request)] == [RequestRefused]
    outgoing = peer.server.take_outgoing()
    assert status_of(outgoing) == (400, True)
    assert len(outgoing) == 9 + outgoing[2], "nothing follows"


@pytest.mark.parametrize(
    "fields",
    [
        [*CONNECT, (":path", "/")],
        [*CONNECT, ("connection", "close")],
        [*CONNECT, ("Baggage", "x")],
        [("baggage", "x"), *CONNECT],
        [*CONNECT, (":authority", "10.0.0.2:80")],
        [],
    ],
)
def test_a_malformed_request_is_answered_with_400_and_a_protocol_error_on_its_stream(fields: list[tuple[str, str]]) -> None:
    peer = Asking()
    (event,) = deliver(peer.server, peer.headers(1, *fields))
    assert isinstance(event, RequestRefused)
    assert event.because.startswith("malformed request: ")
    outgoing = peer.server.take_outgoing()
    assert outgoing.endswith(rst_stream_frame(1, ErrorCode.PROTOCOL_ERROR))
    assert status_of(outgoing) == (400, True)


def test_data_may_come_before_the_answer() -> None:
    peer = Asking()
    events = deliver(peer.server, peer.headers(1, *CONNECT) + data(1, b"early", END_STREAM))
    assert events[1:] == [TunnelData(1, memoryview(b"early")), TunnelEnded(1)]
    peer.server.accept(1, {})
    peer.server.end(1)
    assert peer.server.active_streams == 0


def test_a_request_may_come_with_its_end() -> None:
    peer = Asking()
    events = deliver(peer.server, peer.headers(1, *CONNECT, end=True))
    assert [type(event) for event in events] == [TunnelRequested, TunnelEnded]


@pytest.mark.parametrize("stream", [2, 4, MAX_STREAM_ID - 1])
def test_a_client_opens_odd_streams_only(stream: int) -> None:
    peer = Asking()
    with pytest.raises(RemoteProtocolError):
        deliver(peer.server, peer.headers(stream, *CONNECT))


def test_streams_only_rise() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(5, *CONNECT))
    with pytest.raises(RemoteProtocolError, match="HEADERS on stream 3 after 5"):
        deliver(peer.server, peer.headers(3, *CONNECT))
    assert peer.server.take_outgoing() == goaway_frame(5, ErrorCode.PROTOCOL_ERROR, b"HEADERS on stream 3 after 5")


@pytest.mark.parametrize(
    "frame",
    [data(7, b"x"), data(2, b"x"), rst_stream_frame(7, 0), frame_header(4, FrameType.WINDOW_UPDATE, 0, 7) + b"\0\0\0\1"],
    ids=["DATA", "DATA on an even stream", "RST_STREAM", "WINDOW_UPDATE"],
)
def test_a_frame_on_an_idle_stream_ends_the_connection(frame: bytes) -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT))
    with pytest.raises(RemoteProtocolError, match="nobody opened"):
        deliver(peer.server, frame)


def test_data_after_the_end_resets_the_stream() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT, end=True))
    assert deliver(peer.server, data(1, b"x")) == [TunnelReset(1, ErrorCode.STREAM_CLOSED)]


def test_data_on_a_closed_stream_is_answered_with_one_reset() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT) + rst_stream_frame(1, 8))
    assert deliver(peer.server, data(1, b"x") + data(1, b"y") + rst_stream_frame(1, 8)) == []
    assert peer.server.take_outgoing() == rst_stream_frame(1, ErrorCode.STREAM_CLOSED)


def test_trailers_end_a_tunnel_cleanly() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT))
    peer.server.accept(1, {})
    assert deliver(peer.server, peer.headers(1, ("x-checksum", "1"), end=True)) == [TunnelEnded(1)]
    assert peer.server.sendable(1) > 0


@pytest.mark.parametrize(("fields", "end"), [([("x", "y")], False), ([(":method", "CONNECT")], True)])
def test_headers_amid_a_tunnel_that_are_no_trailers_reset_it(fields: list[tuple[str, str]], end: bool) -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT))
    assert deliver(peer.server, peer.headers(1, *fields, end=end)) == [TunnelReset(1, ErrorCode.PROTOCOL_ERROR)]


def test_headers_after_the_end_reset_the_stream() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT, end=True))
    assert deliver(peer.server, peer.headers(1, ("x", "y"), end=True)) == [TunnelReset(1, ErrorCode.STREAM_CLOSED)]


def test_streams_over_the_limit_are_refused_and_may_be_retried() -> None:
    peer = Asking(Limits(max_concurrent_streams=2))
    events = deliver(peer.server, b"".join(peer.headers(stream, *CONNECT) for stream in (1, 3, 5)))
    assert [event.stream for event in events if isinstance(event, TunnelRequested)] == [1, 3]
    assert peer.server.take_outgoing() == rst_stream_frame(5, ErrorCode.REFUSED_STREAM)
    peer.server.reset(1)
    assert [type(event) for event in deliver(peer.server, peer.headers(7, *CONNECT))] == [TunnelRequested]


def test_answers_to_a_stream_that_is_gone_do_nothing() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT) + rst_stream_frame(1, 8))
    peer.server.accept(1, {})
    peer.server.refuse(1, 503)
    peer.server.consumed(1, 5)
    peer.server.end(1)
    peer.server.reset(1)
    assert peer.server.sendable(1) == 0
    assert peer.server.take_outgoing() == b""


def test_a_second_answer_is_our_own_mistake() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT))
    peer.server.accept(1, {})
    with pytest.raises(LocalProtocolError):
        peer.server.accept(1, {})
    with pytest.raises(LocalProtocolError):
        peer.server.refuse(1, 503)


def test_nothing_is_sent_on_a_tunnel_before_it_is_answered() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT))
    assert peer.server.sendable(1) == 0
    with pytest.raises(LocalProtocolError):
        peer.server.data_header(1, 1)
    with pytest.raises(LocalProtocolError):
        peer.server.end(1)


def test_draining_says_goodbye_in_two_steps_and_serves_what_comes_in_between() -> None:
    pair = HbonePair()
    pair.open_tunnel()
    pair.server.drain()
    assert pair.server.going_away
    between = pair.client.request_tunnel("10.0.0.1:80", {})  # the client does not know yet
    at_client, at_server = pair.settle()
    assert [event for event in at_client if isinstance(event, GoingAway)] == [GoingAway(MAX_STREAM_ID, 0), GoingAway(between, 0)]
    assert [event.stream for event in at_server if isinstance(event, TunnelRequested)] == [between]
    pair.server.accept(between, {})
    assert pair.settle()[0] == [TunnelResponded(between, 200, {})]


def test_streams_above_the_last_one_of_our_goaway_are_passed_over() -> None:
    peer = Asking()
    deliver(peer.server, peer.headers(1, *CONNECT))
    peer.server.go_away()
    assert peer.server.take_outgoing() == goaway_frame(1, 0)
    assert deliver(peer.server, peer.headers(3, *CONNECT, ("baggage", "x")) + data(3, b"x")) == []
    assert peer.server.take_outgoing() == b""
    peer.server.go_away(ErrorCode.NO_ERROR, 99)
    assert peer.server.take_outgoing() == goaway_frame(1, 0), "a later GOAWAY says no more than an earlier one"
    assert deliver(peer.server, data(1, b"x")) == [TunnelData(1, memoryview(b"x"))]


def test_a_forged_answer_to_the_goodbye_ping_changes_nothing_before_it_was_sent() -> None:
    peer = Asking()
    assert deliver(peer.server, frame_header(8, FrameType.PING, 1, 0) + b"\xffgoodbye") == []
    assert not peer.server.going_away
