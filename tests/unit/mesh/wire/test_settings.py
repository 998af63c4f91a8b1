"""SETTINGS of HTTP/2: the defaults, every value's range, and what is remembered of several frames."""

from __future__ import annotations

from struct import pack

import pytest

from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.wire.frames import PREFACE, FrameType, frame_header
from mesh.wire.settings import PeerSettings, SettingCode, opening


def payload(*settings: tuple[int, int]) -> bytes:
    return b"".join(pack(">HI", code, value) for code, value in settings)


def test_what_a_peer_does_not_say_has_the_standards_values() -> None:
    peer = PeerSettings(of_server=True)
    peer.take(b"")
    assert (peer.table_sizes, peer.initial_window_size, peer.max_frame_size) == ((4096, 4096), 65535, 16384)
    assert (peer.max_concurrent_streams, peer.connect_protocol) == (None, False)


def test_the_last_of_several_values_counts_and_the_rest_stays() -> None:
    peer = PeerSettings(of_server=False)
    peer.take(payload((SettingCode.MAX_CONCURRENT_STREAMS, 7), (SettingCode.INITIAL_WINDOW_SIZE, 1), (SettingCode.INITIAL_WINDOW_SIZE, 0)))
    peer.take(payload((SettingCode.MAX_FRAME_SIZE, 1 << 20)))
    assert (peer.max_concurrent_streams, peer.initial_window_size, peer.max_frame_size) == (7, 0, 1 << 20)


def test_of_a_header_table_the_smallest_size_within_a_frame_is_told_too() -> None:
    peer = PeerSettings(of_server=False)
    peer.take(payload((SettingCode.HEADER_TABLE_SIZE, 0), (SettingCode.HEADER_TABLE_SIZE, 8192)))
    assert peer.table_sizes == (0, 8192)
    peer.take(b"")
    assert peer.table_sizes == (8192, 8192)


def test_extended_connect_is_not_taken_back() -> None:
    peer = PeerSettings(of_server=True)
    for value in (1, 0):
        peer.take(payload((SettingCode.ENABLE_CONNECT_PROTOCOL, value)))
        assert peer.connect_protocol


@pytest.mark.parametrize(
    ("code", "value", "of_server", "error"),
    [
        (SettingCode.ENABLE_PUSH, 2, False, ErrorCode.PROTOCOL_ERROR),
        (SettingCode.ENABLE_PUSH, 1, True, ErrorCode.PROTOCOL_ERROR),
        (SettingCode.INITIAL_WINDOW_SIZE, 1 << 31, False, ErrorCode.FLOW_CONTROL_ERROR),
        (SettingCode.MAX_FRAME_SIZE, 16383, False, ErrorCode.PROTOCOL_ERROR),
        (SettingCode.MAX_FRAME_SIZE, 1 << 24, False, ErrorCode.PROTOCOL_ERROR),
        (SettingCode.ENABLE_CONNECT_PROTOCOL, 2, True, ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_a_value_out_of_range_is_an_error(code: SettingCode, value: int, of_server: bool, error: ErrorCode) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        PeerSettings(of_server=of_server).take(payload((code, value)))
    assert caught.value.code == error


@pytest.mark.parametrize(
    ("code", "value"),
    [(SettingCode.ENABLE_PUSH, 1), (SettingCode.INITIAL_WINDOW_SIZE, (1 << 31) - 1), (SettingCode.MAX_FRAME_SIZE, (1 << 24) - 1)],
)
def test_the_limits_themselves_are_none(code: SettingCode, value: int) -> None:
    PeerSettings(of_server=False).take(payload((code, value), (0x4242, 0xFFFFFFFF)))


def test_a_client_begins_with_the_preface_and_a_server_without() -> None:
    said = {SettingCode.ENABLE_PUSH: 0, SettingCode.MAX_FRAME_SIZE: 1 << 20}
    frame = frame_header(12, FrameType.SETTINGS, 0, 0) + payload((2, 0), (5, 1 << 20))
    assert opening(said, server=False) == PREFACE + frame
    assert opening(said, server=True) == frame
