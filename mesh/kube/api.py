"""A client of the Kubernetes API: HTTP/1.1 (h11) on trio, JSON, everything bounded in size and time.

HTTP/1.1 rather than HTTP/2: a watch is a response that never ends, one connection each keeps a slow one from holding up the others, and
there are a dozen of them.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import quote, urlencode

import h11
import msgspec
import trio

from mesh.kube.kubeconfig import ClusterAccess, KubeconfigError

CONNECT_TIMEOUT: Final = 10.0
REQUEST_TIMEOUT: Final = 30.0
"""Seconds for a whole request and its answer; the API server itself ends requests after 60."""
MAX_RESPONSE: Final = 64 << 20
"""Bytes of one answer: a page of 500 objects of etcd's 1.5 MiB would be more, 500 real ones are 3 MiB."""
MAX_EVENT: Final = 4 << 20
"""Bytes of one line of a watch: an object of etcd's limit, with room for its JSON."""
MAX_IDLE: Final = 8
TOKEN_AGE: Final = 60.0
"""Seconds a token file's content is used before it is read again, as client-go; kubelets renew at 80 % of its life."""
MAX_WAIT: Final = 10.0
"""Longest that a Retry-After is obeyed within a request."""
_ATTEMPTS: Final = 4
_READ: Final = 64 << 10
_MAX_HEADER: Final = 64 << 10

USER_AGENT: Final = "ambient-mesh"
"""The API server notes it as the field manager of what is created or patched without one."""
MERGE_PATCH: Final = "application/merge-patch+json"
APPLY_PATCH: Final = "application/apply-patch+yaml"
"""JSON is YAML; API servers since 1.16 take it."""

Json: TypeAlias = Mapping[str, object]
Connect: TypeAlias = Callable[[], Awaitable[trio.abc.Stream]]


class ApiError(Exception):
    """The API server refused; ``status`` is HTTP's, ``reason`` Kubernetes' (``NotFound``, ``Conflict``, ``Expired`` ...)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{message} ({status} {reason})" if reason else f"{message} ({status})")
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def expired(self) -> bool:
        """What was asked for by resource version is no longer there: list again."""
        return self.status == 410


class ApiUnavailable(Exception):
    """The API server can't be reached, went away, or answered what is not HTTP or JSON. Trying later may help."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list. ``items`` are undecoded objects; ``token`` asks for the next part, ``""`` after the last."""

    items: tuple[msgspec.Raw, ...]
    resource_version: str
    token: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """``type`` is ADDED, MODIFIED, DELETED or BOOKMARK; an ERROR is raised as ApiError instead."""

    type: str
    object: msgspec.Raw


class _ListMeta(msgspec.Struct):
    resourceVersion: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    message: str = ""
    reason: str = ""
    code: int = 0


_LISTS: Final = msgspec.json.Decoder(_List)
_EVENTS: Final = msgspec.json.Decoder(_Event)
_STATUSES: Final = msgspec.json.Decoder(_Status)
_OBJECTS: Final = msgspec.json.Decoder(dict[str, object])


def decode_object(data: bytes | msgspec.Raw) -> dict[str, object]:
    """Raises ApiUnavailable: what is no JSON object comes from something that is no API server."""
    try:
        return _OBJECTS.decode(data)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ApiUnavailable(f"the answer is no JSON object: {exc}") from exc


