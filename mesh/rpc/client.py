"""gRPC client: a channel is one HTTP/2 connection; whoever holds it reconnects by opening another."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import trio

from mesh.http.message import Request, Response, Version
from mesh.rpc.connection import ClientConnection, Limits, OutboundStream
from mesh.rpc.errors import RpcError
from mesh.rpc.metadata import from_headers, to_headers
from mesh.rpc.secured import SecuredStream
from mesh.wire.grpc import Status, decode_status_message, encode_timeout, parse_status, status_from_http

CONNECT_TIMEOUT: Final = 5.0
HANDSHAKE_TIMEOUT: Final = 10.0
CLIENT_LIMITS: Final = Limits(max_message=200 * 1024 * 1024, stream_window=1024 * 1024)
"""The message limit is the node proxy's for xDS: a first response carries the whole mesh."""
USER_AGENT: Final = b"ambient-mesh"


class ClientStream:
    """One bidirectional call. Leaving its context cancels it when it is not over."""

    def __init__(self, stream: OutboundStream) -> None:
        self._stream = stream
        self._accepted = False
        """The server's headers say that messages follow, or a status."""

    async def send(self, message: bytes) -> None:
        """Raises the RpcError the call ended with, if it is over."""
        try:
            await self._stream.send_message(message)
        except RpcError as exc:
            if not self._stream.ended:
                raise
            raise self._end_status() or RpcError(Status.CANCELLED, "the server has ended the call") from exc

    def finish_sending(self) -> None:
        """No more messages from here (half-close)."""
        if not self._stream.over and not self._stream.closed_here:
            self._stream.end()

    async def receive(self) -> bytes | None:
        """The next message; None when the call ended with OK. Raises RpcError for every other status."""
        if not self._accepted:
            _check_response(await self._stream.wait_response())
            self._accepted = True
        message = await self._stream.receive_message()
        if message is None and (failure := self._end_status()):
            raise failure
        return message

    async def response_metadata(self) -> dict[str, str]:
        """The server's initial metadata; waits for them."""
        return from_headers((await self._stream.wait_response()).headers)

    @property
    def trailing_metadata(self) -> dict[str, str]:
        """Metadata of the end; those of the beginning when the server sent trailers only. Empty before the end."""
        stream = self._stream
        if not stream.ended or stream.response is None:
            return {}
        return from_headers(stream.trailers or stream.response.headers)

    def cancel(self) -> None:
        self._stream.reset()

    def _end_status(self) -> RpcError | None:
        if not self._stream.ended:
            return None
        end = self.trailing_metadata
        if "grpc-status" not in end:
            return RpcError(Status.INTERNAL, "the server ended the call without a status")
        status = parse_status(end["grpc-status"])
        return None if status is Status.OK else RpcError(status, decode_status_message(end.get("grpc-message", "")))


def _check_response(response: Response) -> None:
    if response.first(b"grpc-status") is not None:
        return  # trailers only: the status says all
    if response.status != 200:
        raise RpcError(status_from_http(response.status), f"the server answered HTTP {response.status}")
    content_type = response.first(b"content-type")
    if content_type is None or not content_type.startswith(b"application/grpc"):
        raise RpcError(Status.UNKNOWN, f"the server answered with content-type {(content_type or b'').decode('utf-8', 'replace')!r}")


