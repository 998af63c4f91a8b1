"""The beginning of a request's body, for an authorizer that wants to see it: waits until it has come, and takes nothing of it away."""

from __future__ import annotations

from typing import Protocol

import trio

from waypoint_py.body import RequestBody
from waypoint_py.observer import RequestRecord
from waypoint_py.policy.consult import Buffered


class Sender(Protocol):
    """Who can have the client send: the exchange."""

    def ask_for_body(self) -> None:
        """Say that the body is wanted, if the client waits for that."""

    def let_come(self, size: int) -> None:
        """Let the client send so much more though nothing has moved."""


class BodyPreview:
    """A `waypoint_py.policy.ext_authz.BodySource`. It is told of all that comes by `came`."""

    __slots__ = ("_arrived", "_body", "_record", "_sender", "_wanted")

    def __init__(self, sender: Sender, body: RequestBody, record: RequestRecord) -> None:
        self._sender = sender
        self._body = body
        self._record = record
        self._wanted = 0
        """Bytes for which there is still credit to be given."""
        self._arrived: trio.Event | None = None

    async def buffer(self, limit: int) -> Buffered:
        """Until it ends or is longer."""
        self._sender.ask_for_body()
        self._wanted = limit
        self._grant(self._record.bytes_received)
        while not self._body.complete and self._record.bytes_received <= limit:
            self._arrived = trio.Event()
            await self._arrived.wait()
        self._wanted = 0
        data = b"".join(self._body.pieces())
        return Buffered(data[:limit], self._body.complete and len(data) <= limit)

    def came(self, size: int) -> None:
        """More of the body, or with nothing its end."""
        if self._wanted:
            self._grant(size)
        if self._arrived is not None:
            self._arrived.set()

    def _grant(self, size: int) -> None:
        granted = min(size, self._wanted)
        self._wanted -= granted
        self._sender.let_come(granted)
