"""A CONNECT tunnel, either end of it, as a byte stream.

Held bytes are bounded by the tunnel's window: credit goes back to the peer when they are the sink's.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.model.address import SocketAddress
from mesh.reactor.hbone import Tunnel
from mesh.reactor.loop import Reactor
from mesh.wire.errors import ErrorCode
from waypoint_py.stream import HIGH_WATER
from waypoint_py.streams.base import Stream


class TunnelStream(Stream):
    """Takes over an accepted tunnel: it is this object's from now on (`mesh.reactor.hbone.TunnelConsumer`)."""

    __slots__ = ("_local_end", "_tunnel", "readable")

    def __init__(self, reactor: Reactor, tunnel: Tunnel) -> None:
        super().__init__(reactor)
        self._tunnel = tunnel
        self._local_end = False  # the tunnel knows that we have ended
        self.readable = False
        tunnel.attach(self)

    @property
    def local_address(self) -> SocketAddress | None:
        return self._tunnel.link.local_address

    # --- what the owner does

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._over or self._ending or not data:
            return
        self._out += data
        if len(self._out) > HIGH_WATER:  # `_note_unsent`
            self._above = True
        if not self.readable:
            self.readable = True
            self._tunnel.want_write()

    def end(self) -> None:
        if self._over or self._ending:
            return
        self._ending = True
        if not self._out:
            self._end_tunnel()

    def abort(self, reason: str) -> None:
        if not self._over:
            self._tunnel.reset(ErrorCode.CANCEL, reason)
            self._tunnel.detach()
        self._finish_by_abort(reason)

    # --- what the link does

    def read_into(self, view: memoryview, most: int) -> int | None:
        out = self._out
        size = len(out)
        if not size:
            self.readable = False
            if self._ending and not self._local_end:
                self._end_tunnel()
            return None
        if size <= most:
            view[:size] = out
            out.clear()
            self.readable = self._ending  # the end goes out by the next call: it may not come before the frame that this call fills
        else:
            size = most
            view[:size] = memoryview(out)[:size]
            del out[:size]
        if self._above:
            self._reactor.call_soon(self._drained, self.abort)  # a sink that writes again must not find the buffer in use
        return size

    def read_into_many(self, views: list[memoryview]) -> int | None:
        total = 0
        for view in views:
            if not self._out:
                break
            total += self.read_into(view, len(view)) or 0
        return total if total else self.read_into(views[0], len(views[0]))

    def tunnel_data(self, chunks: Sequence[memoryview]) -> int:
        moved = 0
        for chunk in chunks:
            if self._over:
                return 0
            sink = self._sink
            if sink is None or self._paused or self._held:
                self._held += chunk
            else:  # `_deliver`
                sink.data(chunk)
                moved += len(chunk)
        return moved

    def tunnel_ended(self) -> None:
        self._peer_ended = True
        if self._local_end:
            self._leave(None)
        self._tell_end()

    def tunnel_reset(self, reason: str, code: int | None) -> None:
        if code == ErrorCode.NO_ERROR:
            # The peer got all it wanted (RFC 9113 section 8.1; Envoy, when its upstream ended first): what it sent is complete.
            self._peer_ended = True
            self._leave(None)
        else:
            self._leave(reason)

    # --- ends

    def _passed_on(self, size: int) -> None:
        self._tunnel.consumed(size)

    def _end_tunnel(self) -> None:
        self._local_end = True
        self._tunnel.end()
        if self._peer_ended:
            self._leave(None)

    def _leave(self, reason: str | None) -> None:
        self.readable = False
        if not self._over:
            self._tunnel.detach()
            self._finish(reason)
