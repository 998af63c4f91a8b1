from struct import pack

import pytest
from hpack import Encoder

from mesh.testing.hbone import HbonePair, StoppedClock, deliver, payload_of
from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from mesh.wire.frames import (
    DEFAULT_WINDOW,
    END_STREAM,
    MAX_WINDOW,
    PADDED,
    PRIORITY_FLAG,
    FrameType,
    frame_header,
    header_frames,
    rst_stream_frame,
    window_update_frame,
)
from mesh.wire.hbone import (
    HboneClient,
    Limits,
    MoreStreamsAllowed,
    PingAcknowledged,
    TunnelData,
    TunnelEnded,
    TunnelRequested,
    TunnelReset,
    WindowOpened,
)
from mesh.wire.hbone.connection import HboneConnection
from mesh.wire.hbone.streams import Signal

SMALL = Limits(stream_window=1000, connection_window=70_000, max_frame_size=16384)


def settings(*pairs: tuple[int, int]) -> bytes:
    payload = b"".join(pack(">HI", *pair) for pair in pairs)
    return frame_header(len(payload), FrameType.SETTINGS, 0, 0) + payload


INITIAL_WINDOW, FRAME_SIZE, TABLE_SIZE, MAX_STREAMS = 4, 5, 1, 3


def data(stream: int, length: int, flags: int = 0) -> bytes:
    return frame_header(length, FrameType.DATA, flags, stream) + bytes(length)


def error_of(core: HboneConnection, wire: bytes) -> int:
    with pytest.raises(RemoteProtocolError) as caught:
        deliver(core, wire)
    return caught.value.code


# --- windows ------------------------------------------------------------------------------------------------------------------------------


def test_both_ends_know_the_windows_and_frame_sizes_of_ztunnel() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    for core in (pair.client, pair.server):
        assert core.sendable(stream) == 4 << 20
        assert core.max_frame_size == 1 << 20
        assert core.settings_received
    assert pair.client.peer_max_concurrent_streams == 200


def test_a_sender_stops_at_the_streams_window_and_goes_on_when_bytes_have_moved_on() -> None:
    pair = HbonePair(server_limits=SMALL)
    stream = pair.open_tunnel()
    deliver(pair.server, pair.client.data_header(stream, 1000) + bytes(1000))
    assert pair.client.sendable(stream) == 0
    with pytest.raises(LocalProtocolError):
        pair.client.data_header(stream, 1)
    pair.server.consumed(stream, 249)
    assert pair.settle() == ([], []), "credit goes back in portions"
    pair.server.consumed(stream, 1)
    assert pair.settle() == ([WindowOpened(stream)], [])
    assert pair.client.sendable(stream) == 250


def test_a_slow_tunnel_does_not_starve_the_others() -> None:
    pair = HbonePair(server_limits=Limits(stream_window=60_000, connection_window=70_000))
    slow, fast = pair.open_tunnel(), pair.open_tunnel()
    deliver(pair.server, pair.client.data_header(slow, 16384) + bytes(16384))
    for _ in range(50):
        deliver(pair.server, pair.client.data_header(fast, 16384) + bytes(16384))
        pair.server.consumed(fast, 16384)
        pair.settle()
    assert pair.client.sendable(fast) >= 16384


def test_the_connections_window_stops_all_streams_and_opens_for_all() -> None:
    pair = HbonePair(server_limits=Limits(stream_window=1 << 20, connection_window=DEFAULT_WINDOW))
    first, second = pair.open_tunnel(), pair.open_tunnel()
    wire = pair.client.data_header(first, DEFAULT_WINDOW) + bytes(DEFAULT_WINDOW)
    assert pair.client.sendable(first) == pair.client.sendable(second) == 0
    deliver(pair.server, wire)
    assert pair.settle() == ([WindowOpened(None)], [])
    assert pair.client.sendable(second) == DEFAULT_WINDOW


def test_a_peer_that_sends_beyond_a_streams_window_loses_that_stream() -> None:
    pair = HbonePair(server_limits=SMALL)
    stream, other = pair.open_tunnel(), pair.open_tunnel()
    events = deliver(pair.server, data(stream, 1000) + data(stream, 1) + data(stream, 5) + data(other, 1))
    assert events[1:] == [TunnelReset(stream, ErrorCode.FLOW_CONTROL_ERROR), TunnelData(other, memoryview(b"\0"))]
    assert pair.server.take_outgoing() == rst_stream_frame(stream, ErrorCode.FLOW_CONTROL_ERROR)


