"""The store of a cluster ends in the server's state, whatever happened on the way, and judges objects as the directory's store does."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import trio
from trio.testing import MockClock

from mesh.kube.api import ApiClient
from mesh.kube.cluster import ClusterStore
from mesh.kube.kinds import KINDS
from mesh.kube.kubeconfig import ClusterAccess
from mesh.kube.resources import RESOURCES
from mesh.testing.kube import FakeApiServer

ACCESS = ClusterAccess("kubernetes", 443, tls=False)


@dataclass(slots=True)
class World:
    server: FakeApiServer
    store: ClusterStore

    def put(self, kind: str, name: str, **fields: Any) -> None:
        metadata = {"name": name, **({"namespace": "shop"} if KINDS[kind].namespaced else {}), **fields.pop("metadata", {})}
        self.server.put({"kind": kind, "apiVersion": RESOURCES[kind].api_version, "metadata": metadata, **fields})

    def names(self, kind: str) -> list[str]:
        return [obj.name for obj in self.store.objects(kind)]

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():  # noqa: ASYNC110  # many things may make it hold, and the clock that jumps makes the pauses free
            await trio.sleep(0.1)


def run(test: Callable[[World], Awaitable[None]], kinds: tuple[str, ...] = tuple(RESOURCES), **selectors: str) -> None:
    async def main() -> None:
        server = FakeApiServer()
        client = ApiClient(ACCESS, connect=server.connect)
        world = World(server, ClusterStore(client, kinds, field_selectors=selectors, rng=random.Random(1)))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(world.store.run)
            with trio.fail_after(10_000):
                await test(world)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


POLICY: dict[str, Any] = {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["a"]}}]}]}


def test_every_kind_that_is_read_is_found_in_the_api() -> None:
    assert RESOURCES.keys() == KINDS.keys()


def test_objects_are_listed_then_followed() -> None:
    async def check(world: World) -> None:
        for index in range(3):
            world.put("AuthorizationPolicy", f"p{index}", spec=POLICY)
        await world.store.wait_synced()
        assert world.names("AuthorizationPolicy") == ["p0", "p1", "p2"]
        before = world.store.find("AuthorizationPolicy", "shop", "p1")
        world.put("AuthorizationPolicy", "p0", spec={**POLICY, "action": "ALLOW"})
        world.server.remove("AuthorizationPolicy", "shop", "p2")
        world.put("Namespace", "shop", metadata={"labels": {"a": "b"}})
        await world.wait_until(lambda: world.names("AuthorizationPolicy") == ["p0", "p1"] and bool(world.names("Namespace")))
        assert world.store.find("AuthorizationPolicy", "shop", "p0").spec["action"] == "ALLOW"
        assert world.store.find("AuthorizationPolicy", "shop", "p1") is before

    run(check)


def test_a_change_of_what_nobody_reads_is_no_change() -> None:
    async def check(world: World) -> None:
        world.put("Node", "n1", metadata={"labels": {"zone": "a"}}, status={"heartbeat": 1})
        await world.store.wait_synced()
        before = world.store.find("Node", "", "n1")
        world.put("Node", "n1", metadata={"labels": {"zone": "a"}}, status={"heartbeat": 2})
        world.put("Node", "n2")
        await world.wait_until(lambda: len(world.names("Node")) == 2)
        assert world.store.find("Node", "", "n1") is before

    run(check)


def test_watchers_are_told_what_changed() -> None:
    async def check(world: World) -> None:
        world.put("Namespace", "a")
        await world.store.wait_synced()
        async with aclosing(world.store.watch()) as changes:
            assert {str(key) for key in (await anext(changes)).changed} == {"Namespace a"}
            world.server.remove("Namespace", "", "a")
            assert {str(key) for key in (await anext(changes)).changed} == {"Namespace a"}

    run(check)


def test_an_object_that_goes_bad_keeps_its_last_good_version_and_is_named() -> None:
    async def check(world: World) -> None:
        world.put("AuthorizationPolicy", "foo", spec=POLICY)
        world.put("AuthorizationPolicy", "new", spec={"rules": [{"form": []}]})
        world.put("Service", "svc", spec={"ports": "none"})
        await world.store.wait_synced()
        good = world.store.find("AuthorizationPolicy", "shop", "foo")
        world.put("AuthorizationPolicy", "foo", spec={"action": "DENY", "rules": [{"form": []}]})
        await world.wait_until(lambda: len({problem.file for problem in world.store.problems}) == 3)
        assert world.store.find("AuthorizationPolicy", "shop", "foo") is good
        assert world.store.find("AuthorizationPolicy", "shop", "new").problems  # enforced closed
        assert world.store.find("Service", "shop", "svc") is None
        texts = [str(problem) for problem in world.store.problems]
        assert any(text.startswith("AuthorizationPolicy shop/foo: spec.rules[0]") for text in texts), texts
        world.put("AuthorizationPolicy", "foo", spec=POLICY)
        world.server.remove("AuthorizationPolicy", "shop", "new")
        world.server.remove("Service", "shop", "svc")
        await world.wait_until(lambda: not world.store.problems)

    run(check)


def test_what_was_deleted_while_the_history_expired_is_found_out() -> None:
    async def check(world: World) -> None:
        for name in ("a", "b"):
            world.put("Namespace", name)
        await world.store.wait_synced()
        world.server.faults.down = True
        world.server.cut_watches()
        world.server.remove("Namespace", "", "a")
        world.put("Namespace", "c")
        world.server.compact()
        await trio.sleep(120)
        assert world.names("Namespace") == ["a", "b"]
        assert any("can't be reached" in problem.message for problem in world.store.problems)
        world.server.faults.down = False
        await world.wait_until(lambda: world.names("Namespace") == ["b", "c"])
        assert not world.store.problems

    run(check, ("Namespace",))


def test_a_watch_that_falls_silent_is_begun_anew() -> None:
    async def check(world: World) -> None:
        world.server.faults.stalled = True
        await world.store.wait_synced()
        world.put("Namespace", "a")
        await trio.sleep(60)
        assert world.names("Namespace") == []
        world.server.faults.stalled = False
        await world.wait_until(lambda: world.names("Namespace") == ["a"])

    run(check, ("Namespace",))


def test_bookmarks_move_a_quiet_watch_past_an_expiring_history() -> None:
    async def check(world: World) -> None:
        await world.store.wait_synced()
        for index in range(5):
            world.put("Node", f"n{index}")
            await trio.sleep(1)
        lists = len([seen for seen in world.server.requests if seen.path.endswith("namespaces") and "watch" not in seen.query])
        world.server.compact()
        world.server.cut_watches()
        world.put("Namespace", "a")
        await world.wait_until(lambda: world.names("Namespace") == ["a"])
        assert lists == len([seen for seen in world.server.requests if seen.path.endswith("namespaces") and "watch" not in seen.query])

    run(check, ("Namespace", "Node"))


def test_an_api_group_may_come_later() -> None:
    async def check(world: World) -> None:
        world.server.faults.absent_groups = {"security.istio.io"}
        world.put("AuthorizationPolicy", "p", spec=POLICY)
        await world.store.wait_synced()
        assert world.names("AuthorizationPolicy") == []
        assert not world.store.problems
        world.server.faults.absent_groups = set()
        await world.wait_until(lambda: world.names("AuthorizationPolicy") == ["p"])

    run(check)


def test_an_older_version_is_read_where_the_newest_is_not_served_and_left_when_that_comes() -> None:
    route: dict[str, Any] = {"rules": [{"backendRefs": [{"name": "a", "port": 80}]}]}

    async def check(world: World) -> None:
        newest = RESOURCES["TLSRoute"]
        assert newest.older == ("v1alpha3", "v1alpha2")
        world.server.served = [newest.at("v1alpha2")]
        world.put("TLSRoute", "r", spec=route)
        await world.store.wait_synced()
        assert (world.names("TLSRoute"), world.store.problems) == (["r"], ())
        world.server.served = [newest]
        world.server.cut_watches()
        world.put("TLSRoute", "s", spec=route)
        await world.wait_until(lambda: world.names("TLSRoute") == ["r", "s"])
        paths = {seen.path for seen in world.server.requests}
        assert paths == {resource.collection() for resource in (newest, newest.at("v1alpha3"), newest.at("v1alpha2"))}
        assert not world.store.problems

    run(check, ("TLSRoute",))


def test_where_no_version_is_served_there_is_nothing_and_later_there_may_be() -> None:
    async def check(world: World) -> None:
        served, world.server.served = world.server.served, []
        await world.store.wait_synced()
        assert (world.names("TLSRoute"), world.store.problems) == ([], ())
        started = trio.current_time()
        await trio.sleep(600)
        # Not asked without pause, however many versions there are.
        assert len(world.server.requests) < 3 * (trio.current_time() - started) / 5
        world.server.served = served
        world.put("TLSRoute", "r", spec={"rules": [{"backendRefs": [{"name": "a", "port": 80}]}]})
        await world.wait_until(lambda: world.names("TLSRoute") == ["r"])

    run(check, ("TLSRoute",))


def test_a_route_that_goes_bad_keeps_its_last_good_version_and_one_that_never_was_good_is_handed_on_to_say_so() -> None:
    bad = {"rules": [{"backendRefs": [{"name": "a"}]}]}

    async def check(world: World) -> None:
        world.put("HTTPRoute", "old", spec={"rules": [{"backendRefs": [{"name": "a", "port": 80}]}]})
        world.put("HTTPRoute", "new", spec=bad)
        await world.store.wait_synced()
        good = world.store.find("HTTPRoute", "shop", "old")
        world.put("HTTPRoute", "old", spec=bad)
        await world.wait_until(lambda: len(world.store.problems) == 2)
        assert world.store.find("HTTPRoute", "shop", "old") is good
        assert [problem.field for problem in world.store.problems] == ["spec.rules[0].backendRefs[0]"] * 2
        assert world.store.find("HTTPRoute", "shop", "new").problems

    run(check, ("HTTPRoute",))


def test_a_group_that_is_missing_for_a_moment_takes_no_policy_away() -> None:
    async def check(world: World) -> None:
        world.put("AuthorizationPolicy", "p", spec=POLICY)
        await world.store.wait_synced()
        world.server.faults.refusals = [(404, "NotFound", {})] * 2
        world.server.cut_watches()
        await trio.sleep(60)
        assert world.names("AuthorizationPolicy") == ["p"]
        world.server.faults.absent_groups = {"security.istio.io"}
        world.server.cut_watches()
        await world.wait_until(lambda: world.names("AuthorizationPolicy") == [])

    run(check, ("AuthorizationPolicy",))


def test_without_the_right_to_list_the_store_is_not_in_step_and_says_so() -> None:
    async def check(world: World) -> None:
        world.server.accepted_tokens = set()
        await trio.sleep(60)
        assert world.store.unsynced == ["Namespace"]
        assert "namespaces: Unauthorized" in str(world.store.problems[0])
        world.server.accepted_tokens = None
        await world.store.wait_synced()

    run(check, ("Namespace",))


def test_only_the_pods_of_a_node_are_asked_for() -> None:
    async def check(world: World) -> None:
        spec: dict[str, Any] = {"containers": [{"name": "c", "image": "i"}]}
        for name, node in (("a", "n1"), ("b", "n2")):
            world.put("Pod", name, spec={**spec, "nodeName": node})
        await world.store.wait_synced()
        assert world.names("Pod") == ["a"]

    run(check, ("Pod",), Pod="spec.nodeName=n1")


def test_one_thing_that_is_wrong_is_told_once_however_connections_break() -> None:
    async def check(world: World) -> None:
        await world.store.wait_synced()
        told: list[str] = []
        world.server.faults.cuts += [1, 40, 0, 30, 1, 17]
        world.server.cut_watches()
        async with aclosing(world.store.watch()) as changes, trio.open_nursery() as nursery:

            async def listen() -> None:
                async for change in changes:
                    if change.problems_changed:
                        told.append("; ".join(problem.message for problem in world.store.problems))

            nursery.start_soon(listen)
            await world.wait_until(lambda: not world.server.faults.cuts and told[-1:] == [""])
            nursery.cancel_scope.cancel()
        assert len(told) == 2, told
        assert told[0].startswith("namespaces: ")

    run(check, ("Namespace",))
