"""The h2 library, whole, as the other side of our cores: it raises when we break HTTP/2, and its frames are not ours."""

from __future__ import annotations

import random

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.settings import SettingCodes

from mesh.testing.hbone import StoppedClock, deliver, payload_of
from mesh.wire.frames import MAX_STREAM_ID
from mesh.wire.hbone import (
    GoingAway,
    HboneClient,
    HboneConnection,
    HboneEvent,
    HboneServer,
    PingAcknowledged,
    TunnelData,
    TunnelEnded,
    TunnelRequested,
    TunnelReset,
    TunnelResponded,
)

CONNECT = [(":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("baggage", "service.name=x")]


class Against:
    """One of our cores and an h2 connection, with what either saw."""

    def __init__(self, core: HboneConnection, settings: dict[SettingCodes, int] | None = None) -> None:
        self.core = core
        self.h2 = H2Connection(H2Configuration(client_side=isinstance(core, HboneServer), header_encoding="utf-8"))
        self.h2.initiate_connection()
        if settings:
            self.h2.update_settings(settings)
        self.ours: list[HboneEvent] = []
        self.theirs: list[Event] = []
        self.settle()

    def settle(self) -> None:
        while True:
            outgoing, incoming = self.core.take_outgoing(), self.h2.data_to_send()
            if not outgoing and not incoming:
                return
            self.theirs += self.h2.receive_data(outgoing)
            self.ours += deliver(self.core, incoming)

    def send(self, stream: int, payload: bytes) -> bytes:
        """As much as the core may send now; returns the rest."""
        while payload and (room := min(self.core.sendable(stream), self.core.max_frame_size)):
            piece, payload = payload[:room], payload[room:]
            self.theirs += self.h2.receive_data(self.core.data_header(stream, len(piece)) + piece)
        return payload

    def theirs_of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.theirs if type(event) is kind]


def server_with_tunnel() -> tuple[Against, HboneServer, int]:
    server = HboneServer(now=StoppedClock())
    peer = Against(server)
    peer.h2.send_headers(1, CONNECT)
    peer.settle()
    assert [type(event) for event in peer.ours] == [TunnelRequested]
    server.accept(1, {"baggage": "service.name=y"})
    peer.settle()
    return peer, server, 1


def client_with_tunnel(settings: dict[SettingCodes, int] | None = None) -> tuple[Against, HboneClient, int]:
    client = HboneClient(now=StoppedClock())
    peer = Against(client, settings)
    stream = client.request_tunnel("10.0.0.1:80", {"baggage": "service.name=x", "traceparent": "00"})
    peer.settle()
    peer.h2.send_headers(stream, [(":status", "200"), ("baggage", "service.name=y")])
    peer.settle()
    return peer, client, stream


def test_h2_asks_and_our_server_answers() -> None:
    peer, _, _ = server_with_tunnel()
    (answer,) = peer.theirs_of(ResponseReceived)
    assert isinstance(answer, ResponseReceived)
    assert list(answer.headers) == [(":status", "200"), ("baggage", "service.name=y")]


def test_our_client_asks_and_h2_answers() -> None:
    peer, _, stream = client_with_tunnel()
    (request,) = peer.theirs_of(RequestReceived)
    assert isinstance(request, RequestReceived)
    assert list(request.headers) == [*CONNECT, ("traceparent", "00")]
    assert peer.ours == [TunnelResponded(stream, 200, {"baggage": "service.name=y"})]


def test_many_tunnels_in_a_row_keep_the_header_tables_in_step() -> None:
    peer, server, _ = server_with_tunnel()
    for stream in range(3, 303, 2):
        peer.h2.send_headers(stream, [*CONNECT[:2], ("baggage", f"n={stream % 7}"), ("forwarded", f'for="10.0.0.1:{stream}"')])
        peer.settle()
        request = peer.ours.pop()
        assert isinstance(request, TunnelRequested)
        assert request.headers == {"baggage": f"n={stream % 7}", "forwarded": f'for="10.0.0.1:{stream}"'}
        server.accept(stream, {"baggage": f"n={stream % 5}"})
        server.end(stream)
        peer.h2.end_stream(stream)
        peer.settle()
        (answer,) = peer.theirs_of(ResponseReceived)[-1:]
        assert isinstance(answer, ResponseReceived)
        assert list(answer.headers)[1:] == [("baggage", f"n={stream % 5}")]
    assert server.active_streams == 1


@pytest.mark.parametrize("window", [65_535, 1_000, 1 << 20])
def test_megabytes_go_out_within_the_windows_that_h2_gives(window: int) -> None:
    peer, client, stream = client_with_tunnel({SettingCodes.INITIAL_WINDOW_SIZE: window, SettingCodes.MAX_FRAME_SIZE: 32_768})
    assert client.max_frame_size == 32_768
    payload = random.Random(window).randbytes(min(3 << 20, 300 * window))
    rest = payload
    received = bytearray()
    while rest:
        rest = peer.send(stream, rest)
        for event in peer.theirs_of(DataReceived):
            assert isinstance(event, DataReceived)
            received += event.data
            peer.h2.acknowledge_received_data(event.flow_controlled_length, stream)
        peer.theirs.clear()
        peer.settle()
    client.end(stream)
    peer.settle()
    assert received == payload
    assert len(peer.theirs_of(StreamEnded)) == 1


def test_megabytes_come_in_within_the_windows_that_we_give_and_padding_costs_nothing() -> None:
    peer, server, stream = server_with_tunnel()
    peer.ours.clear()
    payload = random.Random(1).randbytes(20 << 20)
    sent, consumed = 0, 0
    rng = random.Random(2)
    while sent < len(payload):
        room = min(peer.h2.local_flow_control_window(stream), peer.h2.max_outbound_frame_size)
        if room > 300:
            piece = payload[sent : sent + min(room - 256, rng.randrange(1, 60_000))]
            peer.h2.send_data(stream, piece, pad_length=rng.choice([None, 0, 255]))
            sent += len(piece)
        peer.settle()
        arrived = sum(len(event.data) for event in peer.ours if isinstance(event, TunnelData))
        server.consumed(stream, arrived - consumed)
        consumed = arrived
        peer.settle()
    peer.h2.end_stream(stream)
    peer.settle()
    assert payload_of(peer.ours, stream) == payload
    assert peer.ours[-1] == TunnelEnded(stream)


def test_the_ends_of_both_directions_are_understood() -> None:
    peer, server, stream = server_with_tunnel()
    server.end(stream)
    peer.settle()
    assert len(peer.theirs_of(StreamEnded)) == 1
    peer.h2.send_data(stream, b"still", end_stream=True)
    peer.settle()
    assert peer.ours[1:] == [TunnelData(stream, memoryview(b"still")), TunnelEnded(stream)]
    assert server.active_streams == 0


def test_trailers_of_h2_end_a_tunnel() -> None:
    peer, _, stream = server_with_tunnel()
    peer.h2.send_headers(stream, [("checksum", "1")], end_stream=True)
    peer.settle()
    assert peer.ours[1:] == [TunnelEnded(stream)]


def test_resets_are_understood_both_ways() -> None:
    peer, server, stream = server_with_tunnel()
    server.reset(stream)
    peer.settle()
    (reset,) = peer.theirs_of(StreamReset)
    assert isinstance(reset, StreamReset)
    assert reset.error_code == ErrorCodes.CANCEL
    ours, client, second = client_with_tunnel()
    ours.h2.reset_stream(second, ErrorCodes.REFUSED_STREAM)
    ours.settle()
    assert ours.ours[1:] == [TunnelReset(second, ErrorCodes.REFUSED_STREAM)]
    assert client.active_streams == 0


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_h2_is_told_400_for_another_method(method: str) -> None:
    server = HboneServer(now=StoppedClock())
    peer = Against(server)
    peer.h2.send_headers(
        1, [(":method", method), (":scheme", "https"), (":path", "/"), (":authority", "10.0.0.1:80")], end_stream=method == "GET"
    )
    peer.settle()
    (answer,) = peer.theirs_of(ResponseReceived)
    assert isinstance(answer, ResponseReceived)
    assert list(answer.headers) == [(":status", "400")]


def test_pings_go_both_ways() -> None:
    peer, server, _ = server_with_tunnel()
    peer.h2.ping(b"87654321")
    server.ping(b"12345678")
    peer.settle()
    assert peer.ours[-1] == PingAcknowledged(b"12345678")
    assert len(peer.theirs_of(PingAckReceived)) == 1


def test_h2_hears_that_we_go_away_and_we_that_it_does() -> None:
    peer, server, stream = server_with_tunnel()
    server.go_away()
    peer.settle()
    (goodbye,) = peer.theirs_of(ConnectionTerminated)
    assert isinstance(goodbye, ConnectionTerminated)
    assert (goodbye.last_stream_id, goodbye.error_code) == (stream, ErrorCodes.NO_ERROR)
    ours, client, second = client_with_tunnel()
    ours.h2.close_connection(last_stream_id=MAX_STREAM_ID)
    ours.settle()
    assert ours.ours[-1] == GoingAway(MAX_STREAM_ID, 0)
    assert client.going_away
    assert client.active_streams == 1 == second


def test_settings_in_mid_flight_shrink_and_widen_what_we_may_send() -> None:
    peer, client, stream = client_with_tunnel({SettingCodes.INITIAL_WINDOW_SIZE: 10_000})
    assert peer.send(stream, bytes(8_000)) == b""
    peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 5_000})
    peer.settle()
    assert client.sendable(stream) == 0
    peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 9_000})
    peer.settle()
    assert client.sendable(stream) == 1_000
    assert peer.send(stream, bytes(1_000)) == b""
    for size in (0, 4096):
        peer.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: size})
        peer.settle()
        client.request_tunnel("10.0.0.1:80", {"baggage": "service.name=x"})
        client.request_tunnel("10.0.0.1:80", {"baggage": "service.name=x"})
        peer.settle()
    requests = [dict(event.headers) for event in peer.theirs if isinstance(event, RequestReceived)]
    assert len(requests) == 5
    assert all(request["baggage"] == "service.name=x" for request in requests)