def test_a_frame_larger_than_the_streams_window_is_refused_before_its_payload_is_handed_on() -> None:
    pair = HbonePair(server_limits=SMALL)
    stream = pair.open_tunnel()
    assert deliver(pair.server, data(stream, 1001)) == [TunnelReset(stream, ErrorCode.FLOW_CONTROL_ERROR)]


def test_padding_comes_back_by_itself() -> None:
    pair = HbonePair(server_limits=SMALL)
    stream = pair.open_tunnel()
    padded = frame_header(201, FrameType.DATA, PADDED, stream) + b"\xc8" + bytes(200)
    for _ in range(100):
        assert deliver(pair.server, padded) == []
    assert window_update_frame(stream, 402) in pair.server.take_outgoing()


def test_a_peer_that_sends_beyond_the_connections_window_loses_the_connection() -> None:
    pair = HbonePair(server_limits=Limits(stream_window=1 << 20, connection_window=DEFAULT_WINDOW))
    stream = pair.open_tunnel()
    assert error_of(pair.server, data(stream, DEFAULT_WINDOW + 1)) == ErrorCode.FLOW_CONTROL_ERROR


def test_data_on_closed_streams_counts_for_the_connections_window_and_comes_back() -> None:
    pair = HbonePair(server_limits=Limits(stream_window=60_000, connection_window=DEFAULT_WINDOW))
    stream = pair.open_tunnel()
    pair.server.reset(stream)
    pair.server.take_outgoing()
    deliver(pair.server, data(stream, 30_000) + data(stream, 30_000))
    assert pair.server.take_outgoing() == window_update_frame(0, 60_000)


def test_credit_that_is_held_stops_the_peer_and_comes_back_at_once() -> None:
    pair = HbonePair(server_limits=Limits(stream_window=60_000, connection_window=DEFAULT_WINDOW))
    stream = pair.open_tunnel()
    pair.server.hold_credit(True)
    deliver(pair.server, data(stream, 50_000))
    assert pair.server.take_outgoing() == b""
    pair.server.hold_credit(False)
    assert pair.server.take_outgoing() == window_update_frame(0, 50_000)
    pair.server.hold_credit(False)
    assert pair.server.take_outgoing() == b""


def test_settings_move_the_windows_of_living_streams_below_zero_too() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    deliver(pair.client, settings((INITIAL_WINDOW, 5000)))
    pair.client.data_header(stream, 4000)
    deliver(pair.client, settings((INITIAL_WINDOW, 100)))
    assert pair.client.sendable(stream) == 0
    assert deliver(pair.client, window_update_frame(stream, 3900)) == []
    assert deliver(pair.client, window_update_frame(stream, 10)) == [WindowOpened(stream)]
    assert pair.client.sendable(stream) == 10
    assert pair.client.sendable(pair.client.request_tunnel("10.0.0.1:80", {})) == 100


def test_settings_can_open_a_window() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    deliver(pair.client, settings((INITIAL_WINDOW, 0)))
    assert pair.client.sendable(stream) == 0
    assert deliver(pair.client, settings((INITIAL_WINDOW, 7))) == [WindowOpened(stream)]


def test_a_raised_number_of_streams_is_told() -> None:
    pair = HbonePair()
    for allowed, events in ((2, []), (2, []), (1, []), (3, [MoreStreamsAllowed()])):
        assert deliver(pair.client, settings((MAX_STREAMS, allowed))) == events
        assert pair.client.peer_max_concurrent_streams == allowed
    assert deliver(pair.client, settings((FRAME_SIZE, 20_000))) == []


def test_an_empty_end_passes_a_closed_window() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    deliver(pair.client, settings((INITIAL_WINDOW, 0)))
    pair.client.data_header(stream, 0, end=True)
    assert pair.client.sendable(stream) == 0


def test_windows_beyond_2_to_the_31_are_errors() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    assert deliver(pair.client, window_update_frame(stream, MAX_WINDOW)) == [TunnelReset(stream, ErrorCode.FLOW_CONTROL_ERROR)]
    assert error_of(pair.client, window_update_frame(0, MAX_WINDOW)) == ErrorCode.FLOW_CONTROL_ERROR
    pair = HbonePair()
    stream = pair.open_tunnel()
    deliver(pair.client, window_update_frame(stream, 100))
    assert error_of(pair.client, settings((INITIAL_WINDOW, MAX_WINDOW))) == ErrorCode.FLOW_CONTROL_ERROR


