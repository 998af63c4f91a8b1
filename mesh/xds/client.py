"""Delta ADS client of a proxy: connects, keeps what it was given, reconnects with the versions it holds, and never in a hot loop.

Behaviour: ztunnel's; but here a clean end or a local failure (an unreadable root certificate) waits as well.
"""

from __future__ import annotations

import gc
import random
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeAlias

import structlog
import trio

from mesh.linux.memory import return_free_memory
from mesh.rpc.client import CLIENT_LIMITS, Channel, ClientStream, open_channel
from mesh.rpc.errors import RpcError
from mesh.state.store import Delta, joined
from mesh.wire.delta import DeltaClient, Interest, Request
from mesh.wire.errors import ErrorCode, RemoteProtocolError
from mesh.xds.decode import DecodedResponse, InvalidResource, decode_response
from mesh.xds.names import ADDRESS, ADS_METHOD, AUTHORIZATION, TAKES_PARTS
from mesh.xds.proto import discovery_pb2 as discovery
from mesh.xds.proto import node_pb2 as node

BACKOFF_FIRST: Final = 0.010
BACKOFF_MAX: Final = 15.0
TIDY_AFTER: Final = 5.0
DECODE_IN_THREAD: Final = 64 * 1024
"""Bytes of a response beyond which it is decoded in a thread: some milliseconds' worth. The whole of a large mesh takes seconds."""

_NO_MORE: Final = discovery.DeltaDiscoveryResponse(more=True).SerializeToString()[:-1] + b"\0"
"""``more=False``, said: a message that leaves it out takes back nothing of those before it."""

log = structlog.get_logger("xds.client")


class Phase(Enum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AdsState:
    """Where the client stands. ``synced``: every type has been answered once since the start (it stays true through reconnects: what is
    held goes on being used). ``reason`` of FAILED; ``retry_in`` seconds until the next attempt."""

    phase: Phase
    synced: bool
    reason: str = ""
    retry_in: float = 0.0

    def __str__(self) -> str:
        failed = f"{self.reason}, next attempt in {self.retry_in:.2f} s" if self.phase is Phase.FAILED else self.phase.value
        return f"synced, {failed}" if self.synced else failed


@dataclass(frozen=True, slots=True)
class AdsUpdate:
    """One response, taken. ``raw`` is the DeltaDiscoveryResponse as it came (`decode_response` gives the same ``delta`` elsewhere).
    ``whole``: nothing was held of this type, so what the response does not name does not exist: for those that kept state of an earlier
    process. Where it comes in parts, that is what all of them together do not name, up to and with the one without ``more``.
    ``rejected`` is what was refused; unreadable policies are in it and, as policies that deny, in ``delta``."""

    type_url: str
    raw: bytes
    delta: Delta
    whole: bool
    rejected: tuple[InvalidResource, ...] = ()
    more: bool = False


OnUpdate: TypeAlias = Callable[[AdsUpdate], Awaitable[None] | None]
"""What is given back is waited for before the response is acknowledged, and before the next one is read."""
Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Channel]]


@dataclass(frozen=True, slots=True)
class AdsClientConfig:
    """Whom to ask and as whom. ``connect`` makes one connection (`connect_tls`); ``metadata`` gives the call's headers, asked for every
    connection, so that a renewed token is used; it may raise OSError or ValueError, which is a failed attempt."""

    connect: Connect
    metadata: Callable[[], Mapping[str, str]]
    node_id: str
    node_metadata: Mapping[str, Any] = field(default_factory=dict)
    on_demand: bool = False
    types: tuple[str, ...] = (ADDRESS, AUTHORIZATION)
    """What to ask for, in this order. ``on_demand`` is about ADDRESS alone."""
    gather: bool = True
    """Whether the parts of a whole set are put together before they are given on, for those that replace what they had by it."""


def connect_tls(host: str, port: int, tls: Callable[[], ssl.SSLContext | None], *, server_hostname: str | None = None) -> Connect:
    """Connections to ``host:port``; ``tls`` is asked for every one, so that a changed root certificate is used."""
    return lambda: open_channel(host, port, ssl_context=tls(), server_hostname=server_hostname)


