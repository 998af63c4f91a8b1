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
from mesh.model.l7.waypoint import Assigned, L7Resource, PortConfig, Protocol, ServiceConfig, WaypointSettings
from mesh.model.service import Service as MeshService
from mesh.rpc import Bidi, Channel, RpcError, Status, open_channel_on, serve_connection
from mesh.state.store import Delta
from mesh.xds.cache import ResourceCache
from mesh.xds.client import AdsClientConfig, AdsState, AdsUpdate, run_ads_client
from mesh.xds.l7 import (
    AUTHORIZATION_POLICY,
    L7_TYPES,
    MAX_BODY,
    REQUEST_AUTHENTICATION,
    SERVICE_CONFIG,
    UnreadableL7,
    decode_l7,
    l7_resource,
    resource_name,
    type_url_of,
)
from mesh.xds.names import ADDRESS, ADS_METHOD, GATEWAY_NAME, node_id, role_of_node_id, waypoint_node_id
from mesh.xds.server import AdsServer, Assign, Introduction, nobody_is_a_waypoint

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
RESOURCES: tuple[L7Resource, ...] = (
    WaypointSettings("shop", "waypoint", trust_domains=("cluster.local", "old.local")),
    SERVICE,
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
        self.rejected: list[str] = []
        self.state: AdsState | None = None
        self._changed = trio.Event()
        self.config = AdsClientConfig(
            plane.connect, dict, waypoint_node_id("10.0.0.9", f"{name}-1", "shop"), {GATEWAY_NAME: name}, types=(*L7_TYPES, ADDRESS)
        )

    async def run(self) -> None:
        await run_ads_client(self.config, self.on_update, self.on_state)

    def on_update(self, update: AdsUpdate) -> None:
        for assigned in update.delta.l7:
            self.held[type_url_of(assigned.resource), resource_name(assigned)] = assigned
        for key in update.delta.removed_l7:
            self.held.pop(key, None)
        self.order.append(update.type_url)
        self.rejected += [bad.reason for bad in update.rejected]
        self._notify()

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
            await client.until(lambda client=client: client.state is not None and client.state.synced)  # type: ignore[misc]
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
