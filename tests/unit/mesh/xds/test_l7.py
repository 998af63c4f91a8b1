"""A waypoint's resources on the wire, and that nobody else gets them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.l7.destination import ConnectionPool, ConsistentHash, DestinationConfig, HashSource, LoadBalancer, Subset, TrafficPolicy
from mesh.model.l7.matching import Exact, HeaderMatch, PathKind, PathMatch, RouteMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, JwtRule, PolicyAction, PolicyRule, Predicate, RequestAuthentication
from mesh.model.l7.routing import Destination, DirectResponse, Forward, Origin, Retry, Route, WeightedDestination
from mesh.model.l7.waypoint import Assigned, L7Resource, PortConfig, Protocol, RouteTable, ServiceConfig, WaypointSettings
from mesh.model.service import Service as MeshService
from mesh.rpc import Bidi, Channel, RpcError, Status, open_channel_on, serve_connection
from mesh.state.store import Delta
from mesh.xds.cache import ResourceCache
from mesh.xds.client import AdsClientConfig, AdsState, AdsUpdate, run_ads_client
from mesh.xds.encode import Resource
from mesh.xds.l7 import (
    AUTHORIZATION_POLICY,
    L7_TYPES,
    MAX_BODY,
    REQUEST_AUTHENTICATION,
    ROUTE_TABLE,
    SERVICE_CONFIG,
    UnreadableL7,
    decode_l7,
    l7_resource,
    resource_name,
    type_url_of,
)
from mesh.xds.names import ADDRESS, ADS_METHOD, GATEWAY_NAME, TAKES_PARTS, node_id, role_of_node_id, waypoint_node_id
from mesh.xds.server import AdsServer, Assign, Introduction, Part, nobody_is_a_waypoint, split

ORIGIN = Origin("VirtualService", "shop", "web")
DENY = AuthorizationPolicy(
    Origin("AuthorizationPolicy", "shop", "no-post"),
    PolicyAction.DENY,
    targets=("shop/web.shop.svc",),
    rules=(PolicyRule(operations=((Predicate(Attribute.METHOD, texts=(Exact("POST"),)),),)),),
)
SERVICE = ServiceConfig(
    "shop",
    "web.shop.svc",
    (
        PortConfig(
            80,
            Protocol.HTTP,
            routes=(
                Route(
                    ORIGIN,
                    Forward((WeightedDestination(Destination("shop", "web.shop.svc", 80, "v2"), 90),)),
                    matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, "/a"), headers=(HeaderMatch("x", Exact("y")),)),),
                    retry=Retry(attempts=3),
                    timeout=1.5,
                ),
                Route(ORIGIN, DirectResponse(200, b"\x00\xff")),
            ),
        ),
    ),
)
TABLE = RouteTable("VirtualService/shop/web/0", SERVICE.ports[0].routes)
RESOURCES: tuple[L7Resource, ...] = (
    WaypointSettings("shop", "waypoint", trust_domains=("cluster.local", "old.local")),
    SERVICE,
    TABLE,
    DestinationConfig(
        "shop",
        "web.shop.svc",
        policy=TrafficPolicy(LoadBalancer(hash=ConsistentHash(HashSource())), ConnectionPool(max_pending=1)),
        ports={80: TrafficPolicy()},
        subsets=(Subset("v2", {"version": "v2"}),),
        labels={"c//Pod/shop/web-1": {"version": "v2"}},
    ),
    DENY,
    RequestAuthentication(Origin("RequestAuthentication", "shop", "jwt"), rules=(JwtRule("issuer", jwks='{"keys": []}'),)),
)


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: type(resource).__name__)
def test_what_goes_out_comes_back(resource: L7Resource) -> None:
    sent = l7_resource(Assigned("shop/waypoint", resource))
    assert sent.audience == "shop/waypoint"
    assert decode_l7(type_url_of(resource), sent.name, sent.body) == Assigned("shop/waypoint", resource)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"origin": {"kind": "AuthorizationPolicy", "namespace": "shop", "name": "no-post"}}',
        msgspec.json.encode(DENY).replace(b'"action"', b'"novelty": 1, "action"'),
        msgspec.json.encode(DENY).replace(b"request.method", b"request.novelty"),
        msgspec.json.encode(DENY).replace(b'"texts"', b'"words"'),
        msgspec.json.encode(DENY).replace(b"no-post", b"another"),
        b'{"a":' * 5000,
        b" " * (MAX_BODY + 1),
    ],
    ids=["empty", "cut", "array", "lacks", "unknown-field", "unknown-attribute", "unknown-predicate", "other-name", "deep", "large"],
)
def test_a_policy_that_cannot_be_read_denies_all_of_its_waypoint(body: bytes) -> None:
    name = resource_name(Assigned("shop/waypoint", DENY))
    waypoint, policy = decode_l7(AUTHORIZATION_POLICY, name, body)
    assert isinstance(policy, AuthorizationPolicy)
    assert (waypoint, policy.key, policy.targets, policy.action) == ("shop/waypoint", DENY.key, (), PolicyAction.DENY)
    assert policy.unreadable
    authentication = decode_l7(REQUEST_AUTHENTICATION, "shop/waypoint|RequestAuthentication/shop/jwt", body).resource
    assert isinstance(authentication, RequestAuthentication)
    assert authentication.unreadable
    with pytest.raises(UnreadableL7):
        decode_l7(SERVICE_CONFIG, "shop/waypoint|shop/web.shop.svc", body)


@given(st.binary(max_size=300), st.sampled_from(L7_TYPES), st.text(max_size=20))
def test_no_bytes_raise_anything_else(body: bytes, type_url: str, name: str) -> None:
    try:
        decode_l7(type_url, name, body)
    except UnreadableL7:
        pass


def test_nobody_without_a_name_is_given_a_resource() -> None:
    with pytest.raises(UnreadableL7):
        decode_l7(AUTHORIZATION_POLICY, DENY.key, msgspec.json.encode(DENY))


# Client and server back to back


class _Plane:
    def __init__(self, assign: Assign) -> None:
        self.cache = ResourceCache()
        self.server = AdsServer(self.cache, assign=assign)

    def change(self, delta: Delta) -> None:
        self.server.publish(self.cache.apply(delta))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        near, far = trio.testing.memory_stream_pair()
        handler = self.server.handlers()[ADS_METHOD]
        assert isinstance(handler, Bidi)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_connection, far, {ADS_METHOD: handler})
            try:
                async with open_channel_on(near) as channel:
                    yield channel
            except Exception as exc:  # out of the nursery, which would wrap it
                failure = exc
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


class _Waypoint:
    def __init__(self, plane: _Plane, name: str) -> None:
        self.held: dict[tuple[str, str], Assigned] = {}
        self.order: list[str] = []
        self.updates: list[AdsUpdate] = []
        self.taking: Callable[[], Awaitable[None]] | None = None
        self.rejected: list[str] = []
        self.state: AdsState | None = None
        self._changed = trio.Event()
        self.config = AdsClientConfig(
            plane.connect, dict, waypoint_node_id("10.0.0.9", f"{name}-1", "shop"), {GATEWAY_NAME: name}, types=(*L7_TYPES, ADDRESS)
        )

    async def run(self) -> None:
        await run_ads_client(self.config, self.on_update, self.on_state)

    def on_update(self, update: AdsUpdate) -> Awaitable[None] | None:
        self.updates.append(update)
        for assigned in update.delta.l7:
            self.held[type_url_of(assigned.resource), resource_name(assigned)] = assigned
        for key in update.delta.removed_l7:
            self.held.pop(key, None)
        self.order.append(update.type_url)
        self.rejected += [bad.reason for bad in update.rejected]
        self._notify()
        return self.taking() if self.taking is not None else None

    def on_state(self, state: AdsState) -> None:
        self.state = state
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():
                await self._changed.wait()


def _by_metadata(introduction: Introduction) -> str:
    return f"shop/{introduction.gateway}" if role_of_node_id(introduction.node_id) == "waypoint" else ""


def _run(assign: Assign, main: Callable[[_Plane, trio.Nursery], Awaitable[None]]) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await main(_Plane(assign), nursery)
            nursery.cancel_scope.cancel()

    trio.run(run)


def test_each_waypoint_gets_its_own_and_follows_changes() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(l7=(*(Assigned("shop/one", resource) for resource in RESOURCES), Assigned("shop/two", DENY))))
        one, two = _Waypoint(plane, "one"), _Waypoint(plane, "two")
        nursery.start_soon(one.run)
        nursery.start_soon(two.run)
        await one.until(lambda: one.state is not None and one.state.synced)
        await two.until(lambda: two.state is not None and two.state.synced)
        assert {assigned.resource.key for assigned in one.held.values()} == {resource.key for resource in RESOURCES}
        assert list(two.held.values()) == [Assigned("shop/two", DENY)]
        plane.change(Delta(removed_l7=((AUTHORIZATION_POLICY, resource_name(Assigned("shop/one", DENY))),)))
        await one.until(lambda: len(one.held) == len(RESOURCES) - 1)
        plane.change(Delta(l7=(Assigned("shop/two", SERVICE),)))
        await two.until(lambda: len(two.held) == 2)
        assert Assigned("shop/two", DENY) in two.held.values()
        assert len(one.held) == len(RESOURCES) - 1

    _run(_by_metadata, main)


def test_a_policy_comes_before_the_service_that_it_guards_and_goes_after_it() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        one = _Waypoint(plane, "one")
        nursery.start_soon(one.run)
        await one.until(lambda: one.state is not None and one.state.synced)
        one.order.clear()
        plane.change(Delta(l7=(Assigned("shop/one", SERVICE), Assigned("shop/one", DENY))))
        await one.until(lambda: len(one.held) == 2)
        assert one.order == [AUTHORIZATION_POLICY, SERVICE_CONFIG]
        one.order.clear()
        gone = [Assigned("shop/one", resource) for resource in (DENY, SERVICE)]
        plane.change(Delta(removed_l7=tuple((type_url_of(each.resource), resource_name(each)) for each in gone)))
        await one.until(lambda: not one.held)
        assert one.order == [SERVICE_CONFIG, AUTHORIZATION_POLICY]

    _run(_by_metadata, main)


def test_who_is_no_waypoint_gets_nothing_of_any() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(l7=(Assigned("shop/one", DENY),)))
        liar = _Waypoint(plane, "one")
        nursery.start_soon(liar.run)
        await liar.until(lambda: liar.state is not None and liar.state.synced)
        plane.change(Delta(l7=(Assigned("shop/one", SERVICE),)))
        await trio.testing.wait_all_tasks_blocked()
        assert not liar.held

    _run(nobody_is_a_waypoint, main)


def test_a_client_that_the_control_plane_does_not_know_is_refused() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        waypoint = _Waypoint(plane, "one")
        nursery.start_soon(waypoint.run)
        await waypoint.until(lambda: waypoint.state is not None and "no such gateway" in waypoint.state.reason)

    def refuse(introduction: Introduction) -> str:
        raise RpcError(Status.PERMISSION_DENIED, f"no such gateway: {introduction.gateway}")

    _run(refuse, main)


def test_waypoints_may_be_told_alone_and_waited_for() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        one, other = _Waypoint(plane, "one"), _Waypoint(plane, "two")
        other.config = replace(other.config, node_id=node_id("", "agent", "shop"), types=(ADDRESS,))
        nursery.start_soon(one.run)
        nursery.start_soon(other.run)
        for client in (one, other):
            await client.until(lambda client=client: client.state is not None and client.state.synced)
        other.order.clear()
        changes = plane.cache.apply(Delta(services=(MeshService("web", "shop", "web.shop.svc"),), l7=(Assigned("shop/one", SERVICE),)))
        plane.server.publish(changes, waypoints=True)
        with trio.fail_after(10):
            await plane.server.wait_taken(waypoints=True)
        assert Assigned("shop/one", SERVICE) in one.held.values()
        assert other.order == []
        plane.server.publish(changes, waypoints=False)
        await other.until(lambda: other.order == [ADDRESS])

    _run(_by_metadata, main)


def test_one_that_goes_is_not_waited_for() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        one = _Waypoint(plane, "one")
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await one.run()

        nursery.start_soon(run)
        await one.until(lambda: one.state is not None and one.state.synced)
        plane.server.publish(plane.cache.apply(Delta(l7=(Assigned("shop/one", SERVICE),))))
        scope.cancel()
        with trio.fail_after(10):
            await plane.server.wait_taken(waypoints=True)

    _run(_by_metadata, main)


def test_routes_come_before_the_services_that_name_them_and_go_after() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        one = _Waypoint(plane, "one")
        nursery.start_soon(one.run)
        await one.until(lambda: one.state is not None and one.state.synced)
        one.order.clear()
        plane.change(Delta(l7=(Assigned("shop/one", SERVICE), Assigned("shop/one", TABLE))))
        await one.until(lambda: len(one.held) == 2)
        gone = tuple((type_url_of(each), resource_name(Assigned("shop/one", each))) for each in (TABLE, SERVICE))
        plane.change(Delta(removed_l7=gone))
        await one.until(lambda: not one.held)
        assert one.order == [ROUTE_TABLE, SERVICE_CONFIG, SERVICE_CONFIG, ROUTE_TABLE]

    _run(_by_metadata, main)


def _tables(count: int) -> tuple[RouteTable, ...]:
    """Each of some 700 bytes."""
    return tuple(RouteTable(f"t{number}", (Route(ORIGIN, DirectResponse(200, bytes([number]) * 400)),)) for number in range(count))


@pytest.mark.parametrize("takes_parts", [True, False])
def test_a_large_response_comes_in_parts_for_those_that_know_of_it(takes_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.xds.server.PART_SIZE", 2000)
    monkeypatch.setattr("mesh.xds.client.TAKES_PARTS", TAKES_PARTS if takes_parts else "ANOTHER")
    tables = _tables(10)

    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(l7=tuple(Assigned("shop/one", each) for each in tables)))
        one = _Waypoint(plane, "one")
        one.config = replace(one.config, gather=False)
        nursery.start_soon(one.run)
        await one.until(lambda: one.state is not None and one.state.synced)
        assert {each.resource for each in one.held.values()} == set(tables)
        sizes = [len(update.raw) for update in one.updates if update.type_url == ROUTE_TABLE]
        assert len(sizes) == (5 if takes_parts else 1)
        assert all(size < 2500 for size in sizes) is takes_parts
        # Not before the last part does anybody think that this is all.
        more = [update.more for update in one.updates if update.type_url == ROUTE_TABLE]
        assert more == [True] * (len(sizes) - 1) + [False]
        # A change is of use in pieces: everybody gets those.
        one.updates.clear()
        plane.change(Delta(l7=tuple(Assigned("shop/one", RouteTable(each.key, ())) for each in tables)))
        await one.until(lambda: all(not each.resource.routes for each in one.held.values()))
        monkeypatch.setattr("mesh.xds.server.PART_SIZE", 50)
        plane.change(Delta(removed_l7=tuple((ROUTE_TABLE, resource_name(Assigned("shop/one", each))) for each in tables)))
        await one.until(lambda: not one.held)
        assert [len(update.delta.removed_l7) for update in one.updates] == [0, 4, 4, 2]
        assert any(update.more for update in one.updates) is takes_parts
        await plane.server.wait_taken(waypoints=True)

    _run(_by_metadata, main)


def test_one_part_that_cannot_be_read_is_refused_and_the_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.xds.server.PART_SIZE", 1)

    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        changes = plane.cache.apply(Delta(l7=tuple(Assigned("shop/one", each) for each in _tables(3))))
        assert changes
        held = plane.cache._types[ROUTE_TABLE]
        held["shop/one|t1"] = replace(held["shop/one|t1"], body=b"{")
        one = _Waypoint(plane, "one")
        one.config = replace(one.config, gather=False)
        nursery.start_soon(one.run)
        await one.until(lambda: one.state is not None and one.state.synced)
        assert {each.resource.key for each in one.held.values()} == {"t0", "t2"}
        await plane.server.wait_taken(waypoints=True)
        (status,) = plane.server.connections()
        assert status.types[ROUTE_TABLE].error.startswith("shop/one|t1: ")

    _run(_by_metadata, main)


def test_a_response_is_acknowledged_when_it_is_in_force() -> None:
    async def main(plane: _Plane, nursery: trio.Nursery) -> None:
        one, in_force = _Waypoint(plane, "one"), trio.Event()
        nursery.start_soon(one.run)
        await one.until(lambda: one.state is not None and one.state.synced)
        one.taking = in_force.wait
        plane.change(Delta(l7=(Assigned("shop/one", TABLE),)))
        await one.until(lambda: len(one.held) == 1)
        await trio.testing.wait_all_tasks_blocked()
        (status,) = plane.server.connections()
        assert status.types[ROUTE_TABLE].sent != status.types[ROUTE_TABLE].acked
        in_force.set()
        await plane.server.wait_taken(waypoints=True)

    _run(_by_metadata, main)


@given(st.lists(st.integers(0, 50)), st.lists(st.text("ab", min_size=1, max_size=30)), st.integers(1, 100))
def test_parts_are_bounded_and_are_the_response_together(bodies: list[int], removed: list[str], size: int) -> None:
    resources = [Resource(str(number), "1", bytes(body)) for number, body in enumerate(bodies)]
    parts = list(split(Part(resources, removed), size))
    assert [each for part in parts for each in part.resources] == resources
    assert [name for part in parts for name in part.removed] == removed
    for part in parts:
        sizes = [*(len(each.body) for each in part.resources), *map(len, part.removed)]
        assert len(sizes) < 2 or sum(sizes) <= size or sum(sizes[1:]) == 0
    assert all(part.resources or part.removed for part in parts) or len(parts) == 1
    last = [number for number, part in enumerate(parts) if part.removed]
    assert not last or last == list(range(last[0], len(parts)))
