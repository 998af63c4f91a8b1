"""External authorizers: the requests and connections that CUSTOM policies match wait here for somebody else's word.

How an authorizer is reached is the caller's (`Connect`): in a waypoint it is a service of the mesh like any other. Connections are kept;
each check is bounded in time and size, and whatever goes wrong ends as the provider is configured: refused, or let through.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol, TypeAlias

import h11
import trio

from mesh.http.message import Request
from mesh.model.l7.policy import ExtAuthzGrpc, ExtAuthzHttp
from mesh.rpc import Channel, Limits, RpcError, open_channel_on
from mesh.rpc.client import CLIENT_LIMITS
from mesh.runtime.outbound import Answer, HttpConnection, OutboundError
from mesh.telemetry.log import get_logger
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import Consultation
from waypoint_py.policy.consult import (
    CHECK_METHOD,
    MAX_BODY,
    Allowed,
    Answered,
    Buffered,
    Denied,
    Failed,
    HttpCheck,
    ResponseHeaders,
    grpc_check,
    http_check,
    read_grpc_answer,
    read_http_answer,
)
from waypoint_py.verdict import Flag, LocalReply, Park

MAX_IDLE: Final = 8
"""Connections that are kept for an HTTP authorizer."""
MAX_AUTHORIZERS: Final = 64
MAX_ANSWER: Final = 1 << 20
"""Bytes of a CheckResponse."""
_LIMITS: Final = Limits(max_message=MAX_ANSWER, stream_window=CLIENT_LIMITS.stream_window)

Connect: TypeAlias = Callable[[str, str, int], Awaitable[trio.abc.Stream]]
"""A connection to a service by namespace, hostname and port. Raises Unreachable, OSError."""

_log = get_logger("ext_authz")


class Unreachable(Exception):
    """There is no way to the authorizer; the text says why."""


class BodySource(Protocol):
    """The exchange, asked for the beginning of its request's body. What it gives out goes to the application all the same, later."""

    async def buffer(self, limit: int) -> Buffered:
        """Wait until the body has ended or is longer than ``limit``; at most ``limit`` bytes of it."""


async def connect_plainly(namespace: str, hostname: str, port: int) -> trio.abc.Stream:
    """Over TCP, by what the resolver says of the hostname."""
    return await trio.open_tcp_stream(hostname, port)


