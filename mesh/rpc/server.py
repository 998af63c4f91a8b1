"""gRPC server: connections, calls and their handlers; a handler fails or is cancelled alone."""

from __future__ import annotations

import math
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias, assert_never

import structlog
import trio

from mesh.http.message import Headers, Response
from mesh.rpc.connection import InboundStream, Limits, ServerConnection
from mesh.rpc.errors import RpcError
from mesh.rpc.metadata import from_headers, to_headers
from mesh.rpc.secured import SecuredStream
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.grpc import Status, encode_status_message, parse_timeout

SERVER_LIMITS: Final = Limits(max_message=4 * 1024 * 1024)
HANDSHAKE_TIMEOUT: Final = 10.0
MAX_CONNECTIONS: Final = 10_000

log = structlog.get_logger("rpc.server")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end: ``ip:port`` (or what the transport is), and the DER certificate it proved, if any."""

    address: str
    certificate: bytes | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler knows of its call. ``deadline`` on trio's clock; infinity without one."""

    path: str
    metadata: Mapping[str, str]
    peer: Peer
    deadline: float = math.inf


class ServerStream:
    """A bidirectional call as its handler sees it."""

    def __init__(self, stream: InboundStream, call: Call) -> None:
        self.call = call
        self._stream = stream
        self._answered = False

    async def receive(self) -> bytes | None:
        """The client's next message; None when it has half-closed."""
        return await self._stream.receive_message()

    async def send(self, message: bytes) -> None:
        """Waits for room in the client's window."""
        self.send_metadata({})
        await self._stream.send_message(message)

    def send_metadata(self, metadata: Mapping[str, str]) -> None:
        """Initial metadata, before the first message; nothing once they are out."""
        if not self._answered:
            self._stream.respond(Response(200, [*_RESPONSE, *to_headers(metadata)]), ended=False)
            self._answered = True

    def finish(self, status: Status, message: str = "") -> None:
        """For the server: the status, as trailers or as the only headers."""
        end: Headers = [(b"grpc-status", b"%d" % status)]
        if message:
            end.append((b"grpc-message", encode_status_message(message)[:1024].strip().encode()))
        if self._answered:
            self._stream.end(end)
        else:
            self._stream.respond(Response(200, [*_RESPONSE, *end]), ended=True)


_RESPONSE: Final = ((b"content-type", b"application/grpc"),)


@dataclass(frozen=True, slots=True)
class Unary:
    """One request, one response; raise RpcError for any other status. ``max_message`` bytes of the request, else the connection's limit."""

    handle: Callable[[bytes, Call], Awaitable[bytes]]
    max_message: int | None = None


@dataclass(frozen=True, slots=True)
class Bidi:
    """Messages both ways until the handler returns (OK) or raises RpcError. It is cancelled when the client goes or the deadline passes.
    ``max_message`` bytes of each message from the client, else the connection's limit."""

    handle: Callable[[ServerStream], Awaitable[None]]
    max_message: int | None = None


Handler: TypeAlias = Unary | Bidi


