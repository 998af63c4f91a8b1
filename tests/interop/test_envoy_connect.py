"""What a CONNECT to port 15008 comes to, at a waypoint and at an Envoy whose listeners are those that Istio configures a waypoint with.

Envoy asks its inner listener for each destination, and answers 503 where that has nothing for it, whatever the reason; a waypoint has a
status for each. Who and what is let through, and so reaches the application, is the same but for the rows that say why.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from msgspec.structs import replace

from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.service import Service, ServicePort
from mesh.model.workload import Workload
from mesh.state.store import Delta
from mesh.testing.ca import FakeCa, trusting_context
from mesh.testing.envoy import Config, free_address, hand_in, internal_cluster, running, server_config, with_internal_listeners
from tests.interop.beside_envoy import DEFAULT, TYPE, Application, Http2Case, ask_http2, cluster, manager, request
from tests.unit.waypoint_py.harness import CA, CLIENT, GATEWAY, HOST, VIP, WAYPOINT, Led, World

pytestmark = pytest.mark.interop

VIP6 = SocketAddress(ip_address("fd00::1"), 80)
POD, POD6 = SocketAddress(ip_address("10.1.0.1"), 8080), SocketAddress(ip_address("fd00:1::1"), 8080)
OTHERS = GatewayAddress(NamespacedHostname("shop", "other.shop.svc.cluster.local"))


class Came(NamedTuple):
    """What came of it. ``status``: of the CONNECT, 0: none; ``answer``: of the request within, 0: none."""

    status: int
    answer: int = 0


SERVED = Came(200, 200)
ELSEWHERE = Came(503)
"""Envoy's inner listener has nothing for that destination."""
NOTHING = Came(0)
"""The stream, or the connection, ends without an answer."""


@dataclass(frozen=True)
class Row:
    """A header block as it is, and what comes of it here and there."""

    name: str
    fields: tuple[tuple[str, str], ...]
    ours: Came
    theirs: Came


def to(name: str, authority: str, ours: Came, theirs: Came) -> Row:
    return Row(name, ((":method", "CONNECT"), (":authority", authority)), ours, theirs)


def other(name: str, ours: Came, theirs: Came, *more: tuple[str, str], **pseudo: str) -> Row:
    """Of another shape than a CONNECT has."""
    return Row(name, (*((f":{key}", value) for key, value in pseudo.items()), *more), ours, theirs)


BAD, FORBIDDEN, UNKNOWN, METHOD = Came(400), Came(403), Came(404), Came(405)

ROWS = (
    to("service", str(VIP), SERVED, SERVED),
    to("service by IPv6", str(VIP6), SERVED, SERVED),
    to("port that the service lacks", f"{VIP.ip}:82", UNKNOWN, ELSEWHERE),
    to("service of another waypoint", "10.96.0.2:80", FORBIDDEN, ELSEWHERE),
    to("service without a waypoint", "10.96.0.3:80", FORBIDDEN, ELSEWHERE),
    to("unknown address", "10.96.0.200:80", UNKNOWN, ELSEWHERE),
    to("unknown IPv6 address", "[fd00::200]:80", UNKNOWN, ELSEWHERE),
    to("workload", str(POD), SERVED, SERVED),
    to("workload by IPv6", str(POD6), SERVED, SERVED),
    to("workload of another waypoint", "10.1.0.2:8080", FORBIDDEN, ELSEWHERE),
    to("workload without a waypoint", "10.1.0.3:8080", FORBIDDEN, ELSEWHERE),
    # Istio's Envoys know services by their addresses alone (but for several networks).
    to("hostname", f"{HOST}:80", SERVED, ELSEWHERE),
    to("hostname of another waypoint's", "other.shop.svc.cluster.local:80", FORBIDDEN, ELSEWHERE),
    to("unknown hostname", "nobody.shop.svc.cluster.local:80", UNKNOWN, ELSEWHERE),
    to("loopback", "127.0.0.1:15000", FORBIDDEN, ELSEWHERE),
    to("loopback by IPv6", "[::1]:15000", FORBIDDEN, ELSEWHERE),
    to("metadata of a cloud", "169.254.169.254:80", FORBIDDEN, ELSEWHERE),
    to("anywhere", "0.0.0.0:80", FORBIDDEN, ELSEWHERE),
    # Authorities that are none
    to("port 0", f"{VIP.ip}:0", BAD, ELSEWHERE),
    to("port beyond 65535", f"{VIP.ip}:65536", BAD, ELSEWHERE),
    to("no port", str(VIP.ip), BAD, ELSEWHERE),
    to("user information", f"user@{VIP}", BAD, NOTHING),
    to("path in the authority", f"{VIP}/admin", BAD, NOTHING),
    to("address with a zone", "[fe80::1%eth0]:80", BAD, ELSEWHERE),
    to("octal address", "012.96.0.1:80", BAD, ELSEWHERE),
    to("IPv6 without brackets", "fd00::1:80", BAD, ELSEWHERE),
    # An address is the same however it is written; `_never` judges it after that.
    to("IPv4 in IPv6", f"[::ffff:{VIP.ip}]:80", SERVED, ELSEWHERE),
    to("loopback in IPv6", "[::ffff:127.0.0.1]:15000", FORBIDDEN, ELSEWHERE),
    to("two authorities in one", f"{VIP},10.96.0.2:80", BAD, ELSEWHERE),
    to("NUL in the authority", f"{VIP}\0", BAD, NOTHING),
    to("empty authority", "", BAD, NOTHING),
    # Other shapes
    other("no authority", BAD, NOTHING, method="CONNECT"),
    other("authority twice", BAD, NOTHING, (":authority", "10.96.0.2:80"), method="CONNECT", authority=str(VIP)),
    other("path and scheme", BAD, NOTHING, method="CONNECT", authority=str(VIP), scheme="https", path="/"),
    other("protocol", BAD, UNKNOWN, method="CONNECT", protocol="websocket", authority=str(VIP), scheme="https", path="/"),
    other("header of one hop", BAD, NOTHING, ("connection", "close"), method="CONNECT", authority=str(VIP)),
    *(
        other(f"method {method}", METHOD, UNKNOWN, method=method, authority=str(VIP), scheme="https", path="/")
        for method in ("GET", "POST", "OPTIONS")
    ),
    other("host of another service", SERVED, SERVED, ("host", "other.shop"), method="CONNECT", authority=str(VIP)),
    other("claims", SERVED, SERVED, ("baggage", "k8s.namespace.name=x"), method="CONNECT", authority=str(VIP)),
)  # fmt: skip


