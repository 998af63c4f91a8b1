"""ZDS packets, by hand: between a CNI agent (server) and the node proxy (client), one protobuf message a SOCK_SEQPACKET packet.

Between Istio's CNI agent and ztunnel. Five messages of strings: less code than a dependency of this layer on generated classes, bounded by
construction; the generated ones (mesh/xds/proto/zds.proto) are the oracle in tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from mesh.wire.errors import RemoteProtocolError

MAX_PACKET: Final = 1024
"""The peers' receive buffers: a longer packet arrives cut off."""
V1: Final = 1


@dataclass(frozen=True, slots=True)
class WorkloadInfo:
    name: str = ""
    namespace: str = ""
    service_account: str = ""


@dataclass(frozen=True, slots=True)
class Add:
    """Comes with one descriptor, the pod's network namespace. ``workload`` None breaks the protocol, which the receiver answers."""

    uid: str
    workload: WorkloadInfo | None


@dataclass(frozen=True, slots=True)
class Keep:
    """Before the snapshot's end only: do not drop this one, though its namespace is not known now."""

    uid: str


@dataclass(frozen=True, slots=True)
class Remove:
    uid: str


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """Everything was named: drop what was neither added nor kept."""


WorkloadRequest: TypeAlias = Add | Keep | Remove | SnapshotSent

_ADD, _DEL, _SNAPSHOT_SENT, _KEEP = 1, 2, 3, 5
_LENGTH_DELIMITED: Final = 2


def encode_hello(version: int = V1) -> bytes:
    """The client's first packet."""
    return bytes((0x08, version))


def parse_hello(packet: bytes) -> int:
    """The version. Raises RemoteProtocolError."""
    version = 0
    for number, wire_type, value in _fields(packet):
        if (number, wire_type) == (1, 0):
            assert isinstance(value, int), "wire type 0 is an integer"
            version = value
    return version


def encode_request(request: WorkloadRequest) -> bytes:
    match request:
        case Add(uid, workload):
            body = _string(1, uid) + (b"" if workload is None else _bytes(2, _encode_info(workload)))
            return _bytes(_ADD, body)
        case Remove(uid):
            return _bytes(_DEL, _string(2, uid))  # field 2 it is, unlike the others'
        case SnapshotSent():
            return _bytes(_SNAPSHOT_SENT, b"")
        case Keep(uid):
            return _bytes(_KEEP, _string(1, uid))


def parse_request(packet: bytes) -> WorkloadRequest:
    """The server's packet. Raises RemoteProtocolError."""
    chosen, body = 0, b""
    for number, value in _submessages(packet):
        if number in (_ADD, _DEL, _SNAPSHOT_SENT, _KEEP):
            # The last of a oneof counts; the same one twice is merged, which for protobuf is concatenation.
            chosen, body = number, (body + value if number == chosen else value)
            _parse_payload(chosen, body)
    if not chosen:
        raise RemoteProtocolError("a workload request without payload")
    return _parse_payload(chosen, body)


def encode_response(error: str = "") -> bytes:
    """ACK, or NACK with a reason: cut so that the packet fits."""
    return _bytes(1, _string(1, error.encode()[: MAX_PACKET - 8].decode("utf-8", "ignore")))


def parse_response(packet: bytes) -> str:
    """The error, empty for an ACK. Raises RemoteProtocolError."""
    ack: bytes | None = None
    for number, value in _submessages(packet):
        if number == 1:
            ack = (ack or b"") + value
    if ack is None:
        raise RemoteProtocolError("a workload response without payload")
    return _strings(ack).get(1, "")


def _parse_payload(number: int, body: bytes) -> WorkloadRequest:
    if number == _ADD:
        return _parse_add(body)
    strings = _strings(body, known=() if number == _SNAPSHOT_SENT else (2,) if number == _DEL else (1,))
    if number == _DEL:
        return Remove(strings.get(2, ""))
    return Keep(strings.get(1, "")) if number == _KEEP else SnapshotSent()


def _parse_add(body: bytes) -> Add:
    uid, info = "", None
    for number, value in _submessages(body):
        if number == 1:
            uid = _text(value)
        elif number == 2:
            info = (info or b"") + value
            _parse_info(info)
    return Add(uid, None if info is None else _parse_info(info))


def _encode_info(info: WorkloadInfo) -> bytes:
    return _string(1, info.name) + _string(2, info.namespace) + _string(3, info.service_account)


def _parse_info(body: bytes) -> WorkloadInfo:
    strings = _strings(body, known=(1, 2, 3))
    return WorkloadInfo(strings.get(1, ""), strings.get(2, ""), strings.get(3, ""))


# --- the part of protobuf's encoding that these messages use ---


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes(number: int, value: bytes) -> bytes:
    return bytes((number << 3 | _LENGTH_DELIMITED,)) + _varint(len(value)) + value


def _string(number: int, value: str) -> bytes:
    """Nothing for an empty string, as proto3 has it."""
    return _bytes(number, value.encode()) if value else b""


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError("a string is not UTF-8") from exc


def _strings(body: bytes, known: tuple[int, ...] = (1,)) -> dict[int, str]:
    """The string fields with these numbers; the last of a number counts."""
    return {number: _text(value) for number, value in _submessages(body) if number in known}


def _submessages(packet: bytes) -> Iterator[tuple[int, bytes]]:
    for number, _, value in _fields(packet):
        if isinstance(value, bytes):
            yield number, value


def _fields(packet: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Number, wire type, and value: an int for varints, bytes for strings and messages, 0 for fixed-width values (no field here is one)."""
    if len(packet) > MAX_PACKET:
        raise RemoteProtocolError(f"packet of {len(packet)} bytes")
    position = 0
    while position < len(packet):
        tag, position = _read_varint(packet, position)
        number, wire_type = tag >> 3, tag & 7
        value: int | bytes = 0
        if not 0 < number < 1 << 29:
            raise RemoteProtocolError(f"field number {number}")
        if wire_type == 0:
            value, position = _read_varint(packet, position)
        elif wire_type == _LENGTH_DELIMITED:
            size, position = _read_varint(packet, position)
            value = packet[position : position + size]
            position += size
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        else:
            raise RemoteProtocolError(f"wire type {wire_type}")
        if position > len(packet):
            raise RemoteProtocolError("the packet ends within a field")
        yield number, wire_type, value


def _read_varint(packet: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(packet[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & (1 << 64) - 1, position + index + 1
    raise RemoteProtocolError("the packet ends within a number, or the number has no end")
