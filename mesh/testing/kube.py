"""A small API server for tests: list, watch, create, replace, patch, delete over real HTTP, with the faults that real ones have.

Kept to what clients can observe: one counter of resource versions, a history that watches replay and that can be compacted away, pages,
bookmarks, Status objects for errors. Not kept: validation, admission, managed fields.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio
from trio.testing import memory_stream_pair
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Message, Request

from mesh.kube.kubeconfig import ClusterAccess
from mesh.kube.overlay import merge_patch
from mesh.kube.resources import (
    AUTOSCALERS,
    CONFIG_MAPS,
    DAEMON_SETS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    EVENTS,
    LEASES,
    RESOURCES,
    SECRETS,
    TOKEN_REVIEWS,
    Resource,
)

_SERVED: Final = (
    *RESOURCES.values(),
    *(SECRETS, CONFIG_MAPS, LEASES, EVENTS, TOKEN_REVIEWS, DEPLOYMENTS, DAEMON_SETS, AUTOSCALERS, DISRUPTION_BUDGETS),
)
_MAX_HEADER: Final = 64 << 10

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came in."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True, slots=True)
class _Change:
    version: int
    type: str
    resource: Resource
    object: Object


class _Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.headers = code, reason, message, dict(headers or {})

    def status(self) -> Object:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }


@dataclass(slots=True)
class _Target:
    resource: Resource
    namespace: str = ""
    name: str = ""
    subresource: str = ""


@dataclass(slots=True)
class Faults:
    """What goes wrong, by the test's wish."""

    cuts: list[int] = field(default_factory=list)
    """The next connections end after so many bytes that we sent, one entry each."""
    refusals: list[tuple[int, str, Mapping[str, str]]] = field(default_factory=list)
    """The next requests are answered so: status, reason, headers."""
    stalled: bool = False
    """Watches are accepted and then silent."""
    absent_groups: set[str] = field(default_factory=set)
    """API groups that are not served: 404."""
    hangs_up: bool = False
    """Connections end after one answer, without a word."""
    down: bool = False
    """No new connection is taken."""