def bearer_metadata(token: Path | None, *, cluster_id: str, extra: Mapping[str, str] | None = None) -> Callable[[], Mapping[str, str]]:
    """Metadata that istiod authenticates by: the file's token, read anew every time (surrounding whitespace is not part of it), and the
    cluster. None: no token. Raises OSError when called and the file cannot be read, ValueError when it is empty."""

    def read() -> Mapping[str, str]:
        if token is None:
            return dict(extra or {})
        text = token.read_text("ascii").strip()
        if not text:
            raise ValueError(f"{token} is empty")
        return {"authorization": f"Bearer {text}", "clusterid": cluster_id, **(extra or {})}

    return read


class _Backoff:
    """10 ms, doubling to 15 s, with 20 % of jitter; back to 10 ms after a connection that lasted longer than the pause before it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._next = BACKOFF_FIRST

    def pause_after(self, lived: float) -> float:
        """Seconds to wait after an attempt that lived so long."""
        if lived > max(self._next, 1.0):
            self._next = BACKOFF_FIRST
        pause = self._next
        self._next = min(BACKOFF_MAX, pause * 2)
        return min(BACKOFF_MAX, pause * self._rng.uniform(0.8, 1.2))


async def run_ads_client(
    config: AdsClientConfig,
    on_update: OnUpdate,
    on_state: Callable[[AdsState], None] = lambda state: None,
    *,
    demand: trio.MemoryReceiveChannel[tuple[str, ...]] | None = None,
    rng: random.Random | None = None,
) -> None:
    """Until cancelled. ``on_update`` is called once for every response, before it is acknowledged; ``on_state`` at every change. ``demand``
    brings names to ask for when ``config.on_demand``. What the callbacks raise ends the client."""
    machine = DeltaClient([Interest(type_url, config.on_demand and type_url == ADDRESS) for type_url in config.types])
    backoff = _Backoff(rng or random.Random())
    async with trio.open_nursery() as nursery:
        session = _Session(config, machine, on_update, on_state, nursery)
        if demand is not None:
            nursery.start_soon(session.run_demand, demand)
        while True:
            on_state(AdsState(Phase.CONNECTING, machine.synced))
            started = trio.current_time()
            reason = await session.attempt()
            machine.stop()
            pause = backoff.pause_after(trio.current_time() - started)
            log.warning("xds.disconnected", error=reason, retry_in=round(pause, 3))
            on_state(AdsState(Phase.FAILED, machine.synced, reason, pause))
            await trio.sleep(pause)


class _Session:
    """What lasts over the connections of one client."""

    def __init__(
        self,
        config: AdsClientConfig,
        machine: DeltaClient,
        on_update: OnUpdate,
        on_state: Callable[[AdsState], None],
        nursery: trio.Nursery,
    ) -> None:
        self._tidying = Tidying(nursery)
        self._config = config
        self._machine = machine
        self._on_update = on_update
        self._on_state = on_state
        self._stream: ClientStream | None = None
        self._gathered: dict[str, list[AdsUpdate]] = {}
        """By type: the parts of a set that is not whole yet."""

    async def attempt(self) -> str:
        """One connection, from its making to its end; why it ended."""
        try:
            metadata, connection = self._config.metadata(), self._config.connect()
        except (OSError, ValueError) as exc:  # a token or root certificate that is not there, or not one
            return str(exc)
        try:
            async with connection as channel, channel.stream(ADS_METHOD, metadata=metadata) as stream:
                await self._converse(stream)
        except RpcError as exc:
            return str(exc)
        except RemoteProtocolError as exc:
            return exc.reason
        finally:
            self._stream = None
            for type_url in self._gathered:
                self._machine.forget(type_url)
            self._gathered.clear()
        return "ended by the server"

    async def _converse(self, stream: ClientStream) -> None:
        for number, request in enumerate(self._machine.start()):
            await stream.send(self._encode(request, introduce=number == 0))
        self._stream = stream
        self._on_state(AdsState(Phase.CONNECTED, self._machine.synced))
        while (raw := await stream.receive()) is not None:
            reply = await self._take(raw)
            if is_large(raw):
                self._tidying.soon()
            del raw  # it may be the whole of a large mesh, and the next may be long in coming
            await stream.send(self._encode(reply))

    async def _take(self, raw: bytes) -> Request:
        was_synced = self._machine.synced
        decoded = await decode(raw, first=not was_synced)
        whole = self._machine.is_whole(decoded.type_url)
        if decoded.type_url not in self._config.types:
            log.error("xds.unknown_type", type=decoded.type_url)
        else:
            update = self._gather(AdsUpdate(decoded.type_url, raw, decoded.delta, whole, decoded.rejected, decoded.more))
            if update is not None and (taking := self._on_update(update)) is not None:
                await taking
        for bad in decoded.rejected:
            log.warning("xds.resource_rejected", type=decoded.type_url, resource=bad.name, error=bad.reason)
        reply = self._machine.receive(
            decoded.type_url,
            decoded.nonce,
            accepted=decoded.versions,
            removed=decoded.removed,
            errors=[str(bad) for bad in decoded.rejected],
            more=decoded.more,
        )
        if not was_synced and self._machine.synced:
            self._on_state(AdsState(Phase.CONNECTED, True))
        return reply

    def _gather(self, update: AdsUpdate) -> AdsUpdate | None:
        """What is to be given on; None: more of it has to come first."""
        if not (self._config.gather and update.whole and (update.more or update.type_url in self._gathered)):
            return update
        parts = self._gathered.setdefault(update.type_url, [])
        parts.append(update)
        if sum(len(part.raw) for part in parts) > CLIENT_LIMITS.max_message:
            raise RemoteProtocolError(f"a set of more than {CLIENT_LIMITS.max_message} bytes", ErrorCode.ENHANCE_YOUR_CALM)
        if update.more:
            return None
        del self._gathered[update.type_url]
        # Messages of protobuf that follow each other are one: their lists are joined, and of the rest the last word counts.
        raw = b"".join(part.raw for part in parts) + _NO_MORE
        rejected = tuple(bad for part in parts for bad in part.rejected)
        return AdsUpdate(update.type_url, raw, joined(part.delta for part in parts), True, rejected)

    async def run_demand(self, demand: trio.MemoryReceiveChannel[tuple[str, ...]]) -> None:
        async for names in demand:
            request = self._machine.subscribe(ADDRESS, names)
            if request is not None and self._stream is not None:
                try:
                    await self._stream.send(self._encode(request))
                except RpcError:
                    pass  # the stream ended: the next one begins with all names

    def _encode(self, request: Request, *, introduce: bool = False) -> bytes:
        message = discovery.DeltaDiscoveryRequest(type_url=request.type_url, response_nonce=request.nonce)
        # Most are answers and have none of what follows, and protobuf takes longer for a field that is given nothing than for the rest.
        if request.subscribe:
            message.resource_names_subscribe[:] = request.subscribe
        if request.unsubscribe:
            message.resource_names_unsubscribe[:] = request.unsubscribe
        if request.initial_versions:
            message.initial_resource_versions.update(request.initial_versions)
        if request.error is not None:
            message.error_detail.message = request.error
        if introduce:
            message.node.CopyFrom(node.Node(id=self._config.node_id))
            message.node.metadata.update({**self._config.node_metadata, TAKES_PARTS: True})
        return message.SerializeToString()


class Tidying:
    """Gives memory back after responses that were `is_large`, once all had time to be passed on and dropped. With 100 000 workloads it is
    90 MB of 250, in each process that has had them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._due: float | None = None

    def soon(self) -> None:
        """Once for many: a large mesh comes in many parts."""
        waits, self._due = self._due is not None, trio.current_time() + TIDY_AFTER
        if not waits:
            self._nursery.start_soon(self._tidy)

    async def _tidy(self) -> None:
        while self._due is not None:
            if trio.current_time() >= self._due:
                self._due = None
            else:
                await trio.sleep_until(self._due)
        await trio.to_thread.run_sync(return_free_memory)


def is_large(raw: bytes) -> bool:
    """Whether `decode` will take its time."""
    return len(raw) > DECODE_IN_THREAD


async def decode(raw: bytes, *, first: bool) -> DecodedResponse:
    """`decode_response`, in a thread if it is large. ``first``: nothing has been served yet. Raises RemoteProtocolError."""
    if not is_large(raw):
        return decode_response(raw)
    return await trio.to_thread.run_sync(_decode_large, raw, first)


def _decode_large(raw: bytes, first: bool) -> DecodedResponse:
    """What comes is here to stay and has no cycles: to look for some while it grows, and in it ever after, costs a third of the whole.

    Only what comes ``first`` is taken out of what is looked at, though: later it would take connections along that live just then, and what
    they leave in cycles would stay for ever, again with every control plane that starts.
    """
    enabled = gc.isenabled()
    if first:
        gc.collect(0)  # what is frozen below is never looked at again: no garbage must be in it
    gc.disable()
    try:
        return decode_response(raw)
    finally:
        if first:
            gc.freeze()
        if enabled:
            gc.enable()
