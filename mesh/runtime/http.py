"""The admin HTTP/1.1 server of all programs: h11 on trio, small bounded requests, handlers are plain async functions.

Not for traffic: it answers operators, probes and scrapers. Every request is bounded in size and time, so that a slow or hostile client
costs one task for a few seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

from mesh.linux.unix_sockets import listen_privately, unix_address
from mesh.telemetry.log import get_logger

HEADER_TIMEOUT: Final = 2.0
"""Seconds for a whole request header, as ztunnel's admin server."""
BODY_TIMEOUT: Final = 10.0
IDLE_TIMEOUT: Final = 30.0
"""Seconds a kept-alive connection may wait for its next request."""
RESPONSE_TIMEOUT: Final = 60.0
"""Seconds a client may take to read a response; then it is cut off."""
MAX_HEADER: Final = 8 * 1024
MAX_BODY: Final = 64 * 1024
MAX_CONNECTIONS: Final = 128
"""Beside serving at most so many at once, further ones wait in the kernel's backlog."""
_READ: Final = MAX_HEADER

_log = get_logger("admin")


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    """Decoded; of a repeated name the last counts, a name without value is the empty text."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def text(cls, text: str, status: int = 200) -> Response:
        """A line of text; the newline is added."""
        return cls(status, f"{text}\n".encode())

    @classmethod
    def json(cls, value: object, status: int = 200) -> Response:
        """The value as indented JSON; what JSON does not know becomes ``str()`` of it."""
        body = json.dumps(value, indent=2, default=str, ensure_ascii=False)
        return cls(status, f"{body}\n".encode("utf-8", "replace"), "application/json")


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    handler: Handler
    methods: frozenset[str] = frozenset({"GET", "HEAD"})
    usage: str = ""
    """Body of the 405 answer, if it should say more than the methods."""


Routes: TypeAlias = Mapping[str, Route]


class BindError(Exception):
    """The address can't be listened on; the text says which and why. The operator must act."""