class FakeApiServer:
    """Change objects with `put` and `remove` or through its API; look at `objects` and `requests`."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        """By plural, namespace and name."""
        self.requests: list[Seen] = []
        self.faults = Faults()
        self.tokens: dict[str, Object] = {}
        """Status of a TokenReview by token; others are not authenticated."""
        self.accepted_tokens: set[str] | None = None
        """Bearer tokens that may call; None: everybody may."""
        self.bookmarks = True
        self.served: list[Resource] = list(_SERVED)
        """Add what else it shall know."""
        self.version = {"major": "1", "minor": "34", "gitVersion": "v1.34.4"}
        self.ports: dict[tuple[str, str, int], Callable[[trio.abc.Stream], Awaitable[None]]] = {}
        """What serves a connection to a port of a pod, by namespace, pod and port; of others the kubelet says that they refuse."""
        self.establishes = True
        """Whether CustomResourceDefinitions are taken into service, which makes nothing served here but their status say so."""
        self.logs: dict[tuple[str, str, str], str] = {}
        """By namespace and pod."""
        self._version = 100
        self._history: list[_Change] = []
        self._oldest = 100
        self._changed = trio.Event()
        self._cut_watches = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._uids = 0

    # The test's side

    def put(self, raw: Mapping[str, object]) -> Object:
        """Create or replace, with any status."""
        obj = copy.deepcopy(dict(raw))
        resource = self._resource_of(str(obj["kind"]))
        return self._store(resource, obj)

    def remove(self, kind: str, namespace: str, name: str) -> None:
        resource = self._resource_of(kind)
        self._delete(_Target(resource, namespace, name))

    def find(self, kind: str, namespace: str, name: str) -> Object | None:
        return self.objects.get((self._resource_of(kind).plural, namespace, name))

    def compact(self) -> None:
        """Resource versions of the past are expired."""
        self._oldest = self._version

    def cut_watches(self) -> None:
        """End every watch that is open."""
        self._cut_watches.set()
        self._cut_watches = trio.Event()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Until it holds; looked at after every change and request."""
        while not holds():
            await self._changed.wait()

    # Serving

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve connections of `connect` until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def connect(self) -> trio.abc.Stream:
        """A connection in memory, for `ApiClient`."""
        await trio.lowlevel.checkpoint()
        if self.faults.down or self._nursery is None:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = memory_stream_pair()
        try:
            self._nursery.start_soon(self._serve, ours)
        except RuntimeError:  # the server has ended: its nursery takes nobody any more
            raise ConnectionRefusedError(111, "Connection refused") from None
        return theirs

    async def run_tcp(self, *, port: int = 0, task_status: trio.TaskStatus[ClusterAccess] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve plain HTTP on the loopback until cancelled; ``nursery.start`` returns how to reach it."""
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        access = ClusterAccess("127.0.0.1", listeners[0].socket.getsockname()[1], tls=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            task_status.started(access)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        budget = self.faults.cuts.pop(0) if self.faults.cuts else None
        try:
            async with stream:
                if not self.faults.down:
                    await _Exchange(self, stream, budget).serve()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError, _Cut):
            pass

    def _resource_of(self, kind: str) -> Resource:
        return next(resource for resource in self.served if resource.kind == kind)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # Objects

    def _store(self, resource: Resource, obj: Object) -> Object:
        metadata = obj.setdefault("metadata", {})
        namespace = metadata.setdefault("namespace", "default") if resource.namespaced else ""
        key = (resource.plural, namespace, metadata["name"])
        before = self.objects.get(key)
        self._version += 1
        if before is None:
            self._uids += 1
            metadata.setdefault("uid", f"uid-{self._uids}")
            metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        else:
            for kept in ("uid", "creationTimestamp"):
                metadata.setdefault(kept, before["metadata"][kept])
        if before is None or before.get("spec") != obj.get("spec"):
            metadata["generation"] = (before["metadata"].get("generation", 0) if before else 0) + 1
        metadata["resourceVersion"] = str(self._version)
        if resource.kind == "CustomResourceDefinition" and self.establishes:
            obj["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
        obj.setdefault("apiVersion", resource.api_version)
        obj.setdefault("kind", resource.kind)
        self.objects[key] = obj
        self._record("MODIFIED" if before else "ADDED", resource, obj)
        return obj

    def _delete(self, target: _Target) -> Object:
        obj = self.objects.pop((target.resource.plural, target.namespace, target.name), None)
        if obj is None:
            raise _not_found(target)
        self._version += 1
        obj = copy.deepcopy(obj)
        obj["metadata"]["resourceVersion"] = str(self._version)
        self._record("DELETED", target.resource, obj)
        return obj

    def _record(self, type: str, resource: Resource, obj: Object) -> None:
        self._history.append(_Change(self._version, type, resource, copy.deepcopy(obj)))
        self._notify()


class _Cut(Exception):
    """The connection's budget of bytes is used up."""


class _Exchange:
    """One connection."""

    def __init__(self, server: FakeApiServer, stream: trio.abc.Stream, budget: int | None) -> None:
        self._server = server
        self._stream = stream
        self._budget = budget
        self._left = False
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADER)

    async def serve(self) -> None:
        while True:
            seen = await self._read()
            if seen is None:
                return
            self._server.requests.append(seen)
            self._server._notify()
            try:
                await self._answer(seen)
            except _Refusal as exc:
                await self._send_json(exc.code, exc.status(), exc.headers)
            if self._server.faults.hangs_up or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _read(self) -> Seen | None:
        head: h11.Request | None = None
        body = b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(bytes(await self._stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                break
            else:
                return None
        url = urlsplit(head.target.decode())
        headers = {name.decode(): value.decode() for name, value in head.headers}
        return Seen(head.method.decode(), unquote(url.path), dict(parse_qsl(url.query)), headers, json.loads(body) if body else None)

    async def _answer(self, seen: Seen) -> None:
        server = self._server
        if server.faults.refusals:
            code, reason, headers = server.faults.refusals.pop(0)
            raise _Refusal(code, reason, f"refused: {reason}", headers)
        token = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if server.accepted_tokens is not None and token not in server.accepted_tokens:
            raise _Refusal(401, "Unauthorized", "Unauthorized")
        document = self._discover(seen.path)
        if document is not None:
            await self._send_json(200, document)
            return
        target = self._parse_path(seen.path)
        if target.subresource in ("log", "portforward"):
            await self._serve_kubelet(target, seen)
            return
        if seen.method == "GET" and not target.name:
            if seen.query.get("watch") == "1":
                await self._watch(target, seen.query)
            else:
                await self._send_json(200, self._list(target, seen.query))
            return
        code, obj = self._change(seen, target)
        await self._send_json(code, obj)

    def _parse_path(self, path: str) -> _Target:
        parts = path.strip("/").split("/")
        group, version, parts = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
        namespace = ""
        if parts[0] == "namespaces" and len(parts) > 2 and not (group == "" and parts[2] == "status"):
            namespace, parts = parts[1], parts[2:]
        wanted = (group, version, parts[0])
        resource = next((r for r in self._server.served if (r.group, r.version, r.plural) == wanted), None)
        if resource is None or group in self._server.faults.absent_groups:
            raise _Refusal(404, "NotFound", "the server could not find the requested resource")
        return _Target(resource, namespace, *parts[1:3])

    def _discover(self, path: str) -> Object | None:
        """What the server serves, as it tells it; the server's version."""
        server = self._server
        parts = path.strip("/").split("/")
        match parts:
            case ["version"]:
                return dict(server.version)
            case ["apis"]:
                versions = dict.fromkeys(resource.api_version for resource in server.served if resource.group)
                return {"groups": [{"name": each.split("/")[0], "preferredVersion": {"groupVersion": each}} for each in versions]}
            case ["api", version] | ["apis", _, version]:
                group = parts[1] if parts[0] == "apis" else ""
                found = [each for each in server.served if (each.group, each.version) == (group, version)]
                if not found or group in server.faults.absent_groups:
                    raise _Refusal(404, "NotFound", "the server could not find the requested resource")
                verbs = ["get", "list", "watch", "create", "patch", "delete"]
                resources = [{"name": r.plural, "kind": r.kind, "namespaced": r.namespaced, "verbs": verbs} for r in found]
                return {"kind": "APIResourceList", "resources": resources}
        return None

    # What kubelets do

    async def _serve_kubelet(self, target: _Target, seen: Seen) -> None:
        pod = (target.namespace, target.name)
        if (target.resource.plural, *pod) not in self._server.objects:
            raise _not_found(target)
        if target.subresource == "log":
            body = self._server.logs.get((*pod, seen.query.get("container", "")), "").encode()
            await self._send(h11.Response(status_code=200, headers=[("content-length", str(len(body)))]))
            await self._send(h11.Data(data=body))
            await self._send(h11.EndOfMessage())
            return
        port = int(seen.query["ports"])
        await _serve_port(self._stream, seen, port, self._server.ports.get((*pod, port)))
        raise _Cut  # the connection is no longer HTTP's

    # Reading

    def _list(self, target: _Target, query: Mapping[str, str]) -> Object:
        server = self._server
        version, start = server._version, 0
        if "continue" in query:
            asked, _, position = query["continue"].partition(":")
            version, start = int(asked), int(position)
            if version < server._oldest:
                raise _Refusal(410, "Expired", "The provided continue parameter is too old")
        found = self._as_of(target, query, version)
        limit = int(query.get("limit", "0")) or len(found)
        metadata = {"resourceVersion": str(version)}
        if start + limit < len(found):
            metadata["continue"] = f"{version}:{start + limit}"
        kind = f"{target.resource.kind}List"
        return {"kind": kind, "apiVersion": target.resource.api_version, "metadata": metadata, "items": found[start : start + limit]}

    def _as_of(self, target: _Target, query: Mapping[str, str], version: int) -> list[Object]:
        """The objects at that version: the present, with younger changes taken back."""
        server = self._server
        objects = {key: obj for key, obj in server.objects.items() if key[0] == target.resource.plural}
        if version != server._version:
            objects = {}
            latest: dict[tuple[str, str, str], _Change] = {}
            changed: set[tuple[str, str, str]] = set()
            for change in server._history:
                key = _key(change.resource, change.object)
                if key[0] == target.resource.plural:
                    changed.add(key)
                    if change.version <= version:
                        latest[key] = change
            objects = {key: obj for key, obj in server.objects.items() if key[0] == target.resource.plural and key not in changed}
            objects |= {key: change.object for key, change in latest.items() if change.type != "DELETED"}
        return [obj for _, obj in sorted(objects.items()) if _matches(target, query, obj)]

    async def _watch(self, target: _Target, query: Mapping[str, str]) -> None:
        server = self._server
        position = int(query.get("resourceVersion") or server._version)
        if position < server._oldest:
            raise _Refusal(410, "Expired", f"too old resource version: {position} ({server._oldest})")
        await self._send(h11.Response(status_code=200, headers=[("content-type", "application/json"), ("transfer-encoding", "chunked")]))
        cut = server._cut_watches
        while not cut.is_set():
            if server.faults.stalled:
                await trio.sleep_forever()
            if position < server._oldest:
                await self._send_event("ERROR", _Refusal(410, "Expired", "too old resource version").status())
                break
            changed = server._changed
            for change in [change for change in server._history if change.version > position]:
                position = change.version
                if change.resource == target.resource and _matches(target, query, change.object):
                    await self._send_event(change.type, change.object)
            if changed.is_set() or position < server._oldest:
                continue
            if server.bookmarks and query.get("allowWatchBookmarks") == "true" and server._version > position:
                position = server._version
            if server.bookmarks and query.get("allowWatchBookmarks") == "true":
                bookmark = {"kind": target.resource.kind, "metadata": {"resourceVersion": str(position)}}
                await self._send_event("BOOKMARK", bookmark)
            async with trio.open_nursery() as nursery:
                for event in (changed, cut):
                    nursery.start_soon(_wait_then_cancel, event, nursery.cancel_scope)
                nursery.start_soon(self._wait_for_close, nursery.cancel_scope)
            if self._left:
                return
        await self._send(h11.EndOfMessage())

    async def _wait_for_close(self, scope: trio.CancelScope) -> None:
        """A client that goes away ends its watch."""
        try:
            self._left = not await self._stream.receive_some(1)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._left = True
        scope.cancel()

    # Changing

    def _change(self, seen: Seen, target: _Target) -> tuple[int, Object]:
        server = self._server
        key = (target.resource.plural, target.namespace, target.name)
        before = server.objects.get(key)
        if seen.method == "POST":
            return 201, self._create(seen, target)
        if before is None and not (
            seen.method == "PATCH" and seen.headers["content-type"].startswith("application/apply") and not target.subresource
        ):
            raise _not_found(target)
        match seen.method:
            case "GET":
                return 200, before or {}
            case "DELETE":
                return 200, server._delete(target)
            case "PUT":
                given = seen.body["metadata"].get("resourceVersion")
                if before and given and given != before["metadata"]["resourceVersion"]:
                    raise _Refusal(409, "Conflict", "the object has been modified; please apply your changes to the latest version")
                return 200, server._store(target.resource, seen.body)
            case "PATCH":
                merged = merge_patch(copy.deepcopy(before or {}), seen.body)
                assert isinstance(merged, dict)
                if before and target.subresource == "status":
                    merged["spec"] = before.get("spec", {})
                if before and merged == before:
                    return 200, before
                return 200, server._store(target.resource, merged)
        raise _Refusal(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _create(self, seen: Seen, target: _Target) -> Object:
        server = self._server
        body = seen.body
        if target.resource is TOKEN_REVIEWS:
            known = server.tokens.get(body["spec"]["token"])
            wanted = set(body["spec"].get("audiences", ()))
            if known is None or (wanted and not wanted & set(known.get("audiences", ()))):
                return {**body, "status": {"authenticated": False, "error": "invalid bearer token"}}
            return {**body, "status": known}
        if target.resource.namespaced:
            body.setdefault("metadata", {})["namespace"] = target.namespace
        if _key(target.resource, body) in server.objects:
            raise _Refusal(409, "AlreadyExists", f'{target.resource} "{body["metadata"]["name"]}" already exists')
        return server._store(target.resource, body)

    # Bytes

    async def _send_event(self, type: str, obj: Object) -> None:
        await self._send(h11.Data(data=json.dumps({"type": type, "object": obj}).encode() + b"\n"))

    async def _send_json(self, code: int, obj: Object, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(obj).encode()
        head = [("content-type", "application/json"), ("content-length", str(len(body))), *(headers or {}).items()]
        await self._send(h11.Response(status_code=code, headers=head))
        await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event) or b""
        if self._budget is not None and len(data) >= self._budget:
            await self._stream.send_all(data[: self._budget])
            raise _Cut
        if data:
            await self._stream.send_all(data)
        if self._budget is not None:
            self._budget -= len(data)


async def _wait_then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _serve_port(stream: trio.abc.Stream, seen: Seen, port: int, serve: Callable[[trio.abc.Stream], Awaitable[None]] | None) -> None:
    """The kubelet's side of ``v4.channel.k8s.io``."""
    socket = WSConnection(ConnectionType.SERVER)
    head = "".join(f"{name}: {value}\r\n" for name, value in seen.headers.items())
    socket.receive_data(f"GET {seen.path} HTTP/1.1\r\n{head}\r\n".encode())
    (request,) = socket.events()
    assert isinstance(request, Request)
    protocol = "v4.channel.k8s.io"
    assert protocol in request.subprotocols
    greeting = socket.send(AcceptConnection(subprotocol=protocol))
    greeting += b"".join(socket.send(Message(data=bytes([channel]) + port.to_bytes(2, "little"))) for channel in (0, 1))
    await stream.send_all(greeting)
    if serve is None:
        await stream.send_all(socket.send(Message(data=b"\x01" + f"error forwarding port {port}: connection refused".encode())))
        return
    ours, theirs = memory_stream_pair()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pump_in, stream, socket, ours)
            nursery.start_soon(serve, theirs)
            while data := await ours.receive_some(65536):
                await stream.send_all(socket.send(Message(data=b"\x00" + bytes(data))))
            await stream.send_all(socket.send(CloseConnection(code=1000)))
            nursery.cancel_scope.cancel()
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # either side may go first


async def _pump_in(stream: trio.abc.Stream, socket: WSConnection, to: trio.abc.Stream) -> None:
    message = bytearray()
    while data := await stream.receive_some(65536):
        socket.receive_data(bytes(data))
        for event in socket.events():
            if isinstance(event, BytesMessage):
                message += event.data
                if event.message_finished:
                    assert message[:1] == b"\x00"
                    await to.send_all(bytes(message[1:]))
                    message.clear()
    await to.aclose()


def _key(resource: Resource, obj: Object) -> tuple[str, str, str]:
    return resource.plural, obj["metadata"].get("namespace", "") if resource.namespaced else "", obj["metadata"]["name"]


def _matches(target: _Target, query: Mapping[str, str], obj: Object) -> bool:
    metadata = obj["metadata"]
    if target.namespace and metadata.get("namespace") != target.namespace:
        return False
    labels = metadata.get("labels", {})
    if not all(labels.get(key) == value for key, _, value in (term.partition("=") for term in _terms(query, "labelSelector"))):
        return False
    for term in _terms(query, "fieldSelector"):
        path, _, wanted = term.partition("=")
        value: Any = obj
        for part in path.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        if value != wanted:
            return False
    return True


def _terms(query: Mapping[str, str], selector: str) -> list[str]:
    return [term for term in query.get(selector, "").split(",") if term]


def _not_found(target: _Target) -> _Refusal:
    return _Refusal(404, "NotFound", f'{target.resource} "{target.name}" not found')
