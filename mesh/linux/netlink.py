"""Netlink messages and attributes as bytes, and a netfilter conversation that tells which message of a batch failed.

Our own few lines instead of pyroute2's NFTSocket, which gives every message of a transaction one sequence number, does not read the
kernel's answers when it commits, and needs an event loop (docs/design/decisions/0003-nftables-over-netlink.md).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

NETLINK_NETFILTER: Final = 12
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_NETLINK_EXT_ACK: Final = 11
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

NLM_F_REQUEST: Final = 0x1
_NLM_F_ACK: Final = 0x4
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLMSGERR_ATTR_MSG: Final = 1
_NFNL_MSG_BATCH_BEGIN: Final = 0x10
_NFNL_MSG_BATCH_END: Final = 0x11
NFNL_SUBSYS_NFTABLES: Final = 10

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ATTRIBUTE_TYPE: Final = 0x3FFF
_RECEIVE_BYTES: Final = 1 << 17
_ANSWER_SECONDS: Final = 10
"""The kernel answers at once; a limit only so that nothing waits for ever on a broken one."""
_DUMP_ATTEMPTS: Final = 10
"""A dump is interrupted when the rules change under it; whoever changes them all the time gets an error instead."""


class NetlinkError(OSError):
    """The kernel refused a request, or its answer makes no sense. ``args`` as OSError's."""


@dataclass(frozen=True, slots=True)
class Message:
    """One request to nftables. ``kind`` is NFT_MSG_*, ``body`` its attributes, ``text`` what it does, for error messages."""

    kind: int
    flags: int
    family: int
    body: bytes
    text: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the kernel had against one message of a batch."""

    text: str
    errno: int
    detail: str

    def __str__(self) -> str:
        return f"{self.text}: {os.strerror(self.errno)}" + (f" ({self.detail})" if self.detail else "")


class BatchRefused(Exception):
    """Nothing of the batch was done; ``refusals`` says which messages were at fault."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        super().__init__("; ".join(str(refusal) for refusal in refusals))
        self.refusals = tuple(refusals)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded. Nested ones carry no NLA_F_NESTED, just as nftables dumps them: what is sent and read back compares."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def parse_attributes(data: bytes) -> list[tuple[int, bytes]]:
    """The attributes in ``data``, flag bits of their types removed. Raises NetlinkError."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4 or at + length > len(data):
            raise NetlinkError(errno.EBADMSG, "netlink attribute of impossible length")
        found.append((kind & _ATTRIBUTE_TYPE, data[at + 4 : at + length]))
        at += (length + 3) & ~3
    return found


class NetfilterSocket:
    """A conversation with nftables in the calling thread's network namespace. Blocking, but the kernel answers within the call."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._sequence = 0
        try:
            self._sock.bind((0, 0))
            # Not settimeout(): that would make Python wait even where MSG_DONTWAIT is asked for.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _ANSWER_SECONDS, 0))
            self._sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._sock.close()

    def transact(self, messages: Sequence[Message]) -> None:
        """Do all of the messages in one step or none. Raises BatchRefused; OSError when the kernel could not be asked."""
        if not messages:
            return
        texts: dict[int, str] = {}
        batch = self._frame(_NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, b"", NFNL_SUBSYS_NFTABLES)
        texts[self._sequence] = "the transaction as a whole"
        for number, message in enumerate(messages, 1):
            # An answer for the last message alone says that all were read; refusals come for every message anyway.
            flags = NLM_F_REQUEST | message.flags | (_NLM_F_ACK if number == len(messages) else 0)
            batch += self._frame(NFNL_SUBSYS_NFTABLES << 8 | message.kind, flags, message.family, message.body)
            texts[self._sequence] = message.text
        batch += self._frame(_NFNL_MSG_BATCH_END, NLM_F_REQUEST, 0, b"", NFNL_SUBSYS_NFTABLES)
        self._make_room(len(batch), len(messages))
        self._sock.send(batch)
        refusals = [
            Refusal(texts[sequence], number, detail) for sequence, number, detail in self._answers() if number and sequence in texts
        ]
        if refusals:
            raise BatchRefused(refusals)

    def dump(self, kind: int, family: int, body: bytes = b"") -> list[tuple[int, bytes]]:
        """All objects of a kind as (family, attributes). Raises OSError."""
        for _ in range(_DUMP_ATTEMPTS):
            request = self._frame(NFNL_SUBSYS_NFTABLES << 8 | kind, NLM_F_REQUEST | _NLM_F_DUMP, family, body)
            self._sock.send(request)
            found = self._dumped()
            if found is not None:
                return found
        raise NetlinkError(errno.EINTR, "the rules keep changing while they are read")

    def _dumped(self) -> list[tuple[int, bytes]] | None:
        """The parts of one dump until its end; None when the rules changed meanwhile."""
        found: list[tuple[int, bytes]] = []
        interrupted = False
        while True:
            for kind, flags, sequence, payload in self._receive():
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                if kind == _NLMSG_DONE:
                    return None if interrupted else found
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", payload)[0]
                    raise NetlinkError(number, os.strerror(number))
                found.append((payload[0], payload[4:]))

    def _answers(self) -> Iterator[tuple[int, int, str]]:
        """(sequence, errno or 0, detail) of every answer to a batch. The kernel has queued them all when send() returns."""
        while True:
            try:
                received = list(self._receive(socket.MSG_DONTWAIT))
            except BlockingIOError:
                return
            for kind, flags, sequence, payload in received:
                if kind == _NLMSG_ERROR:
                    yield sequence, -struct.unpack_from("=i", payload)[0], _detail(flags, payload)

    def _receive(self, flags: int = 0) -> Iterator[tuple[int, int, int, bytes]]:
        """The messages of one datagram as (kind, flags, sequence, payload)."""
        data = self._sock.recv(_RECEIVE_BYTES, flags)
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, message_flags, sequence, _ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size or at + length > len(data):
                raise NetlinkError(errno.EBADMSG, "netlink message of impossible length")
            yield kind, message_flags, sequence, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3

    def _frame(self, kind: int, flags: int, family: int, body: bytes, resource: int = 0) -> bytes:
        """A message with the nfgenmsg header (family, version 0, big-endian resource id) and the next sequence number."""
        self._sequence += 1
        payload = struct.pack("!BBH", family, 0, resource) + body
        return _HEADER.pack(_HEADER.size + len(payload), kind, flags, self._sequence, 0) + payload

    def _make_room(self, batch: int, messages: int) -> None:
        """Let the batch fit the socket's buffers, and its refusals too. In a user namespace the system's limits hold."""
        for forced, plain, size in (
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF, batch + 4096),
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF, messages * 1024),
        ):
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, forced, max(size, _RECEIVE_BYTES))
            except PermissionError:
                self._sock.setsockopt(socket.SOL_SOCKET, plain, max(size, _RECEIVE_BYTES))


def _detail(flags: int, payload: bytes) -> str:
    """The kernel's own words about an error, if it has any (extended acknowledgements)."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    # After the errno comes the header of the refused message; its body too, unless the kernel capped it.
    (length,) = struct.unpack_from("=I", payload, 4)
    start = 4 + (_HEADER.size if flags & _NLM_F_CAPPED else (length + 3) & ~3)
    words = dict(parse_attributes(payload[start:])).get(_NLMSGERR_ATTR_MSG, b"")
    return words.rstrip(b"\0").decode("utf-8", "replace")
