"""The resources of waypoints on the wire: a type URL for each kind, JSON as the Any's value, and names that say whose they are.

They are private to our own programs. Decoding is strict, since a field that is passed over may have been a restriction: what cannot be read
of a policy becomes a policy that denies; everything else that cannot be read is refused, and what was there before goes on being used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

from mesh.model.l7.destination import DestinationConfig
from mesh.model.l7.policy import AuthorizationPolicy, PolicyAction, RequestAuthentication
from mesh.model.l7.routing import Origin
from mesh.model.l7.waypoint import Assigned, L7Resource, RouteTable, ServiceConfig, WaypointSettings
from mesh.xds.encode import Resource, version_of

_PREFIX: Final = "type.googleapis.com/ambient.mesh.v1."
WAYPOINT_SETTINGS: Final = f"{_PREFIX}WaypointSettings"
ROUTE_TABLE: Final = f"{_PREFIX}RouteTable"
SERVICE_CONFIG: Final = f"{_PREFIX}ServiceConfig"
DESTINATION_CONFIG: Final = f"{_PREFIX}DestinationConfig"
AUTHORIZATION_POLICY: Final = f"{_PREFIX}AuthorizationPolicy"
REQUEST_AUTHENTICATION: Final = f"{_PREFIX}RequestAuthentication"

L7_TYPES: Final = (AUTHORIZATION_POLICY, REQUEST_AUTHENTICATION, WAYPOINT_SETTINGS, DESTINATION_CONFIG, ROUTE_TABLE, SERVICE_CONFIG)
"""In the order in which they go out: a service is never served without the policies that came with it, nor named without its routes."""

MAX_BODY: Final = 8 * 1024 * 1024
"""Bytes of one resource. The largest there is holds direct responses of 1 MiB each."""
_SEPARATOR: Final = "|"

_KINDS: Final[Mapping[str, type[L7Resource]]] = {
    WAYPOINT_SETTINGS: WaypointSettings,
    ROUTE_TABLE: RouteTable,
    SERVICE_CONFIG: ServiceConfig,
    DESTINATION_CONFIG: DestinationConfig,
    AUTHORIZATION_POLICY: AuthorizationPolicy,
    REQUEST_AUTHENTICATION: RequestAuthentication,
}
_TYPE_URLS: Final = {kind: url for url, kind in _KINDS.items()}

_T = TypeVar("_T")


class UnreadableL7(ValueError):
    """The bytes are no resource that we can act on; the text says why."""


def type_url_of(resource: L7Resource) -> str:
    return _TYPE_URLS[type(resource)]


def resource_name(assigned: Assigned) -> str:
    """``namespace/gateway|key``: unique within a type, over all waypoints."""
    return f"{assigned.waypoint}{_SEPARATOR}{assigned.resource.key}"


def waypoint_of_name(name: str) -> str:
    """``namespace/gateway`` of a resource's name."""
    return name.partition(_SEPARATOR)[0]


def l7_resource(assigned: Assigned) -> Resource:
    """As it goes out. Only that waypoint gets it."""
    resource = assigned.resource
    # In two steps: the encoder puts keys in order only where all of them are texts, and ports are none. Routes have none to put in order.
    plain = resource if isinstance(resource, RouteTable) else msgspec.to_builtins(resource, str_keys=True, order="deterministic")
    body = msgspec.json.encode(plain)
    return Resource(resource_name(assigned), version_of(body), body, audience=assigned.waypoint)


def decode_l7(type_url: str, name: str, body: bytes) -> Assigned:
    """Read one resource. Raises UnreadableL7, but not for a policy: one that cannot be read is one that denies (``unreadable``)."""
    kind = _KINDS[type_url]
    waypoint, separator, key = name.partition(_SEPARATOR)
    if not (waypoint and separator and key):
        raise UnreadableL7("its name says no waypoint")
    try:
        resource = _decode(kind, body)
        if resource.key != key:
            raise UnreadableL7(f"its name is not that of {resource.key[:253]!r}")
    except UnreadableL7 as exc:
        if kind is AuthorizationPolicy:
            return Assigned(waypoint, AuthorizationPolicy(_origin(key), PolicyAction.DENY, unreadable=str(exc)))
        if kind is RequestAuthentication:
            return Assigned(waypoint, RequestAuthentication(_origin(key), unreadable=str(exc)))
        raise
    return Assigned(waypoint, resource)


def unreadable_reason(resource: L7Resource) -> str:
    """Why a policy denies that could not be read; empty for everything that could."""
    return resource.unreadable if isinstance(resource, AuthorizationPolicy | RequestAuthentication) else ""


def _decode(kind: type[_T], body: bytes) -> _T:
    if len(body) > MAX_BODY:
        raise UnreadableL7(f"{len(body)} bytes, more than the {MAX_BODY} allowed")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise UnreadableL7(str(exc)) from exc


def _origin(key: str) -> Origin:
    """Of a policy of which only the name can be relied on: ``kind/namespace/name``."""
    kind, _, rest = key.partition("/")
    namespace, _, name = rest.partition("/")
    return Origin(kind, namespace, name)
