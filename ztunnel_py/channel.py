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
_READ = 64 * 1024
"""Bytes to read at once where no more are known to come."""

# As numbers: to combine flags of an enumeration takes longer than to read a message.
_SEND_FLAGS = int(socket.MSG_DONTWAIT)
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_CTRUNC)
_ROOM_FOR_DESCRIPTORS = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)

M = TypeVar("M", bound=Message)


class ChannelClosed(Exception):
    """The other side is gone, or what it sent is no message. The channel is of no further use."""


class Channel(Generic[M]):
    """One end. ``expects`` is the union of messages the other end may send. One task, or callbacks of the loop, receive; any number send.

    The socket is used as it is, without waiting, and trio only asked to wait when there is nothing to do: through trio's own methods every
    message costs several turns of its loop, which is most of what one changed endpoint costs an agent.
    """

    def __init__(self, sock: trio.socket.SocketType, expects: object) -> None:
        self._sock = sock
        self._raw = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(expects)
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = trio.Lock()
        self._unsent = memoryview(b"")
        """The rest of a frame that has begun."""
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        return self._raw.fileno()

    # Sending

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message whole. Raises ChannelClosed."""
        frame = self._frame(message, descriptors)
        async with self._sending:
            await self._flush()
            while not self._begin(frame, descriptors):
                await self._wait_writable()
            await self._flush()

    def send_now(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Send a message if nobody else is sending, and the other end has room for its beginning. False: not a byte went. When there is a
        rest (`unfinished`), somebody must `finish`. Raises ChannelClosed."""
        if self._unsent or self._sending.locked():
            return False
        return self._begin(self._frame(message, descriptors), descriptors)

    @property
    def unfinished(self) -> bool:
        return bool(self._unsent)

    async def finish(self) -> None:
        """Send the rest of what `send_now` began. Raises ChannelClosed."""
        async with self._sending:
            await self._flush()

    def _frame(self, message: Message, descriptors: Sequence[int]) -> memoryview:
        body = self._encoder.encode(message)
        return memoryview(_HEADER.pack(len(body), len(descriptors)) + body)

    def _begin(self, frame: memoryview, descriptors: Sequence[int]) -> bool:
        """Send what there is room for, with the descriptors. False: there is none."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._unsent = frame[self._raw.sendmsg([frame], rights, _SEND_FLAGS) :]
        except BlockingIOError:
            return False
        except OSError as exc:
            raise _gone(exc) from exc
        return True

    async def _flush(self) -> None:
        while self._unsent:
            try:
                self._unsent = self._unsent[self._raw.send(self._unsent, _SEND_FLAGS) :]
            except BlockingIOError:
                await self._wait_writable()
            except OSError as exc:
                raise _gone(exc) from exc

    async def _wait_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._raw)
        except (OSError, ValueError, trio.ClosedResourceError) as exc:
            raise _gone(exc) from exc

    # Receiving

    async def receive(self) -> tuple[M, list[int]]:
        """The next message and its descriptors, which the caller now owns. Raises ChannelClosed. Cancelled it has taken nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        received = self.receive_now()
        if received is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()  # who sends without end must not keep everybody else waiting
            return received
        while received is None:
            try:
                await trio.lowlevel.wait_readable(self._raw)
            except (OSError, ValueError, trio.ClosedResourceError) as exc:
                raise _gone(exc) from exc
            received = self.receive_now()
        return received

    def receive_now(self) -> tuple[M, list[int]] | None:
        """The next message if it is there whole, and its descriptors, which the caller now owns. Raises ChannelClosed."""
        while (missing := self._missing()) > 0:
            if not self._read(missing):
                return None
        return self._take()

    @property
    def has_read(self) -> bool:
        """Whether bytes are here that no message was made of yet. Else there is nothing unless the socket is readable."""
        return bool(self._buffer)

    def _missing(self) -> int:
        """Bytes until the first frame is whole, or until it says how long it is."""
        missing = _HEADER.size - len(self._buffer)
        if missing <= 0:
            length, count = _HEADER.unpack_from(self._buffer)
            if length > _MAX_BODY or count > _MAX_DESCRIPTORS:
                raise ChannelClosed(f"no message: {length} bytes, {count} descriptors")
            missing += length
        return missing

    def _take(self) -> tuple[M, list[int]]:
        length, count = _HEADER.unpack_from(self._buffer)
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

    def _read(self, wanted: int) -> bool:
        """False: nothing is there."""
        try:
            data, ancillary, flags, _ = self._raw.recvmsg(max(_READ, wanted), _ROOM_FOR_DESCRIPTORS, _RECEIVE_FLAGS)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise _gone(exc) from exc
        for level, kind, rights in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(rights[: len(rights) - len(rights) % received.itemsize])
                self._descriptors.extend(received)
        if flags & _TRUNCATED:
            raise ChannelClosed("descriptors were lost: too many, or this process is out of them")
        if not data:
            raise ChannelClosed("the other side closed the channel")
        self._buffer += data
        return True

    def close(self) -> None:
        close_all(self._descriptors)
        self._descriptors.clear()
        self._raw.detach()
        self._sock.close()


def _gone(exc: Exception) -> ChannelClosed:
    return ChannelClosed(f"the other side is gone: {exc}")


def listen_at(path: Path) -> trio.SocketListener:
    """Where others connect to make a channel; only the user's own processes can. What was left there by a brain of ours that was killed
    goes: only one runs at a time, its supervisor sees to that. Raises OSError."""
    sock, _ = listen_privately(path)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def close_all(descriptors: Sequence[int] | deque[int]) -> None:
    """Close descriptors that nobody took."""
    for descriptor in descriptors:
        os.close(descriptor)