def test_window_updates_by_zero_are_errors_of_their_stream_or_of_the_connection() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    assert deliver(pair.client, window_update_frame(stream, 0)) == [TunnelReset(stream, ErrorCode.PROTOCOL_ERROR)]
    assert deliver(pair.client, window_update_frame(stream, 0)) == []
    assert error_of(pair.client, window_update_frame(0, 0)) == ErrorCode.PROTOCOL_ERROR


def test_giving_back_more_than_came_is_our_own_mistake() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    deliver(pair.server, pair.client.data_header(stream, 10) + bytes(10))
    pair.server.consumed(stream, 10)
    with pytest.raises(LocalProtocolError):
        pair.server.consumed(stream, 1)


def test_no_frame_is_larger_than_the_peer_takes() -> None:
    pair = HbonePair(server_limits=Limits(max_frame_size=20_000))
    stream = pair.open_tunnel()
    with pytest.raises(LocalProtocolError):
        pair.client.data_header(stream, 20_001)
    assert len(pair.client.data_header(stream, 20_000)) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        {"stream_window": 0},
        {"connection_window": 65_534},
        {"max_frame_size": 16_383},
        {"max_frame_size": 1 << 24},
        {"stream_window": 1 << 31},
    ],
)
def test_limits_that_settings_cannot_say_do_not_exist(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Limits(**wrong)


# --- ends ---------------------------------------------------------------------------------------------------------------------------------


def test_a_half_closed_tunnel_goes_on_in_the_other_direction() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    pair.client.end(stream)
    pair.client.end(stream)
    assert pair.settle() == ([], [TunnelEnded(stream)])
    assert pair.client.sendable(stream) == 0
    wire = pair.server.data_header(stream, 3) + b"abc"
    assert payload_of(deliver(pair.client, wire), stream) == b"abc"
    pair.server.end(stream)
    assert pair.settle() == ([TunnelEnded(stream)], [])
    assert pair.client.active_streams == pair.server.active_streams == 0


def test_a_reset_reaches_the_other_end_with_its_code() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    pair.server.reset(stream, ErrorCode.CONNECT_ERROR)
    assert pair.settle() == ([TunnelReset(stream, ErrorCode.CONNECT_ERROR)], [])
    assert pair.client.active_streams == pair.server.active_streams == 0


def test_after_a_protocol_error_goaway_is_outgoing_and_nothing_is_received_any_more() -> None:
    pair = HbonePair()
    stream = pair.open_tunnel()
    with pytest.raises(RemoteProtocolError, match="DATA on stream 0"):
        deliver(pair.server, data(0, 1))
    outgoing = pair.server.take_outgoing()
    assert outgoing[9:17] == pack(">II", stream, ErrorCode.PROTOCOL_ERROR)
    assert b"DATA on stream 0" in outgoing
    with pytest.raises(RemoteProtocolError, match="DATA on stream 0"):
        deliver(pair.server, data(stream, 1))
    assert pair.server.take_outgoing() == b""
    assert pair.server.going_away


# --- settings and pings -------------------------------------------------------------------------------------------------------------------


def test_pings_are_answered_and_ours_come_back() -> None:
    pair = HbonePair()
    pair.client.ping(b"12345678")
    assert pair.settle() == ([PingAcknowledged(b"12345678")], [])
    for wrong in (b"", b"123456789", b"\xff1234567"):
        with pytest.raises(LocalProtocolError):
            pair.client.ping(wrong)


@pytest.mark.parametrize(
    ("code", "wire"),
    [
        (ErrorCode.PROTOCOL_ERROR, settings((2, 2))),
        (ErrorCode.FLOW_CONTROL_ERROR, settings((INITIAL_WINDOW, 1 << 31))),
        (ErrorCode.PROTOCOL_ERROR, settings((FRAME_SIZE, 16383))),
        (ErrorCode.PROTOCOL_ERROR, settings((FRAME_SIZE, 1 << 24))),
    ],
)
def test_settings_out_of_range_end_the_connection(code: ErrorCode, wire: bytes) -> None:
    pair = HbonePair()
    assert error_of(pair.server, wire) == code
    assert pair.server.take_outgoing()[3] == FrameType.GOAWAY


def test_unknown_settings_are_passed_over_and_not_kept() -> None:
    pair = HbonePair()
    deliver(pair.server, settings(*((identifier, 1) for identifier in range(100, 2000)), (INITIAL_WINDOW, 77)))
    assert pair.server.take_outgoing() == frame_header(0, FrameType.SETTINGS, 1, 0)
    stream = pair.open_tunnel()
    assert pair.server.sendable(stream) == 77


def test_a_peer_without_a_header_table_is_written_to_without_one() -> None:
    pair = HbonePair()
    deliver(pair.client, settings((TABLE_SIZE, 0)))
    for _ in range(3):
        pair.client.request_tunnel("10.0.0.1:80", {"baggage": "a=b"})
        _, events = pair.settle()
        assert [event.headers for event in events if isinstance(event, TunnelRequested)] == [{"baggage": "a=b"}]


# --- floods: see patience.py --------------------------------------------------------------------------------------------------------------


def connect(encoder: Encoder, stream: int) -> bytes:
    fields = [(":method", "CONNECT"), (":authority", "10.0.0.1:80")]
    return header_frames(stream, encoder.encode(fields), end_stream=False, max_frame_size=16384)


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(frame_header(8, FrameType.PING, 0, 0) + bytes(8), id="PING"),
        pytest.param(settings(), id="SETTINGS"),
        pytest.param(data(1, 0), id="empty DATA"),
        pytest.param(frame_header(5, FrameType.PRIORITY, 0, 1) + bytes(5), id="PRIORITY"),
        pytest.param(frame_header(0, 0x42, 0, 0), id="unknown frames"),
        pytest.param(frame_header(1, FrameType.DATA, PADDED, 1) + b"\0", id="DATA of nothing but padding"),
    ],
)
def test_a_flood_ends_the_connection(flood: bytes) -> None:
    pair = HbonePair()
    pair.open_tunnel()
    assert error_of(pair.server, flood * 3000) == ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(("answered", "enough"), [(False, 500), (True, 2500)])
