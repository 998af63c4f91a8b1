"""Whether a request that failed is sent again, when, and where not: one `RetryState` for each request. No clock, no socket.

Conditions are Envoy's, by its names. Only what came from an upstream is asked about: local replies (no route, denied, no endpoint) are
nobody's try and end the request. Once a response has begun there is no way back.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from mesh.http.message import Request, Response
from mesh.model.l7.destination import RetryBudget
from mesh.model.l7.routing import Retry
from mesh.wire.grpc import Status
from waypoint_py.routing.grpc import find_status
from waypoint_py.upstream.session import FailureKind, UpstreamFailure
from waypoint_py.verdict import Flag

_GRPC_CONDITIONS: Final = {
    "cancelled": Status.CANCELLED,
    "deadline-exceeded": Status.DEADLINE_EXCEEDED,
    "internal": Status.INTERNAL,
    "resource-exhausted": Status.RESOURCE_EXHAUSTED,
    "unavailable": Status.UNAVAILABLE,
}
CONDITIONS: Final = frozenset(
    (
        *_GRPC_CONDITIONS,
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "envoy-ratelimited",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "retriable-headers",
        "http3-post-connect-failure",
    )
)
"""Names that Envoy knows. ``retriable-headers`` (of headers nobody can name in Istio) and ``http3-post-connect-failure`` never hold."""

_GATEWAY_ERRORS: Final = frozenset((502, 503, 504))
_RATE_LIMITED: Final = b"x-envoy-ratelimited"
_NOT_CONNECTED: Final = frozenset((FailureKind.CONNECT, FailureKind.CONNECT_TIMEOUT, FailureKind.TLS, FailureKind.REFUSED))
_ANY_RESET: Final = ("reset", "5xx", "gateway-error")
PRIORITY_FREQUENCY: Final = 2
"""Tries after which other localities are preferred (Istio's setting of Envoy's previous_priorities)."""


@dataclass(frozen=True, slots=True)
class Again:
    """Send it again, ``delay`` seconds from now."""

    delay: float
    because: str


@dataclass(frozen=True, slots=True)
class Enough:
    """What came is the answer. ``flag``: what the access log shows because a retry that was due did not happen."""

    because: str
    flag: Flag | None = None


Decision: TypeAlias = Again | Enough


class Room(NamedTuple):
    """What a destination has under way, and how many retries of it may be: ``maximum``, or by ``budget`` where it has one."""

    active_requests: int = 0
    active_retries: int = 0
    maximum: int = 2**32 - 1
    budget: RetryBudget | None = None

    @property
    def has_room(self) -> bool:
        if self.budget is None:
            return self.active_retries < self.maximum
        share = int(self.active_requests * self.budget.percent / 100)
        return self.active_retries < max(share, self.budget.min_concurrency)


UNBOUNDED: Final = Room()


class RetryState:
    """The tries of one request.

    ``replayable`` says, each time, whether the whole request is still at hand (its body fitted the buffer, or it had none).
    ``honour_client``: whether ``x-envoy-max-retries`` may change the number; off, since a client could multiply its load by it.
    """

    __slots__ = ("_on", "_policy", "_priorities", "_remaining", "_retries", "_statuses", "tried")

    def __init__(self, policy: Retry | None, request: Request, *, honour_client: bool = False) -> None:
        self._policy = policy or _NEVER
        self._on = self._policy.on
        self._statuses = self._policy.statuses
        self._remaining = self._policy.attempts
        self._retries = 0
        self._priorities: list[int] = []
        self.tried: tuple[str, ...] = ()
        """Endpoints (`Endpoint.key`) that had a try, in order."""
        if honour_client and (asked := _max_retries(request)) is not None:
            self._remaining = asked

    @property
    def retries(self) -> int:
        """Decided so far."""
        return self._retries

    @property
    def per_try_timeout(self) -> float | None:
        return self._policy.per_try_timeout

    @property
    def may_retry(self) -> bool:
        """Whether anything at all would be retried: if not, the body needs no keeping."""
        return self._remaining > 0 and bool(self._on)

    def began(self, endpoint: str, priority: int = 0) -> None:
        """A try goes to this endpoint, of this priority of its localities."""
        self.tried = (*self.tried, endpoint)
        self._priorities.append(priority)

    @property
    def avoided(self) -> Sequence[str]:
        """Endpoints that the next try should not go to while there are others."""
        return () if self._policy.previous_hosts else self.tried

    @property
    def avoided_priorities(self) -> frozenset[int]:
        """Priorities that the next try should not go to while there are others: those tried, after every second try."""
        if not self._policy.remote_localities:
            return frozenset()
        whole = len(self._priorities) // PRIORITY_FREQUENCY * PRIORITY_FREQUENCY
        return frozenset(self._priorities[:whole])

    def after_response(self, response: Response, rng: random.Random, room: Room = UNBOUNDED, *, replayable: bool = True) -> Decision:
        """The head of a response came, and nothing of it has gone to the client. Trailers-only gRPC responses have their status here."""
        wanted = self.wants_response(response)
        if wanted is None:
            return _no_reason(response.status)
        return self._decide(wanted, rng, room, replayable)

    def after_failure(
        self, failure: UpstreamFailure, rng: random.Random, room: Room = UNBOUNDED, *, request_sent: bool = True, replayable: bool = True
    ) -> Decision:
        """A try failed before its response began. ``request_sent``: anything of the request had been written to the upstream."""
        condition = self._wants_failure(failure.kind, request_sent)
        if condition is None:
            return Enough(f"{failure.kind.value} is no reason to retry")
        return self._decide(f"{failure.kind.value} ({condition})", rng, room, replayable)

    def after_per_try_timeout(self, rng: random.Random, room: Room = UNBOUNDED, *, replayable: bool = True) -> Decision:
        """A try took too long; the request as a whole has time left. Counts as a reset, as with Envoy."""
        condition = next((name for name in _ANY_RESET if name in self._on), None)
        if condition is None:
            return Enough("a per-try timeout is no reason to retry")
        return self._decide(f"per-try timeout ({condition})", rng, room, replayable)

    def wants_response(self, response: Response) -> str | None:
        """Why a response would be tried again, if there is another try to be had; None: it is the answer."""
        on = self._on
        if not on:
            return None
        wanted = self._wants_answer(response)
        if (wanted is not None or "envoy-ratelimited" in on) and response.first(_RATE_LIMITED) is not None:
            # It is another proxy's refusal, not the application's failure.
            return "envoy-ratelimited" if "envoy-ratelimited" in on else None
        return wanted

    def _wants_answer(self, response: Response) -> str | None:
        on, status = self._on, response.status
        if "5xx" in on and 500 <= status <= 599:
            return f"{status} (5xx)"
        if "gateway-error" in on and status in _GATEWAY_ERRORS:
            return f"{status} (gateway-error)"
        if "retriable-4xx" in on and status == 409:
            return f"{status} (retriable-4xx)"
        if "retriable-status-codes" in on and status in self._statuses:
            return f"{status} (retriable-status-codes)"
        grpc = find_status(response)
        if grpc is None:
            return None
        return next((f"gRPC {name}" for name, code in _GRPC_CONDITIONS.items() if name in on and grpc == code), None)

    def _wants_failure(self, kind: FailureKind, request_sent: bool) -> str | None:
        if kind is FailureKind.OVERFLOW:
            return None  # a retry would only add to it
        on = self._on
        if "connect-failure" in on and kind in _NOT_CONNECTED:
            return "connect-failure"
        if "refused-stream" in on and kind is FailureKind.REFUSED_STREAM:
            return "refused-stream"
        if "reset-before-request" in on and not request_sent:
            return "reset-before-request"
        return next((name for name in _ANY_RESET if name in on), None)

    def _decide(self, wanted: str, rng: random.Random, room: Room, replayable: bool) -> Decision:
        if not replayable:
            return Enough(f"{wanted} would be retried, but the request's body is no longer at hand")
        if self._remaining <= 0:
            # Where none were granted no limit was exceeded.
            flag = Flag.UPSTREAM_RETRY_LIMIT_EXCEEDED if self._retries else None
            return Enough(f"{wanted} after {self._retries} retries", flag)
        if not room.has_room:
            self._remaining -= 1
            return Enough(f"{wanted} would be retried, but {room.active_retries} retries are under way", Flag.UPSTREAM_OVERFLOW)
        self._remaining -= 1
        self._retries += 1
        return Again(self._backoff(rng), wanted)

    def _backoff(self, rng: random.Random) -> float:
        """Anything up to the base, then up to twice that, and so on: full jitter, so that retries of many requests do not meet."""
        ceiling = min(self._policy.backoff_base * float(1 << min(self._retries - 1, 30)), self._policy.backoff_max)
        return rng.random() * ceiling


_NEVER: Final = Retry(attempts=0, on=())


@lru_cache(maxsize=64)
def _no_reason(status: int) -> Enough:
    return Enough(f"the response {status} is no reason to retry")


def _max_retries(request: Request) -> int | None:
    value = request.first(b"x-envoy-max-retries")
    return int(value) if value is not None and value.isdigit() and len(value) <= 4 else None
