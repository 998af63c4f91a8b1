"""What an external authorizer is asked, and what its answers mean: over HTTP, and by ``envoy.service.auth.v3.Authorization/Check``.

Pure. An answer that is none, or that would change what no authorizer may change, is a failure; whether the request goes on then is the
provider's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import quote, quote_from_bytes, unquote_to_bytes

from google.protobuf.message import DecodeError

from mesh.http.message import Headers, Request, Response
from mesh.model.address import SocketAddress
from mesh.model.l7.policy import ExtAuthzGrpc, ExtAuthzHttp
from mesh.runtime.outbound import Answer, Header
from mesh.xds.proto import ext_authz_pb2 as pb
from waypoint_py.context import Connection

CHECK_METHOD: Final = "/envoy.service.auth.v3.Authorization/Check"
PARTIAL_BODY: Final = b"x-envoy-auth-partial-body"
_TO_REMOVE: Final = b"x-envoy-auth-headers-to-remove"
MAX_MUTATIONS: Final = 128
"""Headers and parameters that one answer changes."""
MAX_BODY: Final = 64 << 10
"""Bytes of an answer that a client is shown."""


@dataclass(frozen=True, slots=True)
class Buffered:
    """The beginning of a request's body. ``complete``: it is all of it."""

    data: bytes
    complete: bool


@dataclass(frozen=True, slots=True)
class ResponseHeaders:
    """What an authorizer adds to the response of a request that it let through."""

    set: Sequence[Header] = ()
    add: Sequence[Header] = ()

    def apply(self, response: Response) -> None:
        for name, value in self.set:
            response.replace(name, value)
        for name, value in self.add:
            response.append(name, value)


@dataclass(slots=True)
class Allowed:
    """``set`` replaces, ``add`` appends a value, ``append`` only where the header is there, ``absent`` only where it is not,
    ``overwrite`` replaces only where it is."""

    set: Headers = field(default_factory=list)
    add: Headers = field(default_factory=list)
    append: Headers = field(default_factory=list)
    absent: Headers = field(default_factory=list)
    overwrite: Headers = field(default_factory=list)
    remove: list[bytes] = field(default_factory=list)
    set_parameters: list[tuple[bytes, bytes]] = field(default_factory=list)
    remove_parameters: list[bytes] = field(default_factory=list)
    response: ResponseHeaders = ResponseHeaders()

    def apply(self, request: Request) -> None:
        for name, value in self.set:
            request.replace(name, value)
        for name, value in self.add:
            request.append(name, value)
        for name, value in self.append:
            if (before := request.find(name)) is not None:
                request.replace(name, b"%b,%b" % (before, value))
        for name, value in self.absent:
            if request.first(name) is None:
                request.append(name, value)
        for name, value in self.overwrite:
            if request.first(name) is not None:
                request.replace(name, value)
        for name in self.remove:
            request.remove(name)
        if self.set_parameters or self.remove_parameters:
            request.path = _with_parameters(request.path, self.set_parameters, self.remove_parameters)


@dataclass(frozen=True, slots=True)
class Denied:
    """What the client is told."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer, or none that could be taken."""

    because: str


Answered: TypeAlias = Allowed | Denied | Failed


# Over HTTP


