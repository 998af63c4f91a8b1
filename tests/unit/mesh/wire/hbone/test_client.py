import pytest
from hpack import Encoder

from mesh.testing.hbone import HbonePair, StoppedClock, deliver
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import END_HEADERS, END_STREAM, PREFACE, FrameType, frame_header, goaway_frame, header_frames, rst_stream_frame
from mesh.wire.hbone import (
    GoingAway,
    HboneClient,
    HboneServer,
    Limits,
    TunnelData,
    TunnelEnded,
    TunnelRequested,
    TunnelReset,
    TunnelResponded,
)

SETTINGS = frame_header(0, FrameType.SETTINGS, 0, 0)


class Answering:
    """A client with one requested tunnel, and a hand-made server's answers."""

    def __init__(self) -> None:
        self.client = HboneClient(now=StoppedClock())
        self.encoder = Encoder()
        deliver(self.client, SETTINGS)
        self.stream = self.client.request_tunnel("10.0.0.1:80", {})
        self.client.take_outgoing()

    def headers(self, *fields: tuple[str, str], end: bool = False, stream: int | None = None) -> bytes:
        return header_frames(stream or self.stream, self.encoder.encode(fields), end_stream=end, max_frame_size=16384)


def test_the_preface_comes_first_and_a_tunnel_may_be_requested_at_once() -> None:
    client = HboneClient(now=StoppedClock())
    client.request_tunnel("10.0.0.1:80", {})
    outgoing = client.take_outgoing()
    assert outgoing.startswith(PREFACE)
    server = HboneServer(now=StoppedClock())
    assert [type(event) for event in deliver(server, outgoing)] == [TunnelRequested]


def test_an_accepted_tunnel_carries_the_answers_headers() -> None:
    pair = HbonePair()
    stream = pair.client.request_tunnel("10.0.0.1:80", {})
    pair.settle()
    pair.server.accept(stream, {"baggage": "service.name=x"})
    assert pair.settle()[0] == [TunnelResponded(stream, 200, {"baggage": "service.name=x"})]


@pytest.mark.parametrize("status", [201, 400, 401, 503])
def test_after_a_refusal_the_stream_is_gone_at_both_ends_without_a_reset_from_the_client(status: int) -> None:
    pair = HbonePair()
    stream = pair.client.request_tunnel("10.0.0.1:80", {})
    pair.settle()
    pair.server.refuse(stream, status)
    assert pair.settle() == ([TunnelResponded(stream, status, {})], [])
    assert pair.client.active_streams == pair.server.active_streams == 0


def test_the_body_of_a_refusal_is_not_wanted() -> None:
    peer = Answering()
    events = deliver(peer.client, peer.headers((":status", "503")) + frame_header(4, FrameType.DATA, END_STREAM, 1) + b"text")
    assert events == [TunnelResponded(1, 503, {})]
    assert peer.client.take_outgoing() == rst_stream_frame(1, ErrorCode.CANCEL)
    assert peer.client.active_streams == 0


def test_interim_responses_are_passed_over() -> None:
    peer = Answering()
    assert deliver(peer.client, peer.headers((":status", "100")) + peer.headers((":status", "200"))) == [TunnelResponded(1, 200, {})]


def test_a_tunnel_may_end_with_its_answer() -> None:
    peer = Answering()
    assert deliver(peer.client, peer.headers((":status", "200"), end=True)) == [TunnelResponded(1, 200, {}), TunnelEnded(1)]
    assert peer.client.sendable(1) > 0


@pytest.mark.parametrize(
    "fields",
    [
        [(":status", "2x0")],
        [],
        [(":status", "200"), (":path", "/")],
        [(":status", "200"), ("Upper", "x")],
        [("a", "b"), (":status", "200")],
        [(":status", "101")],
    ],
)
def test_a_malformed_answer_resets_its_stream_only(fields: list[tuple[str, str]]) -> None:
    peer = Answering()
    other = peer.client.request_tunnel("10.0.0.2:80", {})
    peer.client.take_outgoing()
    assert deliver(peer.client, peer.headers(*fields)) == [TunnelReset(1, ErrorCode.PROTOCOL_ERROR)]
    assert peer.client.take_outgoing() == rst_stream_frame(1, ErrorCode.PROTOCOL_ERROR)
    assert deliver(peer.client, peer.headers((":status", "200"), stream=other)) == [TunnelResponded(other, 200, {})]


def test_data_before_the_answer_resets_its_stream_only() -> None:
    peer = Answering()
    assert deliver(peer.client, frame_header(1, FrameType.DATA, 0, 1) + b"x") == [TunnelReset(1, ErrorCode.PROTOCOL_ERROR)]


