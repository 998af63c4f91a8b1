"""HTTP GET over whatever reaches a page: a socket in a namespace, a Unix socket, a port-forward. A few bounded bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import h11
import trio

MAX_BODY: Final = 8 << 20
_READ: Final = 64 << 10


class Unreachable(Exception):
    """Nobody answered, or not in HTTP; the text says what happened."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


async def get(stream: trio.abc.Stream, target: str, host: str, *, limit: int = MAX_BODY) -> Answer:
    """One request and its answer of at most ``limit`` bytes. Raises Unreachable, and trio's errors of the stream."""
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(method="GET", target=target, headers=[("Host", host), ("User-Agent", "meshctl"), ("Connection", "close")])
    status, body = 0, bytearray()
    try:
        await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(_READ)))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > limit:
                    raise Unreachable(f"an answer of more than {limit} bytes")
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return Answer(status, bytes(body))
    except h11.RemoteProtocolError as exc:
        raise Unreachable(f"no HTTP answer: {exc}") from exc