async def open_listeners(address: str, *, default_host: str = "") -> list[trio.SocketListener]:
    """Listen on ``host:port``: ``127.0.0.1:15000``, ``[::]:15020`` (IPv4 too), ``localhost:15000`` (both families), ``:15021`` (all).

    Port 0 takes a free one. A host without IPv6 still gets its IPv4 listener. Raises BindError.
    """
    host, port = _parse_bind(address, default_host)
    try:
        found = await trio.socket.getaddrinfo(host or None, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise BindError(f"failed to bind to address {address}: {exc}") from exc
    wildcard = host in ("", "::")
    listeners: list[trio.SocketListener] = []
    failure: OSError | None = None
    # IPv6 first: a dual-stack wildcard socket serves IPv4 as well.
    for family, where in sorted({(entry[0], entry[4]) for entry in found}, key=lambda entry: -entry[0]):
        if wildcard and listeners:
            break
        try:
            listeners.append(await _listen(family, where, dual_stack=wildcard))
        except OSError as exc:
            failure = exc
            if port and exc.errno == _ADDRESS_IN_USE:
                break
    if not listeners or (failure is not None and failure.errno == _ADDRESS_IN_USE):
        for listener in listeners:
            await listener.aclose()
        raise BindError(f"failed to bind to address {address}: {failure}") from failure
    return listeners


@contextmanager
def unix_listener(path: Path, backlog: int = 16) -> Iterator[trio.SocketListener]:
    """Listen on a socket file that only its owner may use, in place of what another process has left, or still has, at ``path``
    (`listen_privately`, also for ``backlog``).

    The file goes with the context, unless another process has taken its place. Raises BindError.
    """
    try:
        sock, ours = listen_privately(path, backlog)
    except OSError as exc:
        raise BindError(f"failed to listen at {path}: {exc.strerror}") from exc
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    try:
        yield listener
    finally:
        listener.socket.close()
        with suppress(OSError):
            if os.path.samestat(path.stat(), ours):
                path.unlink()


async def has_listener(path: Path) -> bool:
    """Whether somebody listens at a socket file now."""
    try:
        with unix_address(path) as address:
            stream = await trio.open_unix_socket(address)
    except OSError:
        return False
    await stream.aclose()
    return True


def bound_addresses(listeners: Sequence[trio.SocketListener]) -> list[str]:
    """``host:port`` of each listener, with the real port."""
    names = [listener.socket.getsockname() for listener in listeners]
    return [f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}" for name in names]


async def serve_admin(
    routes: Routes, listeners: Sequence[trio.SocketListener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the routes on the listeners until cancelled; closes them."""
    slots = trio.CapacityLimiter(MAX_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept_from, listener, routes, slots, nursery)
        task_status.started()


_ADDRESS_IN_USE: Final = 98  # EADDRINUSE


def _parse_bind(address: str, default_host: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) < 65536):
        raise BindError(f"not an address to listen on: {address!r} (expected HOST:PORT, such as 127.0.0.1:15000)")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BindError(f"not an address to listen on: {address!r} (an IPv6 address goes in brackets: [::]:15000)")
    return host or default_host, int(port)


async def _listen(family: int, where: tuple[object, ...], *, dual_stack: bool) -> trio.SocketListener:
    sock = trio.socket.socket(family, trio.socket.SOCK_STREAM)
    try:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        if family == trio.socket.AF_INET6:
            sock.setsockopt(trio.socket.IPPROTO_IPV6, trio.socket.IPV6_V6ONLY, 0 if dual_stack else 1)
        await sock.bind(where)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


async def _accept_from(listener: trio.SocketListener, routes: Routes, slots: trio.CapacityLimiter, nursery: trio.Nursery) -> None:
    async with listener:
        while True:
            # The borrower is a token of our own: the slot is taken here and given back by the connection's task.
            token = object()
            await slots.acquire_on_behalf_of(token)
            try:
                stream = await listener.accept()
            except OSError as exc:
                slots.release_on_behalf_of(token)
                _log.warning("accept.failed", error=str(exc))
                await trio.sleep(_ACCEPT_PAUSE)
                continue
            nursery.start_soon(_serve_connection, stream, routes, slots, token)


_ACCEPT_PAUSE: Final = 0.1
"""After a failed accept (no file descriptors left): trying at once again would spin."""


async def _serve_connection(stream: trio.SocketStream, routes: Routes, slots: trio.CapacityLimiter, token: object) -> None:
    try:
        async with stream:
            await _Connection(stream, routes).serve()
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        pass  # the client went away or took too long; nothing is owed to it
    except Exception:  # a supervisor: what one client sends must not end the program, whoever forgot to expect it
        _log.exception("connection.failed")
    finally:
        slots.release_on_behalf_of(token)


class _Connection:
    """One client: request, answer, and again while it keeps the connection."""

    def __init__(self, stream: trio.abc.Stream, routes: Routes) -> None:
        self._stream = stream
        self._routes = routes
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER)

    async def serve(self) -> None:
        idle = HEADER_TIMEOUT
        while True:
            try:
                request = await self._read_request(idle)
            except h11.RemoteProtocolError as exc:
                await self._refuse(exc.error_status_hint, str(exc))
                return
            if request is None:
                return
            response = await _answer(self._routes, request)
            await self._write(response, with_body=request.method != "HEAD")
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()
            idle = IDLE_TIMEOUT

    async def _read_request(self, idle: float) -> Request | None:
        """The next request, or None when the client has closed. Raises h11.RemoteProtocolError, trio.TooSlowError."""
        # A kept-alive connection may be silent for a while; once a byte of a header came the rest has HEADER_TIMEOUT.
        if not self._http.trailing_data[0]:
            with trio.fail_after(idle):
                self._http.receive_data(bytes(await self._stream.receive_some(_READ)))
        with trio.fail_after(HEADER_TIMEOUT):
            head = await self._next_event()
        if not isinstance(head, h11.Request):
            return None
        body = bytearray()
        with trio.fail_after(BODY_TIMEOUT):
            while isinstance(event := await self._next_event(), h11.Data):
                body += event.data
                if len(body) > MAX_BODY:
                    raise h11.RemoteProtocolError("the body is too large", error_status_hint=413)
        if isinstance(event, h11.ConnectionClosed):
            return None
        return _parse_request(head, bytes(body))

    async def _next_event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                self._http.receive_data(bytes(await self._stream.receive_some(_READ)))
            elif isinstance(event, h11.Event):
                return event
            else:  # PAUSED: can't be, the cycle is restarted before more is read
                raise h11.RemoteProtocolError("unexpected data")

    async def _refuse(self, status: int, reason: str) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._write(Response.text(reason, status), with_body=True, close=True)

    async def _write(self, response: Response, *, with_body: bool, close: bool = False) -> None:
        headers = {
            "date": formatdate(usegmt=True),
            "content-type": response.content_type,
            "content-length": str(len(response.body)),
            **response.headers,
        }
        if close:
            headers["connection"] = "close"
        with trio.fail_after(RESPONSE_TIMEOUT):
            await self._send(h11.Response(status_code=response.status, headers=list(headers.items())))
            if with_body and response.body:
                await self._send(h11.Data(data=response.body))
            await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            await self._stream.send_all(data)


def _parse_request(head: h11.Request, body: bytes) -> Request:
    try:
        target = urlsplit(head.target.decode("ascii"))
        query = dict(parse_qsl(target.query, keep_blank_values=True, max_num_fields=64))
    except ValueError as exc:
        raise h11.RemoteProtocolError(f"not a request target: {exc}") from exc
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
    return Request(head.method.decode("ascii"), unquote(target.path), query, headers, body)


async def _answer(routes: Routes, request: Request) -> Response:
    route = routes.get(request.path)
    if route is None:
        return Response.text("not found", 404)
    if request.method not in route.methods:
        allowed = ", ".join(sorted(route.methods))
        return Response(405, f"{route.usage or f'method not allowed; use {allowed}'}\n".encode(), headers={"allow": allowed})
    try:
        return await route.handler(request)
    except Exception:  # a supervisor: a defect in one page must not end the program
        _log.exception("handler.failed", path=request.path)
        return Response.text("internal error, see the log", 500)
