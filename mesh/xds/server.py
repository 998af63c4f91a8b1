"""Delta ADS for many clients: whole or on-demand sets, pushes of what changed, reconnects that cost only the difference.

Semantics: Istio's, with two improvements: policies have content versions too, so a reconnect does not send them all again,
and subscriptions in a stale request count.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import structlog
import trio
from google.protobuf.message import DecodeError

from mesh.rpc.errors import RpcError
from mesh.rpc.server import Bidi, Call, Handler, ServerStream
from mesh.wire.delta import Answer, DeltaServer, Kind, Request, Watch, nonce_of
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.grpc import Status
from mesh.xds.cache import ResourceSource
from mesh.xds.encode import Resource
from mesh.xds.l7 import AUTHORIZATION_POLICY, L7_TYPES, REQUEST_AUTHENTICATION, ROUTE_TABLE, waypoint_of_name
from mesh.xds.names import ADDRESS, ADS_METHOD, AUTHORIZATION, GATEWAY_NAME, TAKES_PARTS
from mesh.xds.proto import discovery_pb2 as discovery

MAX_REQUEST: Final = 64 * 1024 * 1024
"""A reconnecting client names everything it holds: 100 000 workloads are some 10 MB. Read only after authentication."""
PART_SIZE: Final = 1024 * 1024
"""Bytes of resources at which a message of a response ends; a resource that is larger by itself has one of its own. So neither side holds
more than a few of these at a time, and others have their turn in between."""
MAX_UNANSWERED: Final = 64
"""Answers due to one client; beyond, its next request waits until it has taken some."""

Authenticator: TypeAlias = Callable[[Call], Awaitable[object]]
"""Who calls, from the call's metadata and peer certificate; raises RpcError UNAUTHENTICATED. The result is shown as the caller."""


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a client says of itself with its first request. ``caller`` alone is proved (`Authenticator`)."""

    caller: object
    node_id: str
    node_name: str
    gateway: str
    """Metadata GATEWAY_NAME, of a waypoint."""


Assign: TypeAlias = Callable[[Introduction], str]
"""Which waypoint (``namespace/name`` of its Gateway) a client is, whose resources it gets then; empty: none. Raises RpcError to refuse."""


def nobody_is_a_waypoint(_: Introduction) -> str:
    """The default: no waypoint's resources for anybody, since there may be keys in them."""
    return ""


_ANSWER_FIRST: Final = (AUTHORIZATION, AUTHORIZATION_POLICY, REQUEST_AUTHENTICATION, ROUTE_TABLE)
"""Types whose absence lets something through, or denies, or that others name: new ones go out before, those that are gone after
everything else."""
_ORDER: Final = (*L7_TYPES, ADDRESS)
_REFUSALS: Final = (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED)

log = structlog.get_logger("xds.server")


@dataclass(frozen=True, slots=True)
class TypeStatus:
    """What one client has of one type. In sync when ``sent == acked``."""

    wildcard: bool
    subscribed: int
    sent: str
    acked: str
    error: str


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """One connected client, for humans (``proxy-status``)."""

    node_id: str
    peer: str
    caller: object
    types: Mapping[str, TypeStatus]


