"""TLS over a TCP socket, for one task that sends and one that receives: a turn of the loop for each, where there is something to wait for.

trio.SSLStream does the same for any transport and any number of tasks, behind two locks, and looks at the socket before it waits: three
turns for what arrives, two for what goes. Of one changed endpoint, which is a small message and its answer, that was a fifth of what it
cost an agent, and of what each agent costs the control plane.
"""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from typing import Final

import trio

READ_SIZE: Final = 64 * 1024
MAX_ANSWERS: Final = 16 * 1024
"""Bytes of answers of TLS that wait behind what is being sent: a peer that reads nothing could have any number of them made."""


class SecuredStream(trio.abc.Stream):
    """The end of the peer's bytes is the end of the stream, whether it said goodbye or not, and none is said here: HTTP/2 frames and gRPC
    statuses show what was cut off. Errors are trio's; the one of TLS or the socket is the cause."""

    def __init__(
        self, transport: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool = False, server_hostname: str | None = None
    ) -> None:
        """Raises UnicodeError for a ``server_hostname`` that is none."""
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        # Bytes are taken as they are: names with underscores, or of more than 63 letters, are resolved all the same.
        name = server_hostname.encode() if server_hostname is not None and server_hostname.isascii() else server_hostname
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=name)
        self._unsent = memoryview(b"")
        self._ended = False
        """The peer has said goodbye."""

    async def do_handshake(self) -> None:
        """First of all. Raises BrokenResourceError, also when the peer is not who it should be."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush()
                if not await self._fill():
                    raise trio.BrokenResourceError("closed by the peer") from None
            except ssl.SSLError as exc:
                self._answer()  # with an alert that says why
                raise trio.BrokenResourceError from exc
            else:
                return await self.flush()

    @property
    def selected_alpn_protocol(self) -> str | None:
        return self._tls.selected_alpn_protocol()

    @property
    def peer_certificate(self) -> bytes | None:
        """DER; None if it showed none."""
        return self._tls.getpeercert(binary_form=True)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self.send_now(data):
            await self.flush()

    def send_now(self, data: bytes | bytearray | memoryview) -> bool:
        """Take all of it, and send what there is room for. False: the rest goes with `flush`. Raises as `send_all`."""
        try:
            self._tls.write(data)
        except ssl.SSLError as exc:
            raise trio.BrokenResourceError from exc
        return self._flush_now()

    async def flush(self) -> None:
        """Send what `send_now` has left."""
        while not self._flush_now():
            await trio.lowlevel.wait_writable(self._fd)

    async def wait_send_all_might_not_block(self) -> None:
        await self.flush()
        await trio.lowlevel.wait_writable(self._fd)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        waited = False
        while True:
            data = self._decrypt(max_bytes or READ_SIZE)
            if data:
                if not waited:
                    await trio.lowlevel.checkpoint()
                return data
            if data is not None or not await self._fill():
                return b""
            waited = True

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _decrypt(self, most: int) -> bytes | None:
        """What has arrived, of as many records as it is in. None: nothing; empty: nothing will any more."""
        if self._ended:
            return b""
        chunks: list[bytes] = []
        room = most
        try:
            # Asked only where there is something: the exception that says there is nothing costs more than a small record.
            while room > 0 and (self._incoming.pending or self._tls.pending()):
                chunk = self._tls.read(room)
                chunks.append(chunk)
                room -= len(chunk)
                if not chunk:
                    self._ended = True
                    break
        except ssl.SSLWantReadError:
            pass  # a part of a record
        except ssl.SSLError as exc:
            self._answer()
            raise trio.BrokenResourceError from exc
        if self._outgoing.pending:  # the peer has changed its keys, and wants ours changed
            self._answer()
            if self._outgoing.pending > MAX_ANSWERS:
                raise trio.BrokenResourceError("the peer sends and does not read")
        return b"".join(chunks) if chunks else None

    async def _fill(self) -> bool:
        """Wait for bytes and take them. False: the peer has closed."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                data = os.read(self._fd, READ_SIZE)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError from exc
            if data:
                self._incoming.write(data)
            return bool(data)

    def _answer(self) -> None:
        """Send what TLS says of its own accord, if the peer still takes it. If not, whoever reads or sends finds that out by itself."""
        with suppress(trio.BrokenResourceError):
            self._flush_now()

    def _flush_now(self) -> bool:
        """Send what there is room for. False: there is more. What the reader leaves, the next to send takes along: it may come late, but
        never out of order."""
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            try:
                self._unsent = self._unsent[os.write(self._fd, self._unsent) :]
            except BlockingIOError:
                return False
            except OSError as exc:
                raise trio.BrokenResourceError from exc
        return True

    @property
    def _fd(self) -> int:
        """Asked for each time: once closed, its number may be another's. Raises ClosedResourceError."""
        fd = self._transport.socket.fileno()
        if fd < 0:
            raise trio.ClosedResourceError
        return fd
