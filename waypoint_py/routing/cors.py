"""Cross-origin requests: preflights are answered, answers to allowed origins say so (Fetch standard; behaviour: Envoy's CORS filter)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mesh.http.message import Headers, Message, Request
from mesh.model.l7.routing import Cors
from waypoint_py.routing.predicates import Test, compile_text
from waypoint_py.verdict import LocalReply

_ORIGIN: Final = b"origin"
_ASKED_METHOD: Final = b"access-control-request-method"
_ASKED_HEADERS: Final = b"access-control-request-headers"
_ALLOW_ORIGIN: Final = b"access-control-allow-origin"
_ALLOW_CREDENTIALS: Final = b"access-control-allow-credentials"
_EXPOSE: Final = b"access-control-expose-headers"


@dataclass(frozen=True, slots=True)
class CompiledCors:
    """A pattern that cannot be compiled allows no origin."""

    cors: Cors
    origins: tuple[Test, ...]
    methods: bytes
    headers: bytes
    expose: bytes

    def allows(self, origin: bytes) -> bool:
        return any(test(origin) for test in self.origins)


def compile_cors(cors: Cors) -> CompiledCors:
    compiled = [compile_text(match) for match in cors.origins]
    origins = tuple(each.test for each in compiled if not each.broken)
    return CompiledCors(cors, origins, *(",".join(names).encode() for names in (cors.methods, cors.headers, cors.expose)))


def is_preflight(request: Request) -> bool:
    """Whether a browser asks what it may ask."""
    return request.method == b"OPTIONS" and bool(request.first(_ORIGIN)) and bool(request.first(_ASKED_METHOD))


def find_allowed_origin(cors: CompiledCors, request: Request) -> bytes | None:
    """The request's origin, if it has one that is allowed: keep it for `allow_response`."""
    origin = request.first(_ORIGIN)
    return origin if origin and cors.allows(origin) else None


def answer_preflight(cors: CompiledCors, request: Request, because: str = "") -> LocalReply | None:
    """The answer to a preflight; None: the request goes on (it is none, or one of a foreign origin that the application shall judge)."""
    if not is_preflight(request):
        return None
    origin = request.first(_ORIGIN) or b""
    if not cors.allows(origin):
        if cors.cors.forward_unmatched:
            return None
        return LocalReply(200, details="cors_response", because=f"{because}: this origin is not allowed")
    headers = _allowing(cors, origin)
    _answer_asked(headers, b"access-control-allow-methods", cors, cors.methods, request.first(_ASKED_METHOD))
    _answer_asked(headers, b"access-control-allow-headers", cors, cors.headers, request.find(_ASKED_HEADERS))
    if cors.expose:
        headers.append((_EXPOSE, cors.expose))
    if cors.cors.max_age is not None:
        headers.append((b"access-control-max-age", str(cors.cors.max_age).encode()))
    return LocalReply(200, headers=headers, details="cors_response", because=f"{because}: preflight of an allowed origin")


def allow_response(response: Message, cors: CompiledCors, origin: bytes) -> None:
    """Let the script of an allowed origin read a response; what the application says about that is replaced."""
    for name, value in _allowing(cors, origin):
        response.replace(name, value)
    if cors.expose:
        response.replace(_EXPOSE, cors.expose)


def _allowing(cors: CompiledCors, origin: bytes) -> Headers:
    headers: Headers = [(_ALLOW_ORIGIN, origin)]
    if cors.cors.credentials:
        headers.append((_ALLOW_CREDENTIALS, b"true"))
    return headers


def _answer_asked(headers: Headers, name: bytes, cors: CompiledCors, allowed: bytes, asked: bytes | None) -> None:
    """A ``*`` means nothing to a browser that sends credentials: then what was asked for is named."""
    if allowed == b"*" and cors.cors.expand_wildcards and cors.cors.credentials:
        allowed = asked or b""
    if allowed:
        headers.append((name, allowed))
