"""Messages with file descriptors over a UNIX stream socket, for trio: how brain and movers talk.

A frame is ``length (u32), descriptors (u8)`` and a msgpack body; its descriptors travel as SCM_RIGHTS with the frame's first bytes. The
kernel never merges data across two sets of descriptors, so the descriptors of a frame have arrived once its header has been read.
A stream socket rather than SEQPACKET because a full transfer of state is larger than any packet may be.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import trio

from mesh.linux.unix_sockets import listen_privately
from ztunnel_py.messages import Message

_HEADER = struct.Struct(">IB")
_MAX_BODY = 256 * 1024 * 1024
_MAX_DESCRIPTORS = 8
_READ = 256 * 1024

M = TypeVar("M", bound=Message)


class ChannelClosed(Exception):
    """The other side is gone, or what it sent is no message. The channel is of no further use."""


class Channel(Generic[M]):
    """One end. ``expects`` is the union of messages the other end may send. One task receives; any number send."""

    def __init__(self, sock: trio.socket.SocketType, expects: object) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(expects)
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = trio.Lock()
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message whole. Raises ChannelClosed."""
        body = self._encoder.encode(message)
        frame = memoryview(_HEADER.pack(len(body), len(descriptors)) + body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        async with self._sending:
            try:
                sent = await self._sock.sendmsg([frame], rights)
                while sent < len(frame):
                    sent += await self._sock.send(frame[sent:])
            except (OSError, trio.ClosedResourceError) as exc:
                raise ChannelClosed(f"the other side is gone: {exc}") from exc

    async def receive(self) -> tuple[M, list[int]]:
        """The next message and its descriptors, which the caller now owns. Raises ChannelClosed."""
        await self._fill(_HEADER.size)
        length, count = _HEADER.unpack_from(self._buffer)
        if length > _MAX_BODY or count > _MAX_DESCRIPTORS:
            raise ChannelClosed(f"no message: {length} bytes, {count} descriptors")
        await self._fill(_HEADER.size + length)
        body = bytes(memoryview(self._buffer)[_HEADER.size : _HEADER.size + length])
        del self._buffer[: _HEADER.size + length]
        if count > len(self._descriptors):
            raise ChannelClosed("descriptors are missing")
        descriptors = [self._descriptors.popleft() for _ in range(count)]
        try:
            return self._decoder.decode(body), descriptors
        except msgspec.DecodeError as exc:
            close_all(descriptors)
            raise ChannelClosed(f"no message: {exc}") from exc

    async def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            try:
                data, ancillary, flags, _ = await self._sock.recvmsg(
                    max(_READ, size - len(self._buffer)), socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except (OSError, trio.ClosedResourceError) as exc:
                raise ChannelClosed(f"the other side is gone: {exc}") from exc
            for level, kind, rights in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(rights[: len(rights) - len(rights) % received.itemsize])
                    self._descriptors.extend(received)
            if flags & socket.MSG_CTRUNC:
                raise ChannelClosed("descriptors were lost: too many, or this process is out of them")
            if not data:
                raise ChannelClosed("the other side closed the channel")
            self._buffer += data

    def close(self) -> None:
        close_all(self._descriptors)
        self._descriptors.clear()
        self._sock.close()


def listen_at(path: Path) -> trio.SocketListener:
    """Where others connect to make a channel; only the user's own processes can. What was left there by a brain of ours that was killed
    goes: only one runs at a time, its supervisor sees to that. Raises OSError."""
    sock, _ = listen_privately(path)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def close_all(descriptors: Sequence[int] | deque[int]) -> None:
    """Close descriptors that nobody took."""
    for descriptor in descriptors:
        os.close(descriptor)