def inner_listener(log: Path) -> Config:
    """Chosen by address and port of the destination: what is none of ours has no chain."""

    def chain(name: str, address: SocketAddress, port: int | None) -> Config:
        match: Config = {"prefix_ranges": [{"address_prefix": str(address.ip), "prefix_len": address.ip.max_prefixlen}]}
        if port is not None:
            match["destination_port"] = port
        return {"name": name, "filter_chain_match": match, "filters": [{"name": "hcm", "typed_config": manager(log, [DEFAULT])}]}

    return {
        "name": "inner",
        "internal_listener": {},
        "listener_filters": [
            {"name": "original_dst", "typed_config": {"@type": f"{TYPE}.filters.listener.original_dst.v3.OriginalDst"}}
        ],
        "filter_chains": [
            *(chain(f"service at {each}", each, each.port) for each in (VIP, VIP6)),
            *(chain(f"workload at {each}", each, None) for each in (POD, POD6)),
        ],
    }  # fmt: skip


@contextmanager
def envoy(application: SocketAddress, directory: Path) -> Iterator[SocketAddress]:
    """One that stands where our waypoint does."""
    listen = free_address()
    config = server_config([listen], CA.issue(WAYPOINT), callers="spiffe://cluster.local/")
    (outer,) = config["static_resources"]["listeners"]
    hand_in(outer, "inner", {"envoy.filters.listener.original_dst.local_ip": ("", "%REQ(:AUTHORITY)%")})
    config["static_resources"] = {
        "listeners": [outer, inner_listener(directory / "access.log")],
        "clusters": [internal_cluster("inner", "inner"), cluster("application", application)],
    }
    with running(with_internal_listeners(config), listen):
        yield listen


def describe(world: World, application: SocketAddress) -> None:
    """The mesh of the rows: services and workloads of ours, of another waypoint's, and of none's."""
    world.describe(world.endpoint(application))

    def service(name: str, waypoint: GatewayAddress | None, *addresses: SocketAddress) -> Service:
        at = tuple(NetworkAddress("", each.ip) for each in addresses)
        return Service(name, "shop", f"{name}.shop.svc.cluster.local", at, ports=(ServicePort(80, 8080),), waypoint=waypoint)

    def workload(name: str, waypoint: GatewayAddress | None, *addresses: SocketAddress) -> Workload:
        pod = world.endpoint(application, name)
        return replace(pod, addresses=tuple(each.ip for each in addresses), waypoint=waypoint, services={})

    at = SocketAddress.parse
    world.state.apply(
        Delta(
            services=(
                service("web", GATEWAY, VIP, VIP6),
                service("other", OTHERS, at("10.96.0.2:80")),
                service("free", None, at("10.96.0.3:80")),
            ),
            workloads=(
                workload("pod", GATEWAY, POD, POD6),
                workload("others", OTHERS, at("10.1.0.2:8080")),
                workload("nobodys", None, at("10.1.0.3:8080")),
            ),
        )
    )