@dataclass(frozen=True, slots=True)
class HttpCheck:
    """A request for the authorizer."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes


class NamePatterns:
    """Header names: exact, ``prefix*`` or ``*suffix``, in any case."""

    __slots__ = ("_exact", "_prefixes", "_suffixes", "empty")

    def __init__(self, patterns: Iterable[str]) -> None:
        lower = [pattern.lower().encode() for pattern in patterns]
        self.empty = not lower
        self._exact = frozenset(lower)
        self._prefixes = tuple(pattern[:-1] for pattern in lower if pattern.endswith(b"*"))
        self._suffixes = tuple(pattern[1:] for pattern in lower if pattern.startswith(b"*"))

    def hit(self, name: bytes) -> bool:
        return name in self._exact or name.startswith(self._prefixes) or name.endswith(self._suffixes)


def http_check(provider: ExtAuthzHttp, request: Request, body: Buffered | None) -> HttpCheck:
    """The same method, path (after the provider's prefix) and host; of the headers those that the provider asks for."""
    data = b"" if body is None else body.data
    allowed = NamePatterns(provider.include_request_headers)
    additional = [(name.lower().encode(), value.encode()) for name, value in provider.additional_headers]
    replaced = {name for name, _ in additional} | _NOT_FORWARDED
    headers: Headers = [(b"host", request.authority), (b"content-length", b"%d" % len(data))]
    headers += [(name, value) for name, value in request.headers if allowed.hit(name) and name not in replaced]
    headers += [(name, value) for name, value in additional if name not in _NOT_FORWARDED]
    if body is not None:
        headers.append((PARTIAL_BODY, b"false" if body.complete else b"true"))
    target = quote(provider.path_prefix, safe=_SAFE).encode() + quote_from_bytes(request.path, safe=_SAFE).encode()
    return HttpCheck(request.method, target, headers, data)


_SAFE: Final = "".join(chr(code) for code in range(0x21, 0x7F))
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"expect",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_FORWARDED: Final = _HOP_BY_HOP | {b"host", b"content-length", PARTIAL_BODY}


def read_http_answer(provider: ExtAuthzHttp, answer: Answer) -> Answered:
    """200 lets through, 5xx is a failure of the authorizer, anything else is for the client."""
    if answer.status >= 500:
        return Failed(f"the authorizer answered {answer.status}")
    if len(answer.body) > MAX_BODY:
        return Failed(f"the authorizer's answer is larger than {MAX_BODY >> 10} KiB")
    headers = [(name.lower(), value) for name, value in answer.headers if name.lower() not in _FRAMING]
    if answer.status != 200:
        shown = NamePatterns((*provider.headers_downstream_on_deny, "www-authenticate", "location"))
        everything = not provider.headers_downstream_on_deny
        return Denied(answer.status, [header for header in headers if everything or shown.hit(header[0])], answer.body)
    upstream = NamePatterns(provider.headers_upstream_on_allow)
    downstream = NamePatterns(provider.headers_downstream_on_allow)
    removed = [name.strip().lower() for key, value in headers if key == _TO_REMOVE for name in value.split(b",")]
    set_upstream, add_upstream = _replacing(header for header in headers if header[0] != _TO_REMOVE and upstream.hit(header[0]))
    response = ResponseHeaders(*_replacing(header for header in headers if downstream.hit(header[0])))
    return _checked(Allowed(set=set_upstream, add=add_upstream, remove=[name for name in removed if name], response=response))


_FRAMING: Final = _HOP_BY_HOP | {b"host", b"content-length"}


def _replacing(headers: Iterable[Header]) -> tuple[Headers, Headers]:
    """Headers that shall stand in the place of those of their names: the first of each name replaces, the others are added."""
    replaced: Headers = []
    added: Headers = []
    seen: set[bytes] = set()
    for name, value in headers:
        (added if name in seen else replaced).append((name, value))
        seen.add(name)
    return replaced, added


# By gRPC


def grpc_check(
    provider: ExtAuthzGrpc, request: Request | None, connection: Connection, body: Buffered | None, *, now: float, local: str = ""
) -> bytes:
    """A CheckRequest. ``request`` None: for a connection. ``now`` in seconds since 1970. ``local``: our own identity, a URI."""
    check = pb.CheckRequest()
    attributes = check.attributes
    _fill_peer(attributes.source, connection.peer_address, str(connection.peer))
    _fill_peer(attributes.destination, connection.destination, local)
    attributes.request.time.FromNanoseconds(int(now * 1e9))
    if request is not None:
        _fill_http(attributes.request.http, request, body, as_bytes=provider.pack_as_bytes)
    return check.SerializeToString()


def _fill_peer(peer: pb.AttributeContext.Peer, address: SocketAddress, principal: str) -> None:
    peer.address.socket_address.address = str(address.ip)
    peer.address.socket_address.port_value = address.port
    peer.principal = principal


def _fill_http(http: pb.AttributeContext.HttpRequest, request: Request, body: Buffered | None, *, as_bytes: bool) -> None:
    http.id = _str(request.first(b"x-request-id") or b"")
    http.method = _str(request.method)
    http.path = _str(request.path)
    http.host = _str(request.authority)
    http.scheme = _str(request.scheme)
    http.protocol = request.version.value
    http.size = -1 if request.content_length is None else request.content_length
    pseudo = ((b":method", request.method), (b":path", request.path), (b":authority", request.authority), (b":scheme", request.scheme))
    for name, value in (*pseudo, *request.headers):
        if name == PARTIAL_BODY:
            continue
        key, text = _str(name), _str(value)
        http.headers[key] = f"{http.headers[key]},{text}" if key in http.headers else text
    if body is not None:
        http.headers[PARTIAL_BODY.decode()] = "false" if body.complete else "true"
        http.size = len(body.data)
        if as_bytes:
            http.raw_body = body.data
        else:
            http.body = _str(body.data)


def _str(text: bytes) -> str:
    # Protobuf's strings are UTF-8; what is not shows as U+FFFD, which no rule can take for what it looks like.
    return text.decode("utf-8", "replace")


def read_grpc_answer(message: bytes) -> Answered:
    """A CheckResponse: status 0 lets through, whatever else it says."""
    try:
        answer = pb.CheckResponse.FromString(message)
    except DecodeError:
        return Failed("the authorizer's answer is no CheckResponse")
    if answer.status.code != 0:
        return _read_denial(answer.denied_response)
    ok = answer.ok_response
    allowed = Allowed(
        remove=[name.lower().encode() for name in ok.headers_to_remove],
        set_parameters=[(parameter.key.encode(), parameter.value.encode()) for parameter in ok.query_parameters_to_set],
        remove_parameters=[name.encode() for name in ok.query_parameters_to_remove],
    )
    for option in ok.headers:
        name, value = _option(option)
        _list_for(allowed, option).append((name, value))
    response_set, response_add = _split_response(ok.response_headers_to_add)
    allowed.response = ResponseHeaders(response_set, response_add)
    return _checked(allowed)


def _read_denial(denied: pb.DeniedHttpResponse) -> Answered:
    status = denied.status.code if 200 <= denied.status.code < 600 else 403
    body = denied.body.encode()
    if len(body) > MAX_BODY or len(denied.headers) > MAX_MUTATIONS:
        return Failed("the authorizer's answer is too large")
    replaced, added = _split_response(denied.headers)
    headers = [(name, value) for name, value in (*_last_of_each(replaced), *added) if name not in _FRAMING]
    if any(not _is_header(name, value) for name, value in headers):
        return Failed("the authorizer's answer has a header that is none")
    return Denied(status, headers, body)


def _option(option: pb.HeaderValueOption) -> Header:
    return option.header.key.lower().encode(), option.header.raw_value or option.header.value.encode()


def _list_for(allowed: Allowed, option: pb.HeaderValueOption) -> Headers:
    if option.HasField("append"):
        return allowed.append if option.append.value else allowed.set
    match option.append_action:
        case pb.HeaderValueOption.ADD_IF_ABSENT:
            return allowed.absent
        case pb.HeaderValueOption.OVERWRITE_IF_EXISTS:
            return allowed.overwrite
        case _:  # 0 is also what an authorizer writes that knows nothing of actions: then it replaces, as the service's definition says
            return allowed.set


def _split_response(options: Iterable[pb.HeaderValueOption]) -> tuple[Headers, Headers]:
    replaced: Headers = []
    added: Headers = []
    for option in options:
        (added if option.append.value else replaced).append(_option(option))
    return replaced, added


def _last_of_each(headers: Headers) -> Headers:
    return [(name, value) for name, value in dict(headers).items()]


# What no answer may do

_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]{1,256}")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]{0,8192}")