def test_rapid_resets_end_the_connection_sooner_if_they_come_before_the_answer(answered: bool, enough: int) -> None:
    pair = HbonePair()
    encoder = Encoder()

    def open_and_reset() -> None:
        for stream in range(1, 2 * enough, 2):
            deliver(pair.server, connect(encoder, stream))
            if answered:
                pair.server.accept(stream, {})
            deliver(pair.server, rst_stream_frame(stream, ErrorCode.CANCEL))

    with pytest.raises(RemoteProtocolError, match="RST_STREAM") as caught:
        open_and_reset()
    assert caught.value.code == ErrorCode.ENHANCE_YOUR_CALM


def test_making_us_reset_streams_is_no_way_around_it() -> None:
    pair = HbonePair()
    encoder = Encoder()
    wire = b"".join(connect(encoder, stream) + window_update_frame(stream, 0) for stream in range(1, 1001, 2))
    with pytest.raises(RemoteProtocolError, match="stream errors"):
        deliver(pair.server, wire)


def test_a_client_that_asks_badly_again_and_again_is_left() -> None:
    pair = HbonePair()
    block = Encoder().encode([(":method", "GET"), (":scheme", "https"), (":path", "/")], huffman=False)
    with pytest.raises(RemoteProtocolError, match="bad requests"):
        deliver(pair.server, b"".join(frame_header(len(block), FrameType.HEADERS, 5, stream) + block for stream in range(1, 2001, 2)))


def test_two_hundred_tunnels_dropped_at_once_are_no_flood_nor_is_what_was_under_way_on_them() -> None:
    pair = HbonePair()
    streams = [pair.client.request_tunnel("10.0.0.1:80", {}) for _ in range(200)]
    pair.settle()
    under_way = b"".join(pair.client.data_header(stream, 1000) + bytes(1000) for stream in streams for _ in range(20))
    for stream in streams[:100]:
        pair.server.reset(stream)
    deliver(pair.server, under_way)
    for stream in streams:
        pair.client.reset(stream)
    pair.settle()
    assert pair.server.active_streams == 0
    assert not pair.server.going_away


def test_thousands_of_short_tunnels_are_no_flood() -> None:
    pair = HbonePair()
    for _ in range(3000):
        stream = pair.client.request_tunnel("10.0.0.1:80", {})
        pair.settle()
        pair.server.accept(stream, {})
        pair.client.end(stream)
        pair.server.end(stream)
        pair.settle()
        deliver(pair.server, window_update_frame(stream, 1))  # a peer's last words on a stream that is over
    assert pair.server.active_streams == 0


