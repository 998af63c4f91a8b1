"""Two HBONE cores back to back, with a wire of bytes between them and a clock that stands still until told."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.wire.hbone import CLIENT_LIMITS, SERVER_LIMITS, HboneClient, HboneConnection, HboneEvent, HboneServer, Limits, TunnelData


class StoppedClock:
    """A clock for cores: seconds, moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class HbonePair:
    """A client and a server core whose prefaces have been exchanged."""

    def __init__(self, client_limits: Limits = CLIENT_LIMITS, server_limits: Limits = SERVER_LIMITS) -> None:
        self.clock = StoppedClock()
        self.client = HboneClient(now=self.clock, limits=client_limits)
        self.server = HboneServer(now=self.clock, limits=server_limits)
        self.settle()

    def settle(self) -> tuple[list[HboneEvent], list[HboneEvent]]:
        """Carry bytes both ways until neither core has any: what the client saw, what the server saw. Payload is copied out of the wire."""
        at_client: list[HboneEvent] = []
        at_server: list[HboneEvent] = []
        while True:
            to_server = self.client.take_outgoing()
            to_client = self.server.take_outgoing()
            if not to_server and not to_client:
                return at_client, at_server
            at_server += deliver(self.server, to_server)
            at_client += deliver(self.client, to_client)

    def open_tunnel(self, authority: str = "10.0.0.1:80") -> int:
        """A tunnel that the server accepted; returns its stream."""
        stream = self.client.request_tunnel(authority, {})
        self.settle()
        self.server.accept(stream, {})
        self.settle()
        return stream


def deliver(core: HboneConnection, data: bytes, portions: Iterable[int] = ()) -> list[HboneEvent]:
    """Feed bytes, cut at the given lengths; payload in the events is copied, as the wire's buffer is not kept."""
    events: list[HboneEvent] = []
    at = 0
    for length in (*portions, len(data)):
        view = memoryview(data)[at : at + length]
        at += len(view)
        events += [kept(event) for event in core.receive(view)] if view else []
    return events


def kept(event: HboneEvent) -> HboneEvent:
    """An event that may outlive the buffer it came from."""
    return TunnelData(event.stream, memoryview(bytes(event.data))) if isinstance(event, TunnelData) else event


def joined(events: Iterable[HboneEvent]) -> list[HboneEvent]:
    """Events with neighbouring pieces of one stream's payload put together: how DATA was cut means nothing."""
    result: list[HboneEvent] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, TunnelData) and isinstance(last, TunnelData) and last.stream == event.stream:
            result[-1] = TunnelData(event.stream, memoryview(bytes(last.data) + bytes(event.data)))
        else:
            result.append(kept(event))
    return result


def payload_of(events: Iterable[HboneEvent], stream: int) -> bytes:
    """All payload of one stream."""
    return b"".join(bytes(event.data) for event in events if isinstance(event, TunnelData) and event.stream == stream)