class _Encodings:
    """The parts of the last response of each type as bytes (`_encode`): a change goes to every agent, and so does the whole mesh where all
    agents come at once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bool], list[tuple[tuple[object, ...], Sequence[Resource], bytes]]] = {}

    def encode(self, type_url: str, version: str, with_aliases: bool, parts: Sequence[Part], index: int) -> bytes:
        """Of ``parts`` the one at ``index``."""
        part, kept = parts[index], self._kept.setdefault((type_url, with_aliases), [])
        del kept[len(parts) :]
        # Resources are told apart by identity, and held so long: to compare the bytes of a whole mesh would cost what is saved.
        key = version, tuple(map(id, part.resources)), tuple(part.removed)
        if index < len(kept) and kept[index][0] == key:
            return kept[index][2]
        del kept[index:]  # what follows is of a response that is no more
        encoded = _encode(type_url, version, with_aliases, part)
        if index == len(kept):
            kept.append((key, part.resources, encoded))
        return encoded


class AdsServer:
    """Serves ``source``; whoever changes it calls `publish` with what changed."""

    def __init__(
        self,
        source: ResourceSource,
        *,
        authenticate: Authenticator | None = None,
        confirm: Authenticator | None = None,
        confirm_every: float = math.inf,
        assign: Assign = nobody_is_a_waypoint,
    ) -> None:
        """``assign`` says who is which waypoint. ``confirm`` is asked again and again, ``confirm_every`` seconds apart: what was revoked
        ends a living stream too. A status other than UNAUTHENTICATED and PERMISSION_DENIED ends none: the caller is then who it was."""
        self._source = source
        self._authenticate = authenticate
        self._confirm = confirm
        self._confirm_every = confirm_every
        self._assign = assign
        self._encodings = _Encodings()
        self._connections: set[_Connection] = set()
        self._progress = trio.lowlevel.ParkingLot()
        """Woken whenever a client may have caught up, or gone."""

    def handlers(self) -> Mapping[str, Handler]:
        """For `mesh.rpc.serve`."""
        return {ADS_METHOD: Bidi(self._serve_stream, max_message=MAX_REQUEST)}

    def publish(self, changes: Mapping[str, Collection[str]], *, waypoints: bool | None = None) -> None:
        """Names that are new, different or gone, by type. Returns at once; a client that is slow gets several changes in one response.
        ``waypoints``: tell these alone, or all others alone."""
        for connection in self._connections:
            if waypoints is None or connection.is_waypoint == waypoints:
                connection.note(changes)

    async def wait_taken(self, *, waypoints: bool) -> None:
        """Until the waypoints, or all others, that are connected have answered everything that was published for them."""
        while any(connection.is_behind for connection in self._connections if connection.is_waypoint == waypoints):
            await self._progress.park()
        await trio.lowlevel.checkpoint()

    def _note_progress(self) -> None:
        self._progress.unpark_all()

    def connections(self) -> tuple[ConnectionStatus, ...]:
        """Who is connected now."""
        return tuple(connection.status() for connection in self._connections)

    async def _serve_stream(self, stream: ServerStream) -> None:
        caller = await self._authenticate(stream.call) if self._authenticate is not None else None
        guardian = partial(self._run_confirming, stream.call)
        connection = _Connection(self._source, self._encodings, stream, caller, guardian, self._assign, self._note_progress)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._note_progress()
            log.info("xds.disconnected", node=connection.node_id, peer=stream.call.peer.address)

    async def _run_confirming(self, call: Call) -> None:
        while self._confirm is not None:
            await trio.sleep(self._confirm_every)
            try:
                await self._confirm(call)
            except RpcError as exc:
                if exc.status in _REFUSALS:
                    raise
        await trio.sleep_forever()


class _Connection:
    """One client's stream: the reader files requests, the sender makes every response from the state of that moment."""

    def __init__(
        self,
        source: ResourceSource,
        encodings: _Encodings,
        stream: ServerStream,
        caller: object,
        guardian: Callable[[], Awaitable[None]],
        assign: Assign,
        on_progress: Callable[[], None],
    ) -> None:
        """``guardian`` runs as long as the stream and ends it by raising RpcError. ``on_progress``: told after every answer of its."""
        self.node_id = ""
        self._on_progress = on_progress
        self._sending = False
        self._assign = assign
        self._waypoint = ""
        self._guardian = guardian
        self._node_name = ""
        self._source = source
        self._encodings = encodings
        self._stream = stream
        self._caller = caller
        self._machine = DeltaServer()
        self._answers: deque[Answer] = deque()
        self._changed: dict[str, set[str]] = {}
        self._given: dict[str, set[str]] = {}
        """What an on-demand watch was sent, by type: it goes on getting changes and removals of that."""
        self._work = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._takes_parts = False
        self._session = secrets.token_hex(4)
        self._responses = 0
        self._failure: RpcError | None = None

    def note(self, changes: Mapping[str, Collection[str]]) -> None:
        """Changes for the types the client has asked for; a type it asks for later is built from the state of then."""
        for type_url, names in changes.items():
            if type_url in self._machine.watches:
                ours = names if type_url not in L7_TYPES else [name for name in names if waypoint_of_name(name) == self._waypoint]
                if ours:
                    self._changed.setdefault(type_url, set()).update(ours)
        self._work.unpark_all()

    @property
    def is_waypoint(self) -> bool:
        return bool(self._waypoint)

    @property
    def is_behind(self) -> bool:
        """Whether there is something that the client was not sent, or has not answered."""
        waiting = any(watch.nonce_sent != watch.nonce_acked and not watch.error for watch in self._machine.watches.values())
        return bool(waiting or self._sending or self._changed or self._answers)

    def status(self) -> ConnectionStatus:
        types = {
            url: TypeStatus(watch.wildcard, len(watch.names), watch.nonce_sent, watch.nonce_acked, watch.error)
            for url, watch in self._machine.watches.items()
        }
        return ConnectionStatus(self.node_id, self._stream.call.peer.address, self._caller, types)

    async def run(self) -> None:
        """Until the client half-closes. Raises RpcError."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard, self._run_sender, nursery.cancel_scope)
            nursery.start_soon(self._guard, self._run_reader, nursery.cancel_scope)
            nursery.start_soon(self._guard, self._guardian, nursery.cancel_scope)
        if self._failure is not None:
            raise self._failure

    async def _guard(self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        """The first of them to end ends the stream; its error is kept out of the nursery, which would wrap it in a group."""
        try:
            await task()
        except RpcError as exc:
            self._failure = self._failure or exc
        except RemoteProtocolError as exc:
            self._failure = self._failure or RpcError(Status.INVALID_ARGUMENT, exc.reason)
        scope.cancel()

    # --- requests ---

    async def _run_reader(self) -> None:
        while (raw := await self._stream.receive()) is not None:
            self._take(_parse(raw))
            while len(self._answers) >= MAX_UNANSWERED:
                await self._room.park()

    def _take(self, message: discovery.DeltaDiscoveryRequest) -> None:
        if not self.node_id:
            self._introduce(message)
        outcome = self._machine.receive(_request(message))
        if outcome.kind is Kind.NACK:
            log.warning("xds.nack", node=self.node_id, type=message.type_url, error=outcome.error)
        if outcome.answer is not None:
            self._answers.append(outcome.answer)
            self._work.unpark_all()
        self._on_progress()

    def _introduce(self, message: discovery.DeltaDiscoveryRequest) -> None:
        if message.node.id.count("~") != 3:
            raise RpcError(Status.INVALID_ARGUMENT, f"invalid node id {message.node.id[:100]!r}")
        self.node_id = message.node.id[:512]
        metadata = message.node.metadata.fields
        self._node_name = metadata["NODE_NAME"].string_value if "NODE_NAME" in metadata else ""
        gateway = metadata[GATEWAY_NAME].string_value if GATEWAY_NAME in metadata else ""
        self._takes_parts = TAKES_PARTS in metadata and metadata[TAKES_PARTS].bool_value
        self._waypoint = self._assign(Introduction(self._caller, self.node_id, self._node_name, gateway))
        log.info("xds.connected", node=self.node_id, peer=self._stream.call.peer.address)

    # --- responses ---

    async def _run_sender(self) -> None:
        while True:
            self._sending = bool(self._answers or self._changed)
            if self._answers:
                answer = self._answers.popleft()
                self._room.unpark_all()
                await self._respond(answer.type_url, *self._answer(answer), whole=True)
            elif self._changed:
                await self._push_changes()
            else:
                self._on_progress()
                await self._work.park()

    async def _push_changes(self) -> None:
        """New policies before what they are about, policies that are gone after: a policy that is named but not there denies, and what
        a waypoint's policy is about would go unguarded."""
        changed, self._changed = self._changed, {}
        gone: dict[str, set[str]] = {}
        for type_url in _ANSWER_FIRST:
            names = changed.pop(type_url, set())
            gone[type_url] = {name for name in names if self._source.get(type_url, name) is None}
            await self._push(type_url, names - gone[type_url])
        for type_url in sorted(changed, key=_rank):
            await self._push(type_url, changed[type_url])
        for type_url, names in gone.items():
            await self._push(type_url, names)

    async def _respond(self, type_url: str, resources: Sequence[Resource], removed: Iterable[str], *, whole: bool = False) -> None:
        """In as many messages as it takes; what is gone is in the last ones. ``whole``: they are of use together alone, so that a client
        which does not know of parts gets it in one."""
        self._responses += 1
        number = f"{self._source.version}-{self._session}-{self._responses}"
        version, with_aliases = self._source.version, not self._machine.watches[type_url].wildcard
        response = Part(resources, tuple(sorted(removed)))
        parts = [response] if whole and not self._takes_parts else list(split(response, PART_SIZE))
        for index in range(len(parts)):
            nonce, more = nonce_of(number, index), self._takes_parts and index + 1 < len(parts)
            own = discovery.DeltaDiscoveryResponse(nonce=nonce, more=more)
            self._machine.sent(type_url, nonce)
            encoded = self._encodings.encode(type_url, version, with_aliases, parts, index)
            await self._stream.send(encoded + own.SerializeToString())

    def _answer(self, answer: Answer) -> tuple[list[Resource], list[str]]:
        if answer.names is None:
            return self._whole(answer.type_url, answer.known)
        return self._named(answer.type_url, answer.names, answer.known)

    def _whole(self, type_url: str, known: Mapping[str, str]) -> tuple[list[Resource], list[str]]:
        self._changed.pop(type_url, None)  # all of it goes out now
        resources = [each for each in self._source.all(type_url) if known.get(each.name) != each.version and self._may_have(each)]
        return resources, [name for name in known if (found := self._source.get(type_url, name)) is None or not self._may_have(found)]

    def _may_have(self, resource: Resource) -> bool:
        return not resource.audience or resource.audience == self._waypoint

    def _named(self, type_url: str, names: Iterable[str], known: Mapping[str, str]) -> tuple[list[Resource], list[str]]:
        """What the names find. A name that finds nothing is named as removed: it does not exist."""
        first = type_url not in self._given
        found = {each.name: each for each in (self._source.on_node(type_url, self._node_name) if first else ())}
        missing: list[str] = []
        for name in names:
            resources = [each for each in self._source.find(type_url, name) if self._may_have(each)]
            found.update((each.name, each) for each in resources)
            if not resources:
                missing.append(name)
        self._given.setdefault(type_url, set()).update(found)
        return [each for each in found.values() if known.get(each.name) != each.version], missing

    async def _push(self, type_url: str, names: Collection[str]) -> None:
        resources, removed = self._find_changed(type_url, names) if names else ([], [])
        if resources or removed:
            await self._respond(type_url, resources, removed)

    def _find_changed(self, type_url: str, names: Collection[str]) -> tuple[list[Resource], list[str]]:
        watch = self._machine.watches[type_url]
        resources: list[Resource] = []
        removed: list[str] = []
        for name in names:
            resource = self._source.get(type_url, name)
            if resource is None:
                if watch.wildcard or name in self._given.get(type_url, ()):
                    removed.append(name)
            elif watch.wildcard or self._wants(type_url, watch, resource):
                resources.append(resource)
        if not watch.wildcard:
            given = self._given.setdefault(type_url, set())
            given.update(each.name for each in resources)
            given.difference_update(removed)
        return resources, removed

    def _wants(self, type_url: str, watch: Watch, resource: Resource) -> bool:
        given = self._given.get(type_url, set())
        return (
            resource.name in given
            or resource.name in watch.names
            or not watch.names.isdisjoint(resource.aliases)
            or any(group in watch.names or group in given for group in resource.groups)
            or (bool(resource.node) and resource.node == self._node_name)
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Of a response."""

    resources: Sequence[Resource] = ()
    removed: Sequence[str] = ()


def split(response: Part, size: int) -> Iterator[Part]:
    """A response in parts of about ``size`` bytes at most; one at least."""
    resources: list[Resource] = []
    used = 0
    for resource in response.resources:
        if resources and used + len(resource.body) > size:
            yield Part(resources)
            resources, used = [], 0
        resources.append(resource)
        used += len(resource.body)
    removed: list[str] = []
    for name in response.removed:
        if (resources or removed) and used + len(name) > size:
            yield Part(resources, removed)
            resources, removed, used = [], [], 0
        removed.append(name)
        used += len(name)
    yield Part(resources, removed)


def _rank(type_url: str) -> int:
    return _ORDER.index(type_url) if type_url in _ORDER else len(_ORDER)


def _parse(raw: bytes) -> discovery.DeltaDiscoveryRequest:
    try:
        return discovery.DeltaDiscoveryRequest.FromString(raw)
    except DecodeError as exc:
        raise RpcError(Status.INVALID_ARGUMENT, f"not a DeltaDiscoveryRequest: {exc}") from exc


def _request(message: discovery.DeltaDiscoveryRequest) -> Request:
    return Request(
        type_url=message.type_url,
        subscribe=tuple(message.resource_names_subscribe),
        unsubscribe=tuple(message.resource_names_unsubscribe),
        initial_versions=dict(message.initial_resource_versions),
        nonce=message.response_nonce,
        error=message.error_detail.message if message.HasField("error_detail") else None,
    )


def _encode(type_url: str, version: str, with_aliases: bool, part: Part) -> bytes:
    """Of a DeltaDiscoveryResponse all fields but ``nonce`` and ``more``: in protobuf's encoding what follows is another field."""
    response = discovery.DeltaDiscoveryResponse(
        system_version_info=version,
        type_url=type_url,
        removed_resources=part.removed,
        resources=[_message(type_url, resource, with_aliases) for resource in part.resources],
    )
    return response.SerializeToString()


def _message(type_url: str, resource: Resource, with_aliases: bool) -> discovery.Resource:
    return discovery.Resource(
        name=resource.name,
        version=resource.version,
        resource={"type_url": type_url, "value": resource.body},
        aliases=resource.aliases if with_aliases else (),
    )