def test_priority_in_headers_is_passed_over() -> None:
    pair = HbonePair()
    block = Encoder().encode([(":method", "CONNECT"), (":authority", "a:1")])
    wire = frame_header(5 + len(block), FrameType.HEADERS, 4 | PRIORITY_FLAG | END_STREAM, 1) + bytes(5) + block
    assert [type(event) for event in deliver(pair.server, wire)] == [TunnelRequested, TunnelEnded]


# --- one frame that comes alone -----------------------------------------------------------------------------------------------------------


def taken_alone(core: HboneConnection, wire: bytes) -> bool:
    """Whether it is taken without `receive`; nothing may have changed if it is not."""
    before = {stream.id: (stream.receive_window, stream.owed) for stream in core._streams.values()}, core._receive_window
    taken = core.receive_lone_data(memoryview(wire + b"rest of the buffer"), len(wire)) is not None
    after = {stream.id: (stream.receive_window, stream.owed) for stream in core._streams.values()}, core._receive_window
    assert taken == (before != after)
    return taken


def test_one_whole_frame_of_payload_is_taken_alone_and_nothing_else_is() -> None:
    pair = HbonePair(server_limits=SMALL)
    stream = pair.open_tunnel()
    assert taken_alone(pair.server, data(stream, 1))
    assert taken_alone(pair.server, data(stream, 999))
    assert not taken_alone(pair.server, data(stream, 1)), "beyond the stream's window"
    other = pair.open_tunnel()
    for wire in (
        data(other, 0),
        data(other, 5, END_STREAM),
        data(other, 5, PADDED),
        data(other, 5)[:-1],
        data(other, 5) + b"\0",
        data(other, 5) + data(other, 5),
        data(other, 5)[:9],
        b"",
        data(0, 5),
        data(other + 2, 5),
        data(other | 1 << 31, 5),
        frame_header(8, FrameType.PING, 0, other) + bytes(8),
        frame_header(5, FrameType.HEADERS, 0, other) + bytes(5),
    ):
        assert not taken_alone(pair.server, wire), wire
    assert taken_alone(pair.server, data(other, 5))


def test_nothing_is_taken_alone_while_another_frame_is_half_read() -> None:
    """What looks like a frame is the payload of the one that it is cut out of."""
    pair = HbonePair(server_limits=SMALL)
    stream = pair.open_tunnel()
    inner = data(stream, 20)
    for cut in range(1, 10):
        outer = frame_header(len(inner), FrameType.DATA, 0, stream)
        start = deliver(pair.server, outer[:cut])
        assert not taken_alone(pair.server, inner)
        assert payload_of(start + deliver(pair.server, outer[cut:] + inner), stream) == inner
    assert taken_alone(pair.server, inner)


def test_nothing_is_taken_alone_within_a_header_block_nor_before_settings_nor_after_the_peers_end() -> None:
    pair = HbonePair(server_limits=SMALL)
    stream = pair.open_tunnel()
    block = Encoder().encode([(":method", "CONNECT"), (":authority", "10.0.0.1:80")])
    deliver(pair.server, frame_header(len(block), FrameType.HEADERS, 0, stream + 2) + block)
    assert not taken_alone(pair.server, data(stream, 5)), "a CONTINUATION must come next"

    pair = HbonePair(server_limits=SMALL)
    stream = pair.open_tunnel()
    deliver(pair.server, data(stream, 5, END_STREAM))
    assert not taken_alone(pair.server, data(stream, 5))

    client = HboneClient(now=StoppedClock())
    client.request_tunnel("10.0.0.1:80", {})
    client.find_stream(1).received(Signal.HEADERS)
    assert not taken_alone(client, data(1, 5)), "the first frame must be SETTINGS"


def test_a_frame_that_the_connection_would_return_credit_for_is_not_taken_alone() -> None:
    pair = HbonePair(server_limits=Limits(stream_window=1 << 20, connection_window=70_000))
    stream = pair.open_tunnel()
    assert taken_alone(pair.server, data(stream, 35_000))
    assert not taken_alone(pair.server, data(stream, 1))
    deliver(pair.server, data(stream, 1))
    assert pair.server.take_outgoing() == window_update_frame(0, 35_001)
    pair.server.hold_credit(True)
    assert taken_alone(pair.server, data(stream, 35_001)), "while credit is held back none is returned"
    assert not taken_alone(pair.server, data(stream, 35_000)), "beyond the connection's window"