async def come(address: SocketAddress, context: ssl.SSLContext, fields: tuple[tuple[str, str], ...]) -> Came:
    """A request, and one more within the tunnel that comes of it."""
    stream = trio.SSLStream(await trio.open_tcp_stream(str(address.ip), address.port), context, https_compatible=True)
    within = request("/", ("Connection", "close"))
    outcome = await ask_http2(stream, Http2Case("", fields, within, stays=True))
    head = re.match(r"HTTP/1.1 (\d{3}) ", outcome.body)
    return Came(outcome.status, int(head[1]) if head else 0)


@dataclass
class Both:
    """A waypoint and an Envoy before one application."""

    world: World
    theirs: SocketAddress
    application: Application

    async def ask(self, context: ssl.SSLContext, fields: tuple[tuple[str, str], ...]) -> tuple[Came, Came]:
        """What comes of it at ours and at theirs. Nothing reaches the application but what it answers."""
        found = []
        for address in (self.world.address, self.theirs):
            self.application.seen.clear()
            came = await come(address, context, fields)
            assert bool(self.application.seen) == (came == SERVED), (fields, came)
            found.append(came)
        ours, theirs = found
        return ours, theirs


def compare(tmp_path: Path, main: Callable[[Both], Awaitable[None]]) -> None:
    application = Application({})
    world = World()
    with closing(application), envoy(application.address, tmp_path) as theirs:

        async def run() -> None:
            describe(world, application.address)
            await main(Both(world, theirs, application))
            application.hang_up()
            await world.until(lambda: not application.open)

        world.run(run)


def test_what_a_tunnel_may_be_asked_for_and_what_is_refused(tmp_path: Path) -> None:
    different: list[str] = []

    async def main(both: Both) -> None:
        both.world.plane.connections = Led(both.world.pool, both.application.address)
        context = trusting_context(CA.issue(CLIENT))
        for row in ROWS:
            found = await both.ask(context, row.fields)
            if found != (row.ours, row.theirs):
                different.append(f"{row.name}: ours {found[0]}, not {row.ours}; theirs {found[1]}, not {row.theirs}")

    compare(tmp_path, main)
    assert not different, "\n".join(different)


SERVED_BOTH, REFUSED_BOTH = (SERVED, SERVED), (NOTHING, NOTHING)
STRANGER_CA = FakeCa()


def old_tls() -> ssl.SSLContext:
    context = trusting_context(CA.issue(CLIENT))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


CALLERS: Mapping[str, tuple[Callable[[], ssl.SSLContext], tuple[Came, Came]]] = {
    "of the mesh": (lambda: trusting_context(CA.issue(CLIENT)), SERVED_BOTH),
    "without ALPN": (lambda: trusting_context(CA.issue(CLIENT), alpn=()), SERVED_BOTH),
    "without a certificate": (lambda: trusting_context(None), REFUSED_BOTH),
    "of another authority": (lambda: trusting_context(STRANGER_CA.issue(CLIENT)), REFUSED_BOTH),
    "of another trust domain": (lambda: trusting_context(CA.issue(SpiffeId("evil.example", "shop", "client"))), REFUSED_BOTH),
    "of a trust domain that begins alike": (
        lambda: trusting_context(CA.issue(SpiffeId("cluster.local.evil.example", "shop", "client"))),
        REFUSED_BOTH,
    ),
    "of yesterday": (lambda: trusting_context(CA.issue(CLIENT, timedelta(hours=-1))), REFUSED_BOTH),
    "without an identity of SPIFFE": (lambda: trusting_context(CA.issue(CLIENT, uris=("https://client.example",))), REFUSED_BOTH),
    # Envoy is content with one name that begins as it should.
    "with two identities": (
        lambda: trusting_context(CA.issue(CLIENT, uris=(str(CLIENT), "spiffe://cluster.local/ns/shop/sa/boss"))),
        (NOTHING, SERVED),
    ),
    "with an identity that is no workload's": (
        lambda: trusting_context(CA.issue(CLIENT, uris=("spiffe://cluster.local/anything",))),
        (NOTHING, SERVED),
    ),
    "by TLS 1.2": (old_tls, REFUSED_BOTH),
    # Envoy goes on by HTTP/2 with who has offered something else.
    "with another protocol's name": (lambda: trusting_context(CA.issue(CLIENT), alpn=("http/1.1",)), (NOTHING, SERVED)),
}  # fmt: skip


def test_who_may_come_in(tmp_path: Path) -> None:
    found: dict[str, tuple[Came, Came]] = {}

    async def main(both: Both) -> None:
        for name, (make_context, _) in CALLERS.items():
            found[name] = await both.ask(make_context(), ((":method", "CONNECT"), (":authority", str(VIP))))

    compare(tmp_path, main)
    assert found == {name: expected for name, (_, expected) in CALLERS.items()}
