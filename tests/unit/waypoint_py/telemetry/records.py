"""Records as exchanges and connections leave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address

from mesh.http.message import Request, Response
from mesh.model.address import NetworkAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.destination import TrafficPolicy
from mesh.model.l7.routing import Destination
from mesh.model.service import Service
from mesh.model.workload import Locality, Workload
from waypoint_py.context import Connection
from waypoint_py.observer import ConnectionRecord, Local, RequestRecord
from waypoint_py.upstream.session import Endpoint, UpstreamProtocol

MOMENT = 1795921281.810465
"""2026-11-29 03:01:21.810465 UTC."""
HOST = "web.shop.svc.cluster.local"
SERVICE = Service("web", "shop", HOST, (NetworkAddress("", ip_address("10.96.0.1")),))
CALLER = Workload(
    "c//Pod/apps/client-1", "client-1", "apps", (ip_address("10.1.0.3"),), canonical_name="client", canonical_revision="v2",
    workload_name="client", cluster_id="west", locality=Locality("eu", "eu-1"),
)  # fmt: skip
POD = Workload(
    "c//Pod/shop/web-1", "web-1", "shop", (ip_address("10.1.0.2"),), service_account="web", canonical_name="web",
    canonical_revision="v1", workload_name="web",
)  # fmt: skip
LOCAL = Local("waypoint-1", SpiffeId("cluster.local", "shop", "waypoint"))
PATH = b"/a?b=c"
DESTINATION = Destination("shop", HOST, 80)


def connection(**changes: object) -> Connection:
    made = Connection(
        SpiffeId("cluster.local", "apps", "client"),
        SocketAddress(ip_address("10.1.0.3"), 40000),
        SocketAddress(ip_address("10.96.0.1"), 80),
        SERVICE,
        None,
        CALLER,
    )
    return replace(made, **changes)


def endpoint(workload: Workload | None = POD) -> Endpoint:
    return Endpoint(SocketAddress(ip_address("10.1.0.2"), 8080), workload, SERVICE, DESTINATION, TrafficPolicy(), "the only one")


def request_record(
    facts: Connection | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    status: int | None = 200,
    method: bytes = b"GET",
    path: bytes = b"/a?b=c",
) -> RequestRecord:
    """A request that the application answered; ``status`` None: the client went before."""
    said = [(b"user-agent", b"curl/8"), (b"x-request-id", b"id-1"), *headers]
    request = Request(method, b"http", b"web.shop", path, said)
    record = RequestRecord(facts or connection(), LOCAL, MOMENT, 100.0, request)
    record.destination, record.upstream = DESTINATION, endpoint()
    record.upstream_local_address = SocketAddress(ip_address("10.1.0.9"), 50000)
    record.upstream_kind = UpstreamProtocol.HTTP1
    record.attempts = 1
    record.bytes_received, record.bytes_sent = 7, 2000
    record.route = "default"
    record.ended = 100.012
    if status is not None:
        record.response = Response(status, [(b"x-envoy-upstream-service-time", b"3")])
        record.details = "via_upstream"
    return record


def connection_record(facts: Connection | None = None) -> ConnectionRecord:
    """A connection that stands, and has carried something."""
    record = ConnectionRecord(facts or connection(), LOCAL, MOMENT, 100.0)
    record.destination, record.upstream = DESTINATION, endpoint()
    record.upstream_local_address = SocketAddress(ip_address("10.1.0.9"), 50000)
    record.bytes_received, record.bytes_sent = 10, 20
    return record
