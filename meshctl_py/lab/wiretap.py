"""Listening on a wire of the lab: a program that reads packets off an interface, and pure functions that say what they carry.

``python -m meshctl_py.lab.wiretap INTERFACE`` prints ``listening``, then for each line of its input the TCP segments since the last one,
as a line of JSON.
"""

from __future__ import annotations

import base64
import json
import selectors
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from mesh.model.address import SocketAddress

_ETH_P_ALL: Final = 0x0003
_ETH_P_IP: Final = 0x0800
_ETH_P_IPV6: Final = 0x86DD
_RECEIVE_BUFFER: Final = 16 << 20
_HANDSHAKE, _APPLICATION_DATA = 22, 23
_RECORD_TYPES: Final = frozenset({20, 21, _HANDSHAKE, _APPLICATION_DATA})
_SERVER_HELLO: Final = 2
_SUPPORTED_VERSIONS: Final = 43
_TLS_1_3: Final = 0x0304


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment that carries something."""

    source: SocketAddress
    destination: SocketAddress
    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Stream:
    """One direction of a connection, as far as it was heard."""

    source: SocketAddress
    destination: SocketAddress
    data: bytes


def parse_packet(protocol: int, packet: bytes) -> Segment | None:
    """The TCP segment in an IP packet (``protocol``: the Ethernet type); None for anything else, fragments, and segments without data."""
    if protocol == _ETH_P_IP and len(packet) >= 20:
        header, end = (packet[0] & 0x0F) * 4, struct.unpack_from(">H", packet, 2)[0]
        is_tcp = packet[9] == socket.IPPROTO_TCP and not struct.unpack_from(">H", packet, 6)[0] & 0x3FFF
        source: IPv4Address | IPv6Address = IPv4Address(packet[12:16])
        destination: IPv4Address | IPv6Address = IPv4Address(packet[16:20])
    elif protocol == _ETH_P_IPV6 and len(packet) >= 40:
        header, end = 40, 40 + struct.unpack_from(">H", packet, 4)[0]
        is_tcp = packet[6] == socket.IPPROTO_TCP
        source, destination = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    else:
        return None
    if not is_tcp or len(packet) < header + 20:
        return None
    source_port, destination_port, sequence = struct.unpack_from(">HHI", packet, header)
    # A length of 0 is a packet larger than 64 KiB that will be cut only by real hardware (BIG TCP).
    payload = packet[header + (packet[header + 12] >> 4) * 4 : end if end > header else None]
    return Segment(SocketAddress(source, source_port), SocketAddress(destination, destination_port), sequence, payload) if payload else None


def join_segments(segments: Iterable[Segment]) -> tuple[Stream, ...]:
    """The streams that the segments are parts of, in the order in which they began; what was sent twice counts once."""
    parts: dict[tuple[SocketAddress, SocketAddress], dict[int, bytes]] = {}
    first: dict[tuple[SocketAddress, SocketAddress], int] = {}
    for segment in segments:
        key = (segment.source, segment.destination)
        start = first.setdefault(key, segment.sequence)
        offset = (segment.sequence - start + (1 << 31)) % (1 << 32) - (1 << 31)
        parts.setdefault(key, {}).setdefault(offset, segment.payload)
    return tuple(Stream(*key, _in_order(pieces)) for key, pieces in parts.items())


def _in_order(pieces: dict[int, bytes]) -> bytes:
    data, end = bytearray(), min(pieces)
    for offset in sorted(pieces):
        data += pieces[offset][max(0, end - offset) :]
        end = max(end, offset + len(pieces[offset]))
    return bytes(data)


def negotiated_tls(stream: Stream) -> int | None:
    """The version that a ServerHello in this stream chose; None if there is none."""
    for kind, body in _records(stream.data):
        if kind == _HANDSHAKE and body[:1] == bytes([_SERVER_HELLO]):
            return _chosen_version(body)
    return None


def is_tls(stream: Stream) -> bool:
    """Whether everything in the stream is TLS records; the last may be cut off."""
    covered = sum(5 + len(body) for _, body in _records(stream.data))
    rest = stream.data[covered:]
    return covered > 0 and (not rest or (rest[0] in _RECORD_TYPES and rest[1:2] in (b"", b"\x03")))


def is_tls_1_3(stream: Stream) -> bool:
    """Whether a ServerHello in this stream chose TLS 1.3 and all of it is TLS records."""
    return negotiated_tls(stream) == _TLS_1_3 and is_tls(stream)


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 5 <= len(data):
        kind, major, length = data[position], data[position + 1], struct.unpack_from(">H", data, position + 3)[0]
        body = data[position + 5 : position + 5 + length]
        if kind not in _RECORD_TYPES or major != 3 or len(body) < length:
            return
        yield kind, body
        position += 5 + length


def _chosen_version(server_hello: bytes) -> int:
    """RFC 8446 4.1.3: the legacy version, unless the extension supported_versions says otherwise."""
    try:
        legacy = int(struct.unpack_from(">H", server_hello, 4)[0])
        position = 38 + 1 + server_hello[38] + 2 + 1
        end = position + 2 + struct.unpack_from(">H", server_hello, position)[0]
        position += 2
        while position + 4 <= end:
            kind, length = struct.unpack_from(">HH", server_hello, position)
            if kind == _SUPPORTED_VERSIONS:
                return int(struct.unpack_from(">H", server_hello, position + 4)[0])
            position += 4 + length
    except (struct.error, IndexError):
        return 0
    return legacy


def encode_segments(segments: Iterable[Segment]) -> str:
    """One line of JSON."""
    rows = [(str(s.source), str(s.destination), s.sequence, base64.b64encode(s.payload).decode()) for s in segments]
    return json.dumps(rows)


def decode_segments(line: str) -> list[Segment]:
    """What `encode_segments` made."""
    return [Segment(SocketAddress.parse(a), SocketAddress.parse(b), n, base64.b64decode(data)) for a, b, n, data in json.loads(line)]


def main() -> None:
    """Listen on the interface named by the argument until the input ends."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        wire.bind((sys.argv[1], _ETH_P_ALL))
        wire.setblocking(False)
        print("listening", flush=True)
        heard: list[Segment] = []
        with selectors.DefaultSelector() as selector:
            selector.register(wire, selectors.EVENT_READ)
            selector.register(sys.stdin, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                heard += _read(wire)
                if sys.stdin in ready:
                    if not sys.stdin.readline():
                        return
                    print(encode_segments(heard), flush=True)
                    heard = []


def _read(wire: socket.socket) -> Iterator[Segment]:
    while True:
        try:
            packet, (_, protocol, *_) = wire.recvfrom(1 << 18)
        except BlockingIOError:
            return
        segment = parse_packet(protocol, packet)
        if segment is not None:
            yield segment


if __name__ == "__main__":
    main()
