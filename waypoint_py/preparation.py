"""What a request and a response get and lose at a waypoint whatever the route says. Pure."""

from __future__ import annotations

import random
from email.utils import formatdate
from functools import lru_cache
from typing import Final

from mesh.http.message import Request, Response
from mesh.model.identity import SpiffeId
from waypoint_py.replies import SERVER

REQUEST_ID: Final = b"x-request-id"
FORWARDED_PROTO: Final = b"x-forwarded-proto"
FORWARDED_CLIENT_CERT: Final = b"x-forwarded-client-cert"
SERVICE_TIME: Final = b"x-envoy-upstream-service-time"

CONTROLS: Final = frozenset(
    (
        b"x-envoy-internal",
        b"x-envoy-retry-on",
        b"x-envoy-retry-grpc-on",
        b"x-envoy-max-retries",
        b"x-envoy-upstream-rq-timeout-ms",
        b"x-envoy-upstream-rq-per-try-timeout-ms",
        b"x-envoy-upstream-rq-timeout-alt-response",
        b"x-envoy-upstream-alt-stat-name",
        b"x-envoy-upstream-stream-duration-ms",
        b"x-envoy-expected-rq-timeout-ms",
        b"x-envoy-hedge-on-per-try-timeout",
        b"x-envoy-force-trace",
        b"x-envoy-retriable-status-codes",
        b"x-envoy-retriable-header-names",
        b"x-envoy-ip-tags",
        b"x-envoy-original-path",
        b"x-envoy-original-url",
        b"x-envoy-original-host",
        b"x-envoy-attempt-count",
        b"x-envoy-is-timeout-retry",
    )
)
"""Headers that command a proxy, or that only a proxy may say: whoever sends a request has no say in them."""


_DROPPED: Final = CONTROLS | {FORWARDED_CLIENT_CERT}
_OURS: Final = frozenset((b"server", SERVICE_TIME))


def prepare(request: Request, *, peer: SpiffeId, us: SpiffeId | None, include_identity: bool, rng: random.Random) -> None:
    """A request as it is judged and routed. ``include_identity``: applications are told who the caller is, in place of what it says."""
    kept = request.headers
    said = dict(kept)  # of several of one name the last
    if not _DROPPED.isdisjoint(said):
        kept = [pair for pair in kept if pair[0] not in _DROPPED]
    request_id = said.get(REQUEST_ID)
    if not request_id:
        if request_id is not None:
            kept = [pair for pair in kept if pair[0] != REQUEST_ID]
        kept.append((REQUEST_ID, new_request_id(rng)))
    proto = said.get(FORWARDED_PROTO)
    if proto is None:
        kept.append((FORWARDED_PROTO, b"http"))
        request.scheme = b"http"
    elif proto in (b"http", b"https"):
        request.scheme = proto
    if include_identity and us is not None:
        kept.append((FORWARDED_CLIENT_CERT, f"By={us};URI={peer}".encode()))
    request.headers = kept


def finish_response(response: Response, date: bytes, service_time: float | None) -> None:
    """A response as the client gets it. ``service_time`` in seconds; None: it is an answer of ours."""
    headers = response.headers
    said = dict(headers)
    if not _OURS.isdisjoint(said):
        headers = [pair for pair in headers if pair[0] not in _OURS]
    if b"date" not in said:
        headers.append((b"date", date))
    if service_time is not None:
        headers.append((SERVICE_TIME, b"%d" % round(service_time * 1000)))
    headers.append((b"server", SERVER))
    response.headers = headers


def new_request_id(rng: random.Random) -> bytes:
    """A UUID of version 4."""
    number = rng.getrandbits(128) & ~(0xF << 76) & ~(0x3 << 62) | 4 << 76 | 2 << 62
    text = b"%032x" % number
    return b"-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def date_of(now: float) -> bytes:
    """A Unix time as HTTP says it."""
    return _date(int(now))


@lru_cache(maxsize=4)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode("ascii")