class ExtAuthz:
    """All authorizers of a waypoint. `run` must be running."""

    def __init__(self, connect: Connect, *, identity: str = "", now: Callable[[], float] = time.time) -> None:
        """``identity``: our own, as a URI; told to gRPC authorizers as that of the destination."""
        self._connect = connect
        self._identity = identity
        self._now = now
        self._http: dict[_Place, list[HttpConnection]] = {}
        self._channels: dict[_Place, _Channel] = {}
        self._opening: dict[_Place, trio.Lock] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                for place in list(self._http):
                    await self._forget(place)

    # Filters

    def ask(
        self,
        consultation: Consultation,
        request: Request,
        connection: Connection,
        body: BodySource | None,
        on_allow: Callable[[ResponseHeaders], None],
    ) -> Park:
        """A request. ``body`` None: it has none. Let through, it is changed as the authorizer says, and ``on_allow`` gets what is to be
        added to its response."""

        async def run() -> LocalReply | None:
            provider = consultation.provider
            buffered = await _buffer(provider, request, body)
            if buffered is not None and not buffered.complete and not provider.allow_partial_message:
                because = f"the body is longer than the {provider.max_request_bytes} bytes that {consultation.provider_name} wants to see"
                return LocalReply(413, b"Payload Too Large", details="request_payload_too_large", because=because)
            answered = await self._check(provider, request, connection, buffered)
            if isinstance(answered, Allowed):
                answered.apply(request)
                on_allow(answered.response)
            return self._reply(consultation, answered)

        return Park(run, f"the authorizer {consultation.provider_name}")

    def ask_connection(self, consultation: Consultation, connection: Connection) -> Park:
        """A connection: only gRPC authorizers know such. A LocalReply means that it is to be closed."""

        async def run() -> LocalReply | None:
            return self._reply(consultation, await self._check(consultation.provider, None, connection, None))

        return Park(run, f"the authorizer {consultation.provider_name}")

    def _reply(self, consultation: Consultation, answered: Answered) -> LocalReply | None:
        provider, name = consultation.provider, consultation.provider_name
        if isinstance(answered, Allowed):
            return None
        if isinstance(answered, Denied):
            because = f"{consultation.policy}: {name} denied it"
            return LocalReply(
                answered.status,
                answered.body,
                list(answered.headers),
                (Flag.UNAUTHORIZED_EXTERNAL_SERVICE,),
                "ext_authz_denied",
                because,
                policy=consultation.policy,
            )
        _log.warning("check.failed", provider=name, reason=answered.because, let_through=provider.fail_open)
        if provider.fail_open:
            return None
        because = f"{consultation.policy}: {name} did not decide: {answered.because}"
        flags = (Flag.UNAUTHORIZED_EXTERNAL_SERVICE,)
        return LocalReply(provider.status_on_error, flags=flags, details="ext_authz_error", because=because, policy=consultation.policy)

    # Checks

    async def _check(
        self, provider: ExtAuthzHttp | ExtAuthzGrpc, request: Request | None, connection: Connection, body: Buffered | None
    ) -> Answered:
        place = (provider.namespace, provider.hostname, provider.port)
        try:
            with trio.fail_after(provider.timeout):
                if isinstance(provider, ExtAuthzGrpc):
                    message = grpc_check(provider, request, connection, body, now=self._now(), local=self._identity)
                    return read_grpc_answer(await self._call(place, message, provider.timeout))
                if request is None:
                    return Failed("an authorizer that is asked over HTTP knows nothing of connections")
                return read_http_answer(provider, await self._exchange(place, http_check(provider, request, body)))
        except trio.TooSlowError:
            return Failed(f"no answer within {provider.timeout:g} s")
        except h11.ProtocolError as exc:
            return Failed(f"the authorizer does not speak HTTP/1.1, or the request cannot be written in it: {exc}")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            return Failed(f"the connection broke: {exc.__cause__ or exc}")
        except (OutboundError, Unreachable, OSError, RpcError) as exc:
            return Failed(str(exc))

    async def _exchange(self, place: _Place, check: HttpCheck) -> Answer:
        while True:
            idle = self._http.setdefault(place, [])
            reused = bool(idle)
            connection = idle.pop() if idle else HttpConnection(await self._connect(*place))
            try:
                answer = await connection.exchange(check.method, check.target, check.headers, check.body, MAX_BODY)
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                await _discard(connection)
                # A server may close an idle connection just as we use it; a check may be asked twice.
                if not reused:
                    raise
                continue
            except BaseException:
                await _discard(connection)
                raise
            if connection.reuse() and len(idle) < MAX_IDLE:
                idle.append(connection)
            else:
                await _discard(connection)
            await self._bound()
            return answer

    async def _bound(self) -> None:
        while len(self._http) > MAX_AUTHORIZERS:
            await self._forget(next(iter(self._http)))

    async def _forget(self, place: _Place) -> None:
        for connection in self._http.pop(place, []):
            await _discard(connection)

    async def _call(self, place: _Place, message: bytes, within: float) -> bytes:
        while True:
            held = self._channels.get(place)
            reused = held is not None and held.channel.usable
            if held is None or not reused:
                held = await self._open(place)
            try:
                return await held.channel.unary(CHECK_METHOD, message, timeout=within)
            except RpcError:
                if not reused or held.channel.usable:
                    raise  # else the connection went away, and a new one may do

    async def _open(self, place: _Place) -> _Channel:
        if len(self._opening) > MAX_AUTHORIZERS:
            self._opening = {key: lock for key, lock in self._opening.items() if lock.locked()}
        async with self._opening.setdefault(place, trio.Lock()):
            held = self._channels.get(place)
            if held is not None and held.channel.usable:
                return held
            if self._nursery is None:
                raise Unreachable("this waypoint is going down")
            stream = await self._connect(*place)
            try:
                opened: _Channel = await self._nursery.start(self._hold, place, stream)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            self._channels[place] = opened
            while len(self._channels) > MAX_AUTHORIZERS:
                self._channels.pop(next(iter(self._channels))).scope.cancel()
            return opened

    async def _hold(
        self, place: _Place, stream: trio.abc.Stream, *, task_status: trio.TaskStatus[_Channel] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.CancelScope() as scope:
            async with open_channel_on(stream, authority=place[1], limits=_LIMITS) as channel:
                held = _Channel(channel, scope)
                task_status.started(held)
                await channel.wait_unusable()
                if self._channels.get(place) is held:
                    del self._channels[place]


_Place: TypeAlias = tuple[str, str, int]


class _Channel:
    """A connection to a gRPC authorizer, and what ends it."""

    __slots__ = ("channel", "scope")

    def __init__(self, channel: Channel, scope: trio.CancelScope) -> None:
        self.channel = channel
        self.scope = scope


async def _buffer(provider: ExtAuthzHttp | ExtAuthzGrpc, request: Request, body: BodySource | None) -> Buffered | None:
    """What of the body the authorizer wants to see; None if it wants none, or there is none that would ever end."""
    if provider.max_request_bytes == 0 or request.upgrade is not None:
        return None
    return Buffered(b"", True) if body is None else await body.buffer(provider.max_request_bytes)


async def _discard(connection: HttpConnection) -> None:
    with trio.CancelScope(shield=True), suppress(OSError):
        await connection.discard()