class ApiClient:
    """Requests to one API server. Safe to use from any number of tasks; each request has a connection for itself while it lasts."""

    def __init__(self, access: ClusterAccess, *, connect: Connect | None = None) -> None:
        """``connect`` replaces dialling, for tests."""
        self._access = access
        self._connect = connect or self._dial
        self._idle: list[_Connection] = []
        self._token = ""
        self._token_read = float("-inf")

    @property
    def access(self) -> ClusterAccess:
        return self._access

    # Verbs

    async def get(self, path: str) -> dict[str, object]:
        return decode_object(await self._request("GET", path))

    async def find(self, path: str) -> dict[str, object] | None:
        """The object, or None if there is none."""
        try:
            return await self.get(path)
        except ApiError as exc:
            if exc.status == 404:
                return None
            raise

    async def list_page(self, path: str, query: Mapping[str, str], limit: int, token: str = "") -> Page:
        """One part of a list; ``token`` from the part before."""
        query = {**query, "limit": str(limit), **({"continue": token} if token else {})}
        body = await self._request("GET", path, query)
        try:
            found = _LISTS.decode(body)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise ApiUnavailable(f"the answer is no list of objects: {exc}") from exc
        return Page(tuple(found.items or ()), found.metadata.resourceVersion, found.metadata.continue_)

    async def create(self, path: str, body: Json) -> dict[str, object]:
        return decode_object(await self._request("POST", path, body=body, content_type="application/json"))

    async def replace(self, path: str, body: Json) -> dict[str, object]:
        """PUT; with the ``metadata.resourceVersion`` that was read, a change in between is a Conflict (409)."""
        return decode_object(await self._request("PUT", path, body=body, content_type="application/json"))

    async def merge_patch(self, path: str, patch: Json) -> dict[str, object]:
        return decode_object(await self._request("PATCH", path, body=patch, content_type=MERGE_PATCH))

    async def apply(self, path: str, body: Json, *, manager: str, force: bool = True, dry_run: bool = False) -> dict[str, object]:
        """Server-side apply; ``force`` takes over fields that another manager set. ``dry_run``: only say what would come of it."""
        query = {"fieldManager": manager, "force": "true" if force else "false", **({"dryRun": "All"} if dry_run else {})}
        return decode_object(await self._request("PATCH", path, query, body=body, content_type=APPLY_PATCH))

    async def delete(self, path: str, *, propagation: str = "") -> None:
        """``propagation``: Background or Foreground (the object stays until what it owns is gone); empty: the kind's own default."""
        await self._request("DELETE", path, {"propagationPolicy": propagation} if propagation else None)

    async def stream(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
        """The answer's bytes as they come, however long that takes: logs. Use with `contextlib.aclosing`.

        Raises ApiError, ApiUnavailable.
        """
        connection, response = await self._open("GET", path, query, b"", "", fresh=True)
        try:
            if response.status_code != 200:
                raise await _read_refusal(connection, response.status_code)
            while True:
                with network_failures():
                    data = await connection.read_chunk()
                if data is None:
                    return
                yield data
        finally:
            connection.discard()

    async def open_stream(self, path: str, query: Mapping[str, str]) -> tuple[trio.abc.Stream, str, list[tuple[str, str]]]:
        """For protocols that begin as a request: a connection of its own, the request's target, and the headers that prove us."""
        with network_failures():
            headers = self._headers("", b"")
            with trio.fail_after(CONNECT_TIMEOUT):
                return await self._connect(), self._target(path, query), headers

    async def watch(
        self, path: str, query: Mapping[str, str], *, stall: float, on_open: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[WatchEvent, None]:
        """Events until the server ends the watch; ``on_open`` is called once it has begun. Use with `contextlib.aclosing`.

        ``stall``: seconds without a byte after which the watch counts as dead. Raises ApiError (410: list again), ApiUnavailable.
        """
        connection, response = await self._open("GET", path, {**query, "watch": "1"}, b"", "", fresh=True)
        try:
            if response.status_code != 200:
                raise await _read_refusal(connection, response.status_code)
            on_open()
            buffer = bytearray()
            while True:
                with network_failures(), trio.fail_after(stall):
                    data = await connection.read_chunk()
                if data is None:
                    return  # a line cut off in the middle is no event: the next watch brings it whole
                for line in _lines(buffer, data):
                    yield _parse_event(line)
        finally:
            connection.discard()

    async def aclose(self) -> None:
        """Let go of the idle connections."""
        while self._idle:
            self._idle.pop().discard()

    # Requests

    async def _request(
        self, method: str, path: str, query: Mapping[str, str] | None = None, *, body: Json | None = None, content_type: str = ""
    ) -> bytes:
        data = b"" if body is None else msgspec.json.encode(body)
        with network_failures(), trio.fail_after(REQUEST_TIMEOUT):
            connection, response = await self._open(method, path, query or {}, data, content_type)
            try:
                answer = await connection.read_body(MAX_RESPONSE)
            except BaseException:
                connection.discard()
                raise
        self._keep(connection)
        if not 200 <= response.status_code < 300:
            raise api_error(response.status_code, answer)
        return answer

    async def _open(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, content_type: str, *, fresh: bool = False
    ) -> tuple[_Connection, h11.Response]:
        """Send it; the connection is at the answer's body. Waits where the server asks for it, and renews a token that was refused once."""
        target = self._target(path, query)
        renewed = False
        for attempt in range(_ATTEMPTS):
            connection, response = await self._exchange(method, target, body, content_type, fresh=fresh)
            if response.status_code == 401 and self._access.renewable and not renewed:
                renewed = True
                self._access.forget()
                self._token_read = float("-inf")
                pause = 0.0
            elif response.status_code == 429 and attempt < _ATTEMPTS - 1:
                pause = _retry_after(response)
            else:
                return connection, response
            connection.discard()
            await trio.sleep(pause)
        return connection, response

    async def _exchange(self, method: str, target: str, body: bytes, content_type: str, *, fresh: bool) -> tuple[_Connection, h11.Response]:
        while True:
            connection = self._idle.pop() if self._idle and not fresh else None
            reused = connection is not None
            with network_failures():
                if connection is None:
                    with trio.fail_after(CONNECT_TIMEOUT):
                        connection = _Connection(await self._connect())
                try:
                    with trio.fail_after(REQUEST_TIMEOUT):
                        return connection, await connection.send(method, target, self._headers(content_type, body), body)
                except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
                    connection.discard()
                    # The server may close an idle connection just as we use it. All we send may be sent twice: creating again
                    # is answered with Conflict, which callers must expect anyway.
                    if not reused:
                        raise
                except BaseException:
                    connection.discard()
                    raise

    def _target(self, path: str, query: Mapping[str, str]) -> str:
        return quote(self._access.prefix + path) + (f"?{urlencode(query)}" if query else "")

    def _headers(self, content_type: str, body: bytes) -> list[tuple[str, str]]:
        headers = [("host", self._host()), ("user-agent", USER_AGENT), ("accept", "application/json")]
        token = self._current_token()
        if token:
            headers.append(("authorization", f"Bearer {token}"))
        if content_type:
            headers += [("content-type", content_type), ("content-length", str(len(body)))]
        return headers

    def _host(self) -> str:
        host = f"[{self._access.host}]" if ":" in self._access.host else self._access.host
        return f"{host}:{self._access.port}"

    def _current_token(self) -> str:
        if trio.current_time() - self._token_read > TOKEN_AGE:
            self._token = self._access.read_token()
            self._token_read = trio.current_time()
        return self._token

    def _keep(self, connection: _Connection) -> None:
        if connection.reuse() and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.discard()

    async def _dial(self) -> trio.abc.Stream:
        context = self._access.make_context()
        stream = await trio.open_tcp_stream(self._access.host, self._access.port)
        if context is None:
            return stream
        secured = trio.SSLStream(stream, context, server_hostname=self._access.server_name or self._access.host, https_compatible=True)
        try:
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(secured)
            raise
        return secured


class _Connection:
    """One HTTP/1.1 connection to the server."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER)

    async def send(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> h11.Response:
        """Send a request; returns at the head of its answer."""
        data = self._http.send(h11.Request(method=method, target=target, headers=headers)) or b""
        if body:
            data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        await self._stream.send_all(data)
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("closed before an answer")

    async def read_chunk(self) -> bytes | None:
        """A piece of the answer's body, None after the last."""
        event = await self._next_event()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def read_body(self, limit: int) -> bytes:
        body = bytearray()
        while (chunk := await self.read_chunk()) is not None:
            body += chunk
            if len(body) > limit:
                raise ApiUnavailable(f"the answer is larger than {limit >> 20} MiB")
        return bytes(body)

    def reuse(self) -> bool:
        """Make it ready for another request; False if it can't be."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def discard(self) -> None:
        """Close without ceremony: nothing is owed to the server."""
        stream = self._stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        if isinstance(stream, trio.SocketStream):
            stream.socket.close()
        elif isinstance(stream, trio.StapledStream):
            stream.send_stream.close()
            stream.receive_stream.close()

    async def _next_event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Event):
                return event
            if event is not h11.NEED_DATA:
                raise h11.RemoteProtocolError("unexpected data")
            self._http.receive_data(bytes(await self._stream.receive_some(_READ)))


async def _read_refusal(connection: _Connection, status: int) -> ApiError:
    """What the server answers instead of a stream. Raises ApiUnavailable: this answer too may be cut off, or never end."""
    with network_failures(), trio.fail_after(REQUEST_TIMEOUT):
        return api_error(status, await connection.read_body(MAX_RESPONSE))


@contextmanager
def network_failures() -> Iterator[None]:
    """Everything that the network can do to us as ApiUnavailable."""
    try:
        yield
    except trio.TooSlowError as exc:
        raise ApiUnavailable("the API server did not answer in time") from exc
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise ApiUnavailable(f"the connection to the API server broke: {exc.__cause__ or exc}") from exc
    except h11.ProtocolError as exc:
        raise ApiUnavailable(f"the API server broke off or does not speak HTTP/1.1: {exc}") from exc
    except ssl.SSLError as exc:
        raise ApiUnavailable(f"TLS with the API server failed: {exc}") from exc
    except OSError as exc:
        raise ApiUnavailable(f"the API server can't be reached: {exc}") from exc
    except KubeconfigError as exc:
        raise ApiUnavailable(str(exc)) from exc


def _lines(buffer: bytearray, data: bytes) -> Iterator[bytes]:
    """The whole lines that ``data`` completes; the rest stays in ``buffer``. Raises ApiUnavailable."""
    *whole, rest = data.split(b"\n")
    for line in whole:
        buffer += line
        if len(buffer) > MAX_EVENT:
            break
        if buffer:
            yield bytes(buffer)
        buffer.clear()
    else:
        buffer += rest
    if len(buffer) > MAX_EVENT:
        raise ApiUnavailable(f"an event of a watch is larger than {MAX_EVENT >> 20} MiB")


def _parse_event(line: bytes) -> WatchEvent:
    try:
        event = _EVENTS.decode(line)
        if event.type == "ERROR":
            status = _STATUSES.decode(event.object)
            raise ApiError(status.code or 500, status.reason, status.message or "the watch failed")
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ApiUnavailable(f"an event of a watch is no event: {exc}") from exc
    return WatchEvent(event.type, event.object)


def api_error(code: int, body: bytes) -> ApiError:
    """The Status object's own words where there is one."""
    try:
        status = _STATUSES.decode(body)
    except (msgspec.DecodeError, RecursionError):
        status = _Status()
    text = status.message or body[:200].decode("utf-8", "replace").strip() or "the API server gave no reason"
    return ApiError(code, status.reason, text)


def _retry_after(response: h11.Response) -> float:
    for name, value in response.headers:
        if name == b"retry-after" and value.isdigit() and len(value) < 10:
            return min(float(value), MAX_WAIT)
    return 1.0