@pytest.mark.parametrize("stream", [2, 3, 2**31 - 1])
def test_an_answer_on_a_stream_that_was_never_requested_ends_the_connection(stream: int) -> None:
    peer = Answering()
    with pytest.raises(RemoteProtocolError, match="nobody opened"):
        deliver(peer.client, peer.headers((":status", "200"), stream=stream))


@pytest.mark.parametrize(
    ("code", "eof", "retryable"), [(0, True, False), (8, True, False), (5, False, False), (7, False, True), (99, False, False)]
)
def test_a_reset_is_told_with_its_code_and_what_that_means(code: int, eof: bool, retryable: bool) -> None:
    peer = Answering()
    (event,) = deliver(peer.client, rst_stream_frame(1, code))
    assert event == TunnelReset(1, code)
    assert isinstance(event, TunnelReset)
    assert (event.is_eof, event.is_retryable) == (eof, retryable)
    assert peer.client.active_streams == 0


def test_what_crosses_our_reset_on_the_wire_is_passed_over() -> None:
    peer = Answering()
    deliver(peer.client, peer.headers((":status", "200")))
    peer.client.reset(1)
    peer.client.take_outgoing()
    late = frame_header(3, FrameType.DATA, 0, 1) + b"abc" + peer.headers(("grpc-status", "0"), end=True) + rst_stream_frame(1, 0)
    assert deliver(peer.client, late) == []
    assert peer.client.take_outgoing() == b""


def test_the_table_of_headers_stays_in_step_through_blocks_of_streams_that_are_gone() -> None:
    peer = Answering()
    second = peer.client.request_tunnel("10.0.0.2:80", {})
    peer.client.reset(1)
    deliver(peer.client, peer.headers((":status", "200"), ("baggage", "x=y")))
    answer = peer.headers((":status", "200"), ("baggage", "x=y"), stream=second)
    assert deliver(peer.client, answer) == [TunnelResponded(second, 200, {"baggage": "x=y"})]


def test_no_more_tunnels_than_the_peer_takes() -> None:
    pair = HbonePair(server_limits=Limits(max_concurrent_streams=2))
    assert pair.client.peer_max_concurrent_streams == 2
    assert pair.client.takes_tunnels
    first = pair.open_tunnel()
    pair.open_tunnel()
    assert not pair.client.takes_tunnels
    with pytest.raises(LocalProtocolError):
        pair.client.request_tunnel("10.0.0.1:80", {})
    pair.client.end(first)
    pair.server.end(first)
    pair.settle()
    assert pair.client.takes_tunnels


def test_goaway_takes_back_the_streams_that_the_peer_never_looked_at() -> None:
    peer = Answering()
    later = [peer.client.request_tunnel("10.0.0.1:80", {}) for _ in range(2)]
    events = deliver(peer.client, goaway_frame(1, 0))
    assert events == [GoingAway(1, 0), *(TunnelReset(stream, ErrorCode.REFUSED_STREAM) for stream in later)]
    assert peer.client.going_away
    assert not peer.client.takes_tunnels
    assert deliver(peer.client, peer.headers((":status", "200"))) == [TunnelResponded(1, 200, {})]
    assert deliver(peer.client, rst_stream_frame(later[0], 7)) == []


def test_a_later_goaway_cannot_raise_the_last_stream() -> None:
    peer = Answering()
    assert deliver(peer.client, goaway_frame(5, 0) + goaway_frame(7, 0)) == [GoingAway(5, 0), GoingAway(5, 0)]


def test_pings_and_settings_go_on_after_goaway() -> None:
    peer = Answering()
    ping = frame_header(8, FrameType.PING, 0, 0) + b"12345678"
    deliver(peer.client, goaway_frame(1, 0) + ping + SETTINGS)
    assert peer.client.take_outgoing() == frame_header(8, FrameType.PING, 1, 0) + b"12345678" + frame_header(0, FrameType.SETTINGS, 1, 0)


def test_push_is_refused() -> None:
    peer = Answering()
    with pytest.raises(RemoteProtocolError, match="PUSH_PROMISE"):
        deliver(peer.client, frame_header(5, FrameType.PUSH_PROMISE, END_HEADERS, 1) + bytes(5))


def test_data_goes_both_ways() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    assert deliver(pair.client, pair.server.data_header(stream, 2) + b"up") == [TunnelData(stream, memoryview(b"up"))]
    assert deliver(pair.server, pair.client.data_header(stream, 4, end=True) + b"down") == [
        TunnelData(stream, memoryview(b"down")),
        TunnelEnded(stream),
    ]