def _is_header(name: bytes, value: bytes) -> bool:
    return _NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None


def _checked(allowed: Allowed) -> Answered:
    """Names that make the message what it is (pseudo-headers, host, framing) stay as they are; what is no header is a failure."""
    lists = (allowed.set, allowed.add, allowed.append, allowed.absent, allowed.overwrite)
    changes = sum(map(len, lists)) + len(allowed.remove) + len(allowed.set_parameters) + len(allowed.remove_parameters)
    if changes + len(allowed.response.set) + len(allowed.response.add) > MAX_MUTATIONS:
        return Failed(f"the authorizer changes more than {MAX_MUTATIONS} headers")
    response = ResponseHeaders(_changeable(allowed.response.set), _changeable(allowed.response.add))
    for headers in lists:
        headers[:] = _changeable(headers)
    if any(not _is_header(name, value) for headers in (*lists, response.set, response.add) for name, value in headers):
        return Failed("the authorizer's answer has a header that is none")
    allowed.remove = [name for name in allowed.remove if not name.startswith(b":") and name not in _FRAMING]
    allowed.response = response
    return allowed


def _changeable(headers: Iterable[Header]) -> Headers:
    return [(name, value) for name, value in headers if not name.startswith(b":") and name not in _FRAMING]


def _with_parameters(path: bytes, replaced: Sequence[tuple[bytes, bytes]], removed: Sequence[bytes]) -> bytes:
    bare, _, query = path.partition(b"?")
    gone = {*removed, *(name for name, _ in replaced)}
    pairs = [pair for pair in query.split(b"&") if pair and unquote_to_bytes(pair.partition(b"=")[0]) not in gone]
    kept = {name: value for name, value in replaced if name not in removed}
    pairs += [f"{quote(name, safe='')}={quote(value, safe='')}".encode() for name, value in kept.items()]
    return bare + b"?" + b"&".join(pairs) if pairs else bare
