"""gRPC's framing and header values."""

from __future__ import annotations

import pytest

from mesh.wire.errors import RemoteProtocolError
from mesh.wire.grpc import (
    MessageReader,
    MessageTooLarge,
    Status,
    decode_status_message,
    encode_status_message,
    encode_timeout,
    message_header,
    parse_status,
    parse_timeout,
    status_from_http,
    status_from_reset,
)


def test_messages_come_out_whole_however_the_bytes_arrive() -> None:
    wire = b"".join(message_header(len(message)) + message for message in (b"one", b"", b"three" * 100))
    for step in (1, 2, 7, len(wire)):
        reader = MessageReader(1000)
        got = []
        for start in range(0, len(wire), step):
            reader.receive(wire[start : start + step])
            while (message := reader.next_message()) is not None:
                got.append(message)
        assert got == [b"one", b"", b"three" * 100]
        reader.finish()


def test_an_announced_size_beyond_the_limit_is_refused_at_once() -> None:
    with pytest.raises(MessageTooLarge, match="message of 4294967295 bytes is larger than 10"):
        MessageReader(10).receive(b"\0\xff\xff\xff\xff")


@pytest.mark.parametrize(("flags", "reason"), [(1, "compressed"), (2, "unknown message flags")])
def test_compression_that_was_not_offered_is_refused(flags: int, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        MessageReader(10).receive(bytes([flags, 0, 0, 0, 0]))


@pytest.mark.parametrize("data", [b"\0", b"\0\0\0\0\2x"])
def test_an_end_within_a_message_is_an_error(data: bytes) -> None:
    reader = MessageReader(10)
    reader.receive(data)
    with pytest.raises(RemoteProtocolError, match="within a message"):
        reader.finish()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.05, "50000000n"), (1, "1000000u"), (100, "100000m"), (3600 * 24, "86400000m"), (10**6, "1000000S"), (0, "1n"), (-5, "1n")],
)
def test_timeouts_are_written_in_the_finest_unit_that_fits(seconds: float, text: str) -> None:
    assert encode_timeout(seconds) == text


@pytest.mark.parametrize(("text", "seconds"), [("1H", 3600), ("2M", 120), ("3S", 3), ("4m", 0.004), ("5u", 5e-6), ("6n", 6e-9)])
def test_timeouts_are_read_in_every_unit(text: str, seconds: float) -> None:
    assert parse_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "S", "-1S", "1.5S", "123456789S", "1s", "١S", "1S "])
def test_what_is_no_timeout_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_timeout(text)


def test_status_messages_are_percent_encoded_and_broken_ones_are_kept() -> None:
    assert encode_status_message("100 %, ü\n") == "100 %25, %C3%BC%0A"
    assert decode_status_message("100 %25, %C3%BC%0A") == "100 %, ü\n"
    assert decode_status_message("50% of %zz") == "50% of %zz"


def test_statuses_nobody_defined_are_unknown() -> None:
    assert [parse_status(text) for text in ("0", "14", "17", "x", "", "-1", "٣")] == [
        Status.OK,
        Status.UNAVAILABLE,
        *[Status.UNKNOWN] * 5,
    ]
    assert status_from_http(503) is Status.UNAVAILABLE
    assert status_from_http(418) is Status.UNKNOWN
    assert status_from_reset(7) is Status.UNAVAILABLE
    assert status_from_reset(4711) is Status.INTERNAL