async def serve(
    listeners: Sequence[trio.SocketListener],
    handlers: Mapping[str, Handler],
    *,
    tls: Callable[[], ssl.SSLContext] | None,
    limits: Limits = SERVER_LIMITS,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve every connection of ``listeners`` until cancelled. ``tls`` is asked for each connection, so that a certificate may change;
    None is plaintext. At most 10 000 connections; more wait in the kernel's queue."""
    places = trio.CapacityLimiter(MAX_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, partial(_serve_socket, handlers=handlers, tls=tls, limits=limits), places, nursery)
        task_status.started()


async def _accept(
    listener: trio.SocketListener,
    serve_socket: Callable[[trio.SocketStream], Awaitable[None]],
    places: trio.CapacityLimiter,
    nursery: trio.Nursery,
) -> None:
    async def serve_and_leave(stream: trio.SocketStream, place: object) -> None:
        try:
            await serve_socket(stream)
        except Exception:  # supervisor: one connection's bug is not the others' end
            log.exception("rpc.connection_failed")
        finally:
            places.release_on_behalf_of(place)

    while True:
        place = object()
        await places.acquire_on_behalf_of(place)
        try:
            stream = await listener.accept()
        except trio.ClosedResourceError:
            return
        except OSError as exc:  # out of file descriptors: others may be given back
            places.release_on_behalf_of(place)
            log.error("rpc.accept_failed", error=str(exc))
            await trio.sleep(0.1)
            continue
        nursery.start_soon(serve_and_leave, stream, place)


async def _serve_socket(
    stream: trio.SocketStream, *, handlers: Mapping[str, Handler], tls: Callable[[], ssl.SSLContext] | None, limits: Limits
) -> None:
    try:
        address = "{}:{}".format(*stream.socket.getpeername()[:2])
    except OSError:
        return await stream.aclose()
    if tls is None:
        return await serve_connection(stream, handlers, peer=Peer(address), limits=limits)
    secured = SecuredStream(stream, tls(), server_side=True)
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            await secured.do_handshake()
    except (trio.TooSlowError, trio.BrokenResourceError, OSError) as exc:
        log.info("rpc.handshake_failed", peer=address, error=str(exc.__cause__ or exc) or type(exc).__name__)
        return await trio.aclose_forcefully(stream)
    if secured.selected_alpn_protocol not in ("h2", None):
        return await trio.aclose_forcefully(stream)
    return await serve_connection(secured, handlers, peer=Peer(address, secured.peer_certificate), limits=limits)


async def serve_connection(
    transport: trio.abc.Stream, handlers: Mapping[str, Handler], *, peer: Peer = Peer("memory"), limits: Limits = SERVER_LIMITS
) -> None:
    """Serve one client until it goes; when cancelled, its calls are cancelled and it is told by GOAWAY."""
    async with trio.open_nursery() as calls:

        def start_call(stream: InboundStream) -> None:
            calls.start_soon(_serve_call, stream, handlers, peer)

        connection = ServerConnection(transport, limits=limits, on_request=start_call)
        await connection.run()
        calls.cancel_scope.cancel()


class _NotGrpc(Exception):
    """The request is some other HTTP; answered with an HTTP status."""

    def __init__(self, http_status: int) -> None:
        super().__init__(f"HTTP {http_status}")
        self.http_status = http_status


async def _serve_call(stream: InboundStream, handlers: Mapping[str, Handler], peer: Peer) -> None:
    """One call from its headers to its status. Whatever its handler raises ends here."""
    if stream.failure is not None:  # given up in the read that brought it: nobody would cancel the handler
        return
    try:
        call = _parse_call(stream, peer)
    except _NotGrpc as exc:
        stream.respond(Response(exc.http_status, []), ended=True)
        return
    handler = handlers.get(call.path)
    if handler is not None and handler.max_message is not None:
        stream.limit_messages(handler.max_message)
    served = ServerStream(stream, call)
    status, message = Status.OK, ""
    with trio.CancelScope(deadline=call.deadline) as scope:
        stream.on_failure = scope.cancel
        try:
            await _dispatch(handler, served)
        except RpcError as exc:
            status, message = exc.status, exc.message
        except Exception:  # supervisor: a bug in one handler must not end the connection's other calls
            log.exception("rpc.handler_failed", path=call.path, peer=peer.address)
            status, message = Status.UNKNOWN, "internal error"
    if scope.cancelled_caught:
        status, message = Status.DEADLINE_EXCEEDED, "the call's deadline passed"
    if stream.failure is None:
        _finish(served, status, message)


def _finish(served: ServerStream, status: Status, message: str) -> None:
    try:
        served.finish(status, message)
    except RpcError as exc:
        log.debug("rpc.status_unsent", peer=served.call.peer.address, error=str(exc))


def _parse_call(stream: InboundStream, peer: Peer) -> Call:
    request = stream.request
    if request.method != b"POST":
        raise _NotGrpc(405)
    if not (request.first(b"content-type") or b"").startswith(b"application/grpc"):
        raise _NotGrpc(415)
    metadata = from_headers(request.headers)
    try:
        timeout = parse_timeout(metadata["grpc-timeout"]) if "grpc-timeout" in metadata else math.inf
    except RemoteProtocolError as exc:
        raise _NotGrpc(400) from exc
    return Call(request.path.decode("ascii", "replace"), metadata, peer, trio.current_time() + timeout)


async def _dispatch(handler: Handler | None, served: ServerStream) -> None:
    match handler:
        case None:
            raise RpcError(Status.UNIMPLEMENTED, f"unknown method {served.call.path}")
        case Bidi(handle):
            await handle(served)
        case Unary(handle):
            request = await served.receive()
            if request is None or await served.receive() is not None:
                raise RpcError(Status.INTERNAL, "a unary call has exactly one message")
            await served.send(await handle(request, served.call))
        case _:
            assert_never(handler)
