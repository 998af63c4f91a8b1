"""The resources a waypoint is pushed, one per service, destination, policy and piece of routes: a change is one small message.

Each belongs to a waypoint (its Gateway's namespace and name); the control plane sends a waypoint its own alone.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, TypeAlias

import msgspec

from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, RequestAuthentication
from mesh.model.l7.routing import Route, TcpRoute


class Protocol(Enum):
    HTTP = "http"
    HTTP2 = "http2"
    """HTTP/2 without negotiation (h2c)."""
    GRPC = "grpc"
    TCP = "tcp"
    """Also TLS and everything else whose bytes mean nothing to a waypoint."""
    AUTO = "auto"
    """Not declared: by the client's first bytes."""


class RouteTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Routes in order, told once for all ports that use them. ``key`` is another whenever ``routes`` are, so that a table never changes:
    a port that names other tables has all of the new ones or all of the old ones."""

    key: str
    routes: tuple[Route, ...]


class TableUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The keys of tables that follow each other, and the hosts that they are for, none: all: names or ``*.suffix`` in lower case, compared
    with the request's authority without its port. ``beside``: more such sequences, of which none goes before another: of the first match
    in each the one that has precedence (`mesh.model.l7.routing.precedence`) has the request."""

    tables: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    beside: tuple[tuple[str, ...], ...] = ()


class PortConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One service port. What it takes of HTTP is tried against ``tables`` in order, then against ``routes``, which are the port's own. With
    no resource that routes every request of some host, the last is the default route to the service itself; where one does and nothing
    matches, there is none and the answer is 404. ``tcp``: None for the service itself."""

    port: int
    protocol: Protocol = Protocol.AUTO
    name: str = ""
    tables: tuple[TableUse, ...] = ()
    routes: tuple[Route, ...] = ()
    tcp: TcpRoute | None = None


class ServiceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A service that this waypoint stands before. Its addresses and endpoints come with the workload API."""

    namespace: str
    hostname: str
    ports: tuple[PortConfig, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.hostname}"


class PathNormalization(Enum):
    NONE = "none"
    BASE = "base"
    MERGE_SLASHES = "merge-slashes"
    DECODE_AND_MERGE_SLASHES = "decode-and-merge-slashes"


class Tracing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``percent`` of requests without a decision upstream; ``endpoint``: where spans go by OTLP over HTTP (``http://host:port/v1/traces``)."""

    endpoint: str = ""
    percent: float = 1.0
    tags: tuple[tuple[str, str], ...] = ()


class AccessLogging(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``format``: Envoy's text format, empty: Istio's default; ``json`` instead: keys and operators."""

    enabled: bool = True
    format: str = ""
    as_json: bool = False
    json: tuple[tuple[str, str], ...] = ()


class WaypointSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What holds for the waypoint as a whole. ``trust_domains``: whose certificates may come in, the mesh's own and its aliases."""

    namespace: str
    name: str
    waypoint_for: str = "service"
    trust_domains: tuple[str, ...] = ()
    path_normalization: PathNormalization = PathNormalization.BASE
    include_client_identity: bool = False
    """Overwrite ``x-forwarded-client-cert`` with the caller's identity."""
    access_log: AccessLogging = AccessLogging()
    tracing: Tracing = Tracing()

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


L7Resource: TypeAlias = WaypointSettings | ServiceConfig | RouteTable | DestinationConfig | AuthorizationPolicy | RequestAuthentication


class Assigned(NamedTuple):
    """A resource and the waypoint it is for: ``namespace/name`` of its Gateway. What several waypoints need is there once for each."""

    waypoint: str
    resource: L7Resource
