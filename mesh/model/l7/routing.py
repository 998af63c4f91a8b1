"""What happens to a request or connection that came for one port of a service.

One shape for VirtualService and the Gateway API. Routes stand in the order in which they are tried: for a VirtualService that of its list,
for Gateway API routes that of their precedence (which the control plane has sorted), so that a waypoint needs one rule: the first match.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeAlias

import msgspec

from mesh.model.l7.matching import PathKind, RouteMatch, TextMatch


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The resource that a value was made of, for reasons and logs: ``HTTPRoute shop/reviews``, and which rule of it (from 0)."""

    kind: str
    namespace: str
    name: str
    rule: int | None = None

    def __str__(self) -> str:
        rule = "" if self.rule is None else f" rule {self.rule}"
        return f"{self.kind} {self.namespace}/{self.name}{rule}"


class Destination(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A service by namespace and hostname (``namespace`` empty: no such service is known to the mesh), its service port (0: the one that
    the request came for, of whichever service), and a subset of its endpoints."""

    namespace: str
    hostname: str
    port: int
    subset: str = ""

    def at(self, port: int) -> Destination:
        """Of a request that came for ``port``; most often the same object each time, by which others may remember it."""
        return self if self.port else _at(self, port)


@lru_cache(maxsize=4096)
def _at(destination: Destination, port: int) -> Destination:
    return Destination(destination.namespace, destination.hostname, port, destination.subset)


class HeaderChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """In this order: ``remove``, then ``set`` (replace or add), then ``add`` (append a value). Names in lower case. Values may hold
    Envoy's substitutions (``%REQ(x)%``, ``%DOWNSTREAM_REMOTE_ADDRESS%`` ...; ``%%`` is a percent sign); the control plane checked them."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


class WeightedDestination(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of a route's destinations and its share. ``fails_with``: the destination cannot be used (Gateway API: unknown, not granted, of an
    unknown kind), and its share of requests gets this status; ``because`` says why."""

    destination: Destination
    weight: int = 1
    request: HeaderChanges = HeaderChanges()
    response: HeaderChanges = HeaderChanges()
    authority: str = ""
    """Replaces the authority towards this destination; empty: it stays."""
    fails_with: int | None = None
    because: str = ""


class Rewrite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """At most one of the path's kinds. ``prefix`` replaces what the route's path match matched (a segment prefix as a segment prefix: no
    double slash, no lost one); ``full`` the whole path; ``regex`` every match of a RE2 expression by ``substitution`` with ``\\1``. The
    query stays."""

    prefix: str | None = None
    full: str | None = None
    regex: str | None = None
    substitution: str = ""
    authority: str | None = None


class Forward(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="forward", omit_defaults=True):
    """To one of ``destinations`` by weight. All weights 0 or none at all: ``empty_status``."""

    destinations: tuple[WeightedDestination, ...]
    rewrite: Rewrite | None = None
    empty_status: int = 500


class Redirect(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="redirect", omit_defaults=True):
    """``path`` replaces the whole path, ``prefix`` what the route's path match matched; the query stays. ``port`` None: by ``request_port``
    the service's port (elided where it is the scheme's own, unless the client wrote it), else the scheme's (elided)."""

    status: int = 301
    scheme: str | None = None
    authority: str | None = None
    port: int | None = None
    request_port: bool = False
    path: str | None = None
    prefix: str | None = None


class DirectResponse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="direct", omit_defaults=True):
    """``body`` of at most 1 MiB."""

    status: int
    body: bytes = b""


Action: TypeAlias = Forward | Redirect | DirectResponse


class Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``attempts``: retries, not tries. ``on``: Envoy's names of conditions. Times in seconds; ``per_try_timeout`` None: the route's."""

    attempts: int = 2
    on: tuple[str, ...] = ("connect-failure", "refused-stream", "unavailable", "cancelled")
    statuses: tuple[int, ...] = ()
    per_try_timeout: float | None = None
    backoff_base: float = 0.025
    backoff_max: float = 0.25
    previous_hosts: bool = False
    """Whether an endpoint that was tried may be tried again while others are left."""
    remote_localities: bool = False


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Percentages 0-100, each drawn by itself; ``delay`` in seconds, first. ``grpc_status`` (a number) instead of ``status``."""

    delay: float = 0.0
    delay_percent: float = 0.0
    status: int | None = None
    grpc_status: int | None = None
    abort_percent: float = 0.0


class Mirror(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A copy of the request, whose answer nobody sees."""

    destination: Destination
    percent: float = 100.0


class Cors(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``origins`` that are allowed; ``max_age`` in seconds. ``forward_unmatched``: a preflight of another origin goes to the application
    (VirtualService's default), else it is answered without CORS headers. ``expand_wildcards``: ``*`` among methods or headers echoes
    what was asked when credentials are allowed (Gateway API)."""

    origins: tuple[TextMatch, ...]
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    max_age: int | None = None
    credentials: bool = False
    forward_unmatched: bool = True
    expand_wildcards: bool = False


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``matches``: any of them; none: every request. ``timeout`` in seconds for the whole exchange with all retries; None: none.
    ``name`` is the access log's route name. ``request_authority`` is in the action's rewrite or its destinations. ``created``: when the
    object was made, of routes that are tried in the order of their `precedence`; empty: not known."""

    origin: Origin
    action: Action
    name: str = ""
    matches: tuple[RouteMatch, ...] = ()
    request: HeaderChanges = HeaderChanges()
    response: HeaderChanges = HeaderChanges()
    timeout: float | None = None
    retry: Retry | None = None
    fault: Fault | None = None
    mirrors: tuple[Mirror, ...] = ()
    cors: Cors | None = None
    created: str = ""


_PATH_RANKS: Final = {PathKind.EXACT: 0, PathKind.SEGMENTS: 1, PathKind.REGEX: 2}
_OTHER_PATH: Final = 3

Precedence: TypeAlias = tuple[int, int, bool, int, int, bool, str, str, str, str]


def precedence(route: Route, match: RouteMatch) -> Precedence:
    """Of one match of a Gateway API route; less goes first: the path's kind, its length, a method, more headers, more query parameters, the
    older object, its name. Within an object the first rule and match goes first."""
    path, origin = match.path, route.origin
    return (
        _OTHER_PATH if path is None else _PATH_RANKS.get(path.kind, _OTHER_PATH),
        0 if path is None else -len(path.value),
        match.method is None,
        -len(match.headers),
        -len(match.query),
        route.created == "",
        route.created,
        origin.namespace,
        origin.name,
        origin.kind,
    )


class TcpRoute(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Connections are shared out by weight; all 0 or none: the connection is reset."""

    origin: Origin
    destinations: tuple[WeightedDestination, ...]
