"""What keeps a client with one endpoint: the key that consistent hashing goes by, found in a request or made for it. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from mesh.http.message import Request
from mesh.model.address import SocketAddress, ip_text
from mesh.model.l7.destination import ConsistentHash, HashCookie, HashHeader, HashQuery, HashSource
from waypoint_py.upstream.algorithms import hash_text


@dataclass(frozen=True, slots=True)
class Affinity:
    """``key`` None: there is nothing to go by, any endpoint will do. ``set_cookie``: the header that gives the client its cookie."""

    key: int | None
    set_cookie: bytes | None = None


NO_AFFINITY = Affinity(None)


def find_affinity(wanted: ConsistentHash, request: Request | None, client: SocketAddress, rng: random.Random) -> Affinity:
    """``request`` None for a TCP connection, which has only its source."""
    match wanted.key:
        case HashSource():
            return Affinity(hash_text(ip_text(client.ip).encode()))
        case HashHeader(name):
            return _of(None if request is None else request.find(name.lower().encode()))
        case HashQuery(name):
            return _of(None if request is None else _find_parameter(request.query, name.encode()))
        case HashCookie() as cookie:
            return NO_AFFINITY if request is None else _of_cookie(cookie, request, rng)


def _of(value: bytes | None) -> Affinity:
    return NO_AFFINITY if value is None else Affinity(hash_text(value))


def _of_cookie(cookie: HashCookie, request: Request, rng: random.Random) -> Affinity:
    value = _find_cookie(request, cookie.name.encode())
    if value is not None:
        return Affinity(hash_text(value))
    if cookie.ttl is None:
        return NO_AFFINITY
    made = b"%016x" % rng.getrandbits(64)
    parts = [b"%b=%b" % (cookie.name.encode(), made)]
    if cookie.ttl > 0:
        parts.append(b"Max-Age=%d" % int(cookie.ttl))
    if cookie.path:
        parts.append(b"Path=%b" % cookie.path.encode())
    parts += [f"{name}={value}".encode() if value else name.encode() for name, value in cookie.attributes]
    parts.append(b"HttpOnly")
    return Affinity(hash_text(made), b"; ".join(parts))


def _find_cookie(request: Request, name: bytes) -> bytes | None:
    for key, line in request.headers:
        if key != b"cookie":
            continue
        for pair in line.split(b";"):
            found, equals, value = pair.strip().partition(b"=")
            if equals and found == name:
                return value.strip(b'"')
    return None


def _find_parameter(query: bytes, name: bytes) -> bytes | None:
    for pair in query.split(b"&"):
        found, _, value = pair.partition(b"=")
        if unquote_to_bytes(found) == name:
            return unquote_to_bytes(value)
    return None
