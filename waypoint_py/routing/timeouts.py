"""How long a request may take: the route's word, and within it the client's (``grpc-timeout``). Seconds; None: as long as it likes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from mesh.http.message import Request
from mesh.model.l7.routing import Route
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.grpc import encode_timeout, parse_timeout

EXPECTED: Final = b"x-envoy-expected-rq-timeout-ms"
GRPC_TIMEOUT: Final = b"grpc-timeout"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """``total`` for the exchange with all its tries and the waiting between them; ``per_try`` for one, None: what is left of the total.
    ``because``: whose word ``total`` is; nobody's: empty."""

    total: float | None
    per_try: float | None
    because: str


UNLIMITED: Final = Timeouts(None, None, "")
CLIENTS_WORD: Final = "the client's grpc-timeout"


def find_timeouts(route: Route, request: Request, *, grpc: bool) -> Timeouts:
    """Of one request. A gRPC client may shorten what the route grants, by ``grpc-timeout``, never lengthen it; without a route's timeout
    its word alone counts."""
    total, asked = route.timeout or None, find_grpc_timeout(request) if grpc else None
    shorter = asked is not None and (total is None or asked < total)
    if shorter:
        total = asked
    per_try = None if route.retry is None else route.retry.per_try_timeout or None
    if total is None and per_try is None:
        return UNLIMITED
    if per_try is not None and total is not None and per_try >= total:
        per_try = None
    return Timeouts(total, per_try, CLIENTS_WORD if shorter else f"timeout of {route.origin}")


def find_grpc_timeout(request: Request) -> float | None:
    """What the client of a gRPC call grants; None if that is nothing, or nothing readable (ignored, as Envoy does)."""
    if (value := request.first(GRPC_TIMEOUT)) is None:
        return None
    try:
        # A deadline that has passed already is still one.
        return max(parse_timeout(value.decode("latin-1")), 0.001)
    except RemoteProtocolError:
        return None


def told_upstream(request: Request, timeouts: Timeouts, elapsed: float) -> Request:
    """A try's request, in which stands how long its answer is waited for, ``elapsed`` seconds after the exchange began; the very one that
    was given if there is nothing to say.

    A header of the client's of that name goes: it would be believed further on.
    """
    left = expected(timeouts, elapsed)
    if left is None and request.first(EXPECTED) is None:
        return request
    request = request.copy()
    request.remove(EXPECTED)
    if left is None:
        return request
    request.append(EXPECTED, b"%d" % math.ceil(left * 1000))
    if request.is_grpc:
        request.replace(GRPC_TIMEOUT, encode_timeout(left).encode())
    return request


def expected(timeouts: Timeouts, elapsed: float) -> float | None:
    """Seconds that a try which begins now may take, at least a millisecond; None: any time."""
    if timeouts.total is None:
        return timeouts.per_try
    left = max(timeouts.total - elapsed, 0.001)
    return left if timeouts.per_try is None else min(left, timeouts.per_try)