class Channel:
    """Calls over one connection. Made by `open_channel`."""

    def __init__(self, connection: ClientConnection, *, scheme: str, authority: str) -> None:
        self._connection = connection
        self._scheme = scheme.encode()
        self._authority = authority.encode()

    @property
    def usable(self) -> bool:
        """False once the connection is lost or the server is going away: new calls would fail with UNAVAILABLE."""
        return self._connection.lost is None and not self._connection.going_away

    async def wait_unusable(self) -> None:
        """Until ``usable`` is False."""
        await self._connection.wait_closing()

    async def unary(
        self,
        path: str,
        request: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # told to the server too, which a caller's cancel scope could not do
    ) -> bytes:
        """One request, one response. ``timeout`` in seconds is kept here and told to the server. Raises RpcError."""
        async with self.stream(path, metadata=metadata, timeout=timeout) as call:
            try:
                await call._stream.send_message(request, end=True)
            except RpcError:
                if not call._stream.ended:
                    raise
                # The server answered before it had the whole request: its answer says why.
            response = await call.receive()
            if response is None:
                raise RpcError(Status.INTERNAL, "the server answered with no message")
            if await call.receive() is not None:
                raise RpcError(Status.INTERNAL, "the server answered with several messages")
            return response

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # as above
    ) -> AsyncGenerator[ClientStream, None]:
        """A bidirectional call; with a ``timeout``, all of it must end within. Raises RpcError, DEADLINE_EXCEEDED out of the context."""
        with trio.CancelScope(deadline=trio.current_time() + timeout if timeout is not None else float("inf")) as scope:
            stream = await self._connection.open_stream(self._request(path, metadata or {}, timeout))
            try:
                yield ClientStream(stream)
            finally:
                stream.reset()
        if scope.cancelled_caught:
            raise RpcError(Status.DEADLINE_EXCEEDED, f"no end within {timeout} s")

    def _request(self, path: str, metadata: Mapping[str, str], timeout: float | None) -> Request:
        headers = [(b"te", b"trailers")]
        if timeout is not None:
            headers.append((b"grpc-timeout", encode_timeout(timeout).encode()))
        headers += [(b"content-type", b"application/grpc"), (b"user-agent", USER_AGENT), *to_headers(metadata)]
        return Request(b"POST", self._scheme, self._authority, path.encode(), headers, Version.HTTP_2)


@asynccontextmanager
async def open_channel(
    host: str,
    port: int,
    *,
    ssl_context: ssl.SSLContext | None,
    server_hostname: str | None = None,
    limits: Limits = CLIENT_LIMITS,
) -> AsyncGenerator[Channel, None]:
    """Connect (5 s), shake hands (10 s), then yield a Channel. ``ssl_context`` None is plaintext. ``server_hostname`` is the name that the
    certificate must have, ``host`` by default. Raises RpcError UNAVAILABLE when any of it fails."""
    name = server_hostname or host
    connected = await _connect(host, port)
    transport = connected if ssl_context is None else await _shake_hands(connected, ssl_context, name)
    authority = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    async with open_channel_on(transport, authority=authority, scheme="https" if ssl_context else "http", limits=limits) as channel:
        yield channel


@asynccontextmanager
async def open_channel_on(
    transport: trio.abc.Stream, *, authority: str = "localhost", scheme: str = "http", limits: Limits = CLIENT_LIMITS
) -> AsyncGenerator[Channel, None]:
    """A Channel over a stream that is connected already; it is closed with the context."""
    connection = ClientConnection(transport, limits=limits)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        try:
            yield Channel(connection, scheme=scheme, authority=authority)
        except Exception as exc:  # kept out of the nursery, which would wrap the caller's own exception in a group
            failure = exc
        finally:
            connection.close()
    if failure is not None:
        raise failure


async def _connect(host: str, port: int) -> trio.SocketStream:
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            stream = await trio.open_tcp_stream(host, port)
    except trio.TooSlowError as exc:
        raise RpcError(Status.UNAVAILABLE, f"no connection to {host}:{port} within {CONNECT_TIMEOUT:.0f} s") from exc
    except OSError as exc:
        raise RpcError(Status.UNAVAILABLE, f"no connection to {host}:{port}: {exc}") from exc
    for level, option, value in _TCP_KEEPALIVE:
        stream.setsockopt(level, option, value)
    return stream


_TCP_KEEPALIVE: Final = (
    # Seconds and counts as the node proxy sets them (reference: ztunnel's gRPC client).
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 300),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 75),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 9),
)


async def _shake_hands(transport: trio.SocketStream, context: ssl.SSLContext, name: str) -> SecuredStream:
    secured = SecuredStream(transport, context, server_hostname=name)
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            await secured.do_handshake()
    except (trio.TooSlowError, trio.BrokenResourceError, OSError) as exc:
        await trio.aclose_forcefully(transport)
        raise RpcError(Status.UNAVAILABLE, f"TLS with {name}: {exc.__cause__ or exc or 'no answer in time'}") from exc
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    if secured.selected_alpn_protocol != "h2":
        await trio.aclose_forcefully(transport)
        raise RpcError(Status.UNAVAILABLE, f"{name} did not agree on HTTP/2")
    return secured
