"""A collector of spans: as much of one as an exporter talks to."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import h11
import trio

from mesh.xds.proto import otlp_pb2 as otlp


@dataclass
class Collector:
    """Keeps what it is sent, and answers with ``status``, or with what is next in ``statuses``. ``silent``: it does not answer."""

    status: int = 200
    statuses: list[int] = field(default_factory=list)
    silent: bool = False
    closes: bool = False
    """After each answer, without saying so."""
    received: list[otlp.ExportTraceServiceRequest] = field(default_factory=list)
    heads: list[h11.Request] = field(default_factory=list)
    connections: int = 0

    @property
    def spans(self) -> list[otlp.Span]:
        return [span for request in self.received for of in request.resource_spans for scope in of.scope_spans for span in scope.spans]

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection."""
        self.connections += 1
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                while await self._answer(http, stream) and not self.closes:
                    http.start_next_cycle()

    async def _answer(self, http: h11.Connection, stream: trio.abc.Stream) -> bool:
        body = bytearray()
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                self.heads.append(event)
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        self.received.append(otlp.ExportTraceServiceRequest.FromString(bytes(body)))
        if self.silent:
            await trio.sleep_forever()
        status = self.statuses.pop(0) if self.statuses else self.status
        head = http.send(h11.Response(status_code=status, headers=[("content-length", "0")])) or b""
        await stream.send_all(head + (http.send(h11.EndOfMessage()) or b""))
        return True
