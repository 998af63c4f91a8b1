"""The ADS client and server back to back."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec import structs

from mesh.model.address import NetworkAddress
from mesh.model.policy import Action, Policy, Rule, Scope
from mesh.model.service import Service
from mesh.model.workload import PortMapping, Workload
from mesh.rpc import Bidi, Call, Channel, RpcError, ServerStream, Status, open_channel_on, serve, serve_connection
from mesh.rpc.client import CLIENT_LIMITS
from mesh.rpc.tls import client_tls, server_tls
from mesh.state.store import Delta, MeshState
from mesh.testing.serving import write_serving_certificate
from mesh.xds import server as module
from mesh.xds.cache import ResourceCache
from mesh.xds.client import TIDY_AFTER, AdsClientConfig, AdsState, AdsUpdate, Phase, Tidying, bearer_metadata, connect_tls, run_ads_client
from mesh.xds.decode import decode_response
from mesh.xds.encode import Resource, workload_resource
from mesh.xds.names import ADDRESS, ADS_METHOD, AUTHORIZATION, node_id
from mesh.xds.proto import discovery_pb2 as discovery
from mesh.xds.server import AdsServer

PATIENCE = 20.0
CONFIRM_EVERY = 0.01


def _workload(name: str, ip: str = "10.0.0.1", **changes: object) -> Workload:
    return structs.replace(Workload(f"c//Pod/ns/{name}", name, "ns", addresses=(ip_address(ip),)), **changes)


SERVICE = Service("web", "ns", "web.ns.svc", addresses=(NetworkAddress("", ip_address("10.96.0.1")),))


def _policy(name: str) -> Policy:
    return Policy(name, "ns", Scope.WORKLOAD_SELECTOR, Action.DENY, (Rule(),))


class _ControlPlane:
    """A cache and the server on it, reachable over memory streams; may be stopped and started."""

    def __init__(self) -> None:
        self.cache = ResourceCache()
        self.running = True
        self.requests: list[discovery.DeltaDiscoveryRequest] = []
        self.authenticate: Callable[[Call], Awaitable[object]] | None = None
        self.confirm: Callable[[Call], Awaitable[object]] = self._check
        self._scopes: list[trio.CancelScope] = []
        self.restart()

    def restart(self) -> None:
        """A new process with the same objects: every connection ends."""
        for scope in self._scopes:
            scope.cancel()
        self.server = AdsServer(self.cache, authenticate=self._check, confirm=self._confirm, confirm_every=CONFIRM_EVERY)

    async def _confirm(self, call: Call) -> object:
        return await self.confirm(call)

    async def _check(self, call: Call) -> object:
        return await self.authenticate(call) if self.authenticate is not None else "anyone"

    def change(self, delta: Delta) -> None:
        self.server.publish(self.cache.apply(delta))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        if not self.running:
            raise RpcError(Status.UNAVAILABLE, "not running")
        near, far = trio.testing.memory_stream_pair()
        server, scope = self.server, trio.CancelScope()
        self._scopes.append(scope)

        async def serve_one() -> None:
            with scope:
                handler = server.handlers()[ADS_METHOD]
                assert isinstance(handler, Bidi)

                async def record(stream: ServerStream) -> None:
                    receive = stream.receive

                    async def receive_recorded() -> bytes | None:
                        if (raw := await receive()) is not None:
                            self.requests.append(discovery.DeltaDiscoveryRequest.FromString(raw))
                        return raw

                    stream.receive = receive_recorded  # an ear on the wire
                    await handler.handle(stream)

                await serve_connection(far, {ADS_METHOD: Bidi(record, max_message=handler.max_message)})

        async with _channel_to(near, serve_one) as channel:
            yield channel


@asynccontextmanager
async def _channel_to(near: trio.abc.Stream, serve_other: Callable[[], Awaitable[None]]) -> AsyncIterator[Channel]:
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_other)
        try:
            async with open_channel_on(near) as channel:
                yield channel
        except Exception as exc:  # out of the nursery, which would wrap it
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Agent:
    """A client and the state it builds; conditions are waited for, never slept for."""

    def __init__(self) -> None:
        self.state = MeshState()
        self.updates: list[AdsUpdate] = []
        self.states: list[AdsState] = []
        self._changed = trio.Event()

    def on_update(self, update: AdsUpdate) -> None:
        self.state.apply(update.delta)
        self.updates.append(update)
        self.notify()

    def on_state(self, state: AdsState) -> None:
        self.states.append(state)
        self.notify()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    @property
    def synced(self) -> bool:
        return bool(self.states) and self.states[-1].synced and self.states[-1].phase is Phase.CONNECTED

    def has(self, workload: Workload) -> bool:
        return self.state.find_workload(workload.uid) == workload

    def names(self) -> set[str]:
        return {workload.name for workload in self.state.workloads()}

    def policies(self) -> set[str]:
        return {policy.key for policy in self.state.policies()}

    def notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _config(plane: _ControlPlane, **changes: object) -> AdsClientConfig:
    config = AdsClientConfig(plane.connect, dict, node_id("10.0.0.9", "agent", "istio-system"), {"NODE_NAME": "n1"})
    return replace(config, **changes)


def _run(main: Callable[[_ControlPlane, _Agent, trio.Nursery], Awaitable[None]]) -> None:
    async def run() -> None:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                await main(_ControlPlane(), _Agent(), nursery)
                nursery.cancel_scope.cancel()

    trio.run(run)


def _start(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery, **changes: object) -> None:
    nursery.start_soon(lambda: run_ads_client(_config(plane, **changes), agent.on_update, agent.on_state))


def test_an_empty_mesh_answers_every_type() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        assert [update.type_url for update in agent.updates] == [ADDRESS, AUTHORIZATION]
        assert all(update.whole for update in agent.updates)
        assert [str(state) for state in agent.states] == ["connecting", "connected", "synced, connected"]

    _run(main)


def test_changes_and_removals_arrive_and_nothing_else_does() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(workloads=(_workload("a"), _workload("b")), services=(SERVICE,), policies=(_policy("p"),)))
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        assert agent.names() == {"a", "b"}
        assert agent.policies() == {"ns/p"}
        agent.updates.clear()
        plane.change(Delta(workloads=(_workload("a", "10.0.0.5"), _workload("b")), removed_policies=("ns/p",)))
        plane.change(Delta(removed_addresses=("ns/web.ns.svc",)))
        await agent.until(lambda: not agent.policies() and not list(agent.state.services()))
        sent = [discovery.DeltaDiscoveryResponse.FromString(update.raw) for update in agent.updates]
        assert [each.name for response in sent for each in response.resources] == ["c//Pod/ns/a"]
        assert not any(update.whole for update in agent.updates)

    _run(main)


@pytest.mark.parametrize("part_size", [module.PART_SIZE, 1], ids=["whole", "in parts"])
def test_what_goes_to_many_is_encoded_once(monkeypatch: pytest.MonkeyPatch, part_size: int) -> None:
    monkeypatch.setattr(module, "PART_SIZE", part_size)
    encoded: list[str] = []
    real = module._message

    def count(type_url: str, resource: Resource, with_aliases: bool) -> discovery.Resource:
        encoded.append(resource.name)
        return real(type_url, resource, with_aliases)

    monkeypatch.setattr(module, "_message", count)

    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(workloads=(_workload("a"), _workload("b"))))
        agents = [agent, _Agent(), _Agent()]
        for each in agents:
            _start(plane, each, nursery)
        for each in agents:
            await each.until(partial(getattr, each, "synced"))
        assert sorted(encoded) == ["c//Pod/ns/a", "c//Pod/ns/b"]
        for address in ("10.0.0.5", "10.0.0.6"):
            encoded.clear()
            changed = _workload("a", address)
            plane.change(Delta(workloads=(changed,)))
            for each in agents:
                await each.until(partial(each.has, changed))
            assert encoded == ["c//Pod/ns/a"]
        plane.change(Delta(removed_addresses=("c//Pod/ns/b",)))
        for each in agents:
            await each.until(partial(lambda each: each.names() == {"a"}, each))
        nonces = [discovery.DeltaDiscoveryResponse.FromString(update.raw).nonce for each in agents for update in each.updates]
        assert len(set(nonces)) == len(nonces) >= 15

    _run(main)


def test_a_new_policy_comes_before_the_workload_that_names_it_and_goes_after() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(workloads=(_workload("a"),)))
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        agent.updates.clear()
        plane.change(Delta(workloads=(_workload("a", authorization_policies=("ns/p",)),), policies=(_policy("p"),)))
        await agent.until(lambda: len(agent.updates) == 2)
        plane.change(Delta(workloads=(_workload("a"),), removed_policies=("ns/p",)))
        await agent.until(lambda: len(agent.updates) == 4)
        assert [update.type_url for update in agent.updates] == [AUTHORIZATION, ADDRESS, ADDRESS, AUTHORIZATION]

    _run(main)


def test_every_response_is_acknowledged_and_the_server_knows() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        while any(each.sent != each.acked for status in plane.server.connections() for each in status.types.values()):
            await trio.testing.wait_all_tasks_blocked()
        (status,) = plane.server.connections()
        assert status.node_id == "ztunnel~10.0.0.9~agent.istio-system~istio-system.svc.cluster.local"
        assert set(status.types) == {ADDRESS, AUTHORIZATION}
        assert plane.requests[0].node.metadata["NODE_NAME"] == "n1"
        assert not plane.requests[1].HasField("node")

    _run(main)


class _BadCache(ResourceCache):
    """Serves one workload that no client can take."""

    def all(self, type_url: str) -> list[Resource]:
        bad = [Resource("bad", "1", b"\xff\xff")] if type_url == ADDRESS else []
        return [*super().all(type_url), *bad]


def test_a_bad_resource_is_refused_and_the_rest_is_kept() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        plane.cache = _BadCache()
        plane.cache.apply(Delta(workloads=(_workload("good"),)))
        plane.restart()
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        assert agent.names() == {"good"}
        assert [bad.name for bad in agent.updates[0].rejected] == ["bad"]
        while not any(status.types[ADDRESS].error for status in plane.server.connections()):
            await trio.testing.wait_all_tasks_blocked()
        (status,) = plane.server.connections()
        assert status.types[ADDRESS].error.startswith("bad: not an Address")
        plane.change(Delta(workloads=(_workload("later"),)))
        await agent.until(lambda: "later" in agent.names())

    _run(main)


def test_a_restarted_server_is_told_what_is_held_and_sends_the_difference() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(workloads=(_workload("a"), _workload("b"), _workload("c")), policies=(_policy("p"), _policy("q"))))
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        agent.updates.clear()
        plane.requests.clear()
        plane.running = False
        plane.restart()
        await agent.until(lambda: agent.states[-1].phase is Phase.FAILED)
        assert agent.states[-1].synced
        plane.change(
            Delta(workloads=(_workload("b", "10.0.0.7"), _workload("d")), removed_addresses=("c//Pod/ns/c",), removed_policies=("ns/q",))
        )
        plane.running = True
        await agent.until(lambda: len(agent.updates) == 2)
        claimed = dict(plane.requests[0].initial_resource_versions)
        assert set(claimed) == {"c//Pod/ns/a", "c//Pod/ns/b", "c//Pod/ns/c"}
        assert all(claimed.values())
        addresses, policies = (discovery.DeltaDiscoveryResponse.FromString(update.raw) for update in agent.updates)
        assert {each.name for each in addresses.resources} == {"c//Pod/ns/b", "c//Pod/ns/d"}
        assert list(addresses.removed_resources) == ["c//Pod/ns/c"]
        assert (list(policies.resources), list(policies.removed_resources)) == ([], ["ns/q"])
        assert agent.names() == {"a", "b", "d"}
        assert agent.policies() == {"ns/p"}

    _run(main)


def test_a_set_that_comes_in_parts_is_given_on_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.xds.server.PART_SIZE", 1)

    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        workloads = tuple(_workload(f"w{number}") for number in range(5))
        plane.cache.apply(Delta(workloads=workloads, policies=(_policy("p"),)))
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        assert [(update.type_url, update.whole, update.more) for update in agent.updates] == [
            (ADDRESS, True, False),
            (AUTHORIZATION, True, False),
        ]
        whole = agent.updates[0]
        assert whole.delta.workloads == workloads
        # What is handed on says the same.
        assert decode_response(whole.raw).delta == whole.delta
        assert not decode_response(whole.raw).more
        await plane.server.wait_taken(waypoints=False)
        acknowledged = [request.response_nonce for request in plane.requests if request.type_url == ADDRESS and request.response_nonce]
        assert len(acknowledged) == 5
        plane.change(Delta(workloads=(_workload("w1", "10.0.0.7"), _workload("w2", "10.0.0.8"))))
        await agent.until(lambda: len(agent.updates) == 4)
        assert not any(update.whole for update in agent.updates[2:])

    _run(main)


def test_only_what_comes_before_anything_is_served_is_kept_from_the_search_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later time it would keep garbage of connections from it too."""
    frozen: list[None] = []
    monkeypatch.setattr("mesh.xds.client.DECODE_IN_THREAD", 0)
    monkeypatch.setattr("mesh.xds.client.gc.freeze", lambda: frozen.append(None))

    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        plane.cache.apply(Delta(workloads=(_workload("a"),), policies=(_policy("p"),)))
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        assert len(frozen) == 2
        plane.change(Delta(workloads=(_workload("b"),)))
        await agent.until(lambda: agent.names() == {"a", "b"})
        assert len(frozen) == 2

    _run(main)


def test_memory_is_given_back_once_after_all_parts_of_a_large_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[float] = []
    monkeypatch.setattr("mesh.xds.client.return_free_memory", lambda: given_back.append(0))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            tidying = Tidying(nursery)
            for _ in range(100):
                tidying.soon()
                await trio.sleep(TIDY_AFTER / 2)
            assert not given_back, "more may come"
        assert len(given_back) == 1
        async with trio.open_nursery() as nursery:
            Tidying(nursery).soon()
        assert len(given_back) == 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_part_that_comes_just_when_memory_is_to_be_given_back_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    given_back: list[float] = []
    monkeypatch.setattr("mesh.xds.client.return_free_memory", lambda: given_back.append(clock.current_time()))

    async def main() -> None:
        for _ in range(30):  # which of the two that wake at once is first is left to chance
            async with trio.open_nursery() as nursery:
                began, tidying = trio.current_time(), Tidying(nursery)
                tidying.soon()
                await trio.sleep(TIDY_AFTER)
                tidying.soon()
            assert given_back[-1] == began + 2 * TIDY_AFTER

    trio.run(main, clock=clock)


class _Script:
    """Connections to a server that says what is written, whatever it hears, and hangs up after all but the last."""

    def __init__(self, *connections: list[bytes]) -> None:
        self._connections = list(connections)
        self.opened: list[discovery.DeltaDiscoveryRequest] = []

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[_Script]:
        yield self

    @asynccontextmanager
    async def stream(self, method: str, metadata: Mapping[str, str]) -> AsyncIterator[_Script]:
        self._lines = self._connections.pop(0)
        self._heard = 0
        yield self

    async def send(self, raw: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if not self._heard:
            self.opened.append(discovery.DeltaDiscoveryRequest.FromString(raw))
        self._heard += 1

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        if not self._lines and not self._connections:
            await trio.sleep_forever()
        return self._lines.pop(0) if self._lines else None


def _part(*names: str, more: bool) -> bytes:
    response = discovery.DeltaDiscoveryResponse(type_url=ADDRESS, nonce="n.0", more=more)
    for name in names:
        made = workload_resource(_workload(name))
        response.resources.add(name=made.name, version=made.version, resource={"type_url": ADDRESS, "value": made.body})
    return response.SerializeToString()


def test_a_set_of_which_the_stream_lost_the_end_is_asked_for_again_and_nobody_has_seen_half_of_it() -> None:
    script = _Script([_part("a", more=True), _part("b", more=True)], [_part("a", more=True), _part("c", more=False)])

    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        config = replace(_config(plane), connect=script.connect, types=(ADDRESS,))  # as much of a channel as is used
        nursery.start_soon(lambda: run_ads_client(config, agent.on_update, agent.on_state))
        await agent.until(lambda: agent.synced)
        assert agent.names() == {"a", "c"}
        assert len(agent.updates) == 1
        assert [dict(request.initial_resource_versions) for request in script.opened] == [{}, {}]

    _run(main)


def test_what_is_gathered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    part = _part("a", more=True)
    monkeypatch.setattr("mesh.xds.client.CLIENT_LIMITS", replace(CLIENT_LIMITS, max_message=3 * len(part)))
    script = _Script([part] * 100, [])

    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        config = replace(_config(plane), connect=script.connect, types=(ADDRESS,))  # as much of a channel as is used
        nursery.start_soon(lambda: run_ads_client(config, agent.on_update, agent.on_state))
        await agent.until(lambda: len(script.opened) == 2)
        failed = [state.reason for state in agent.states if state.phase is Phase.FAILED]
        assert failed == [f"a set of more than {3 * len(part)} bytes"]
        assert not agent.updates

    _run(main)


def test_on_demand_brings_what_is_asked_for_its_pods_and_what_runs_here() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        served = {SERVICE.key: (PortMapping(80, 80),)}
        plane.cache.apply(
            Delta(workloads=(_workload("local", node="n1"), _workload("pod", "10.0.0.2", services=served), _workload("other", "10.0.0.3")))
        )
        plane.change(Delta(services=(SERVICE,)))
        send, receive = trio.open_memory_channel[tuple[str, ...]](10)
        nursery.start_soon(lambda: run_ads_client(_config(plane, on_demand=True), agent.on_update, agent.on_state, demand=receive))
        await agent.until(lambda: agent.synced and "local" in agent.names())
        await send.send(("/10.96.0.1",))
        await agent.until(lambda: agent.names() == {"local", "pod"})
        assert agent.state.find_service(SERVICE.key) is not None
        plane.change(Delta(workloads=(_workload("pod2", "10.0.0.4", services=served), _workload("other", "10.0.0.30"))))
        await agent.until(lambda: agent.names() == {"local", "pod", "pod2"})
        await send.send(("/10.0.0.99",))  # nobody's, yet: the answer says so
        await agent.until(lambda: "/10.0.0.99" in agent.updates[-1].delta.removed_addresses)
        plane.change(Delta(workloads=(_workload("late", "10.0.0.99"),)))
        await agent.until(lambda: "late" in agent.names())
        plane.change(Delta(removed_addresses=("c//Pod/ns/late", "c//Pod/ns/other")))
        await agent.until(lambda: "late" not in agent.names())
        assert agent.updates[-1].delta.removed_addresses == ("c//Pod/ns/late",)

    _run(main)


def test_a_caller_that_cannot_be_authenticated_is_refused_and_tries_again() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        async def check(call: Call) -> object:
            if call.metadata.get("authorization") != "Bearer good":
                raise RpcError(Status.UNAUTHENTICATED, "request authenticate failure")
            return "agent"

        tokens = ["bad", "good"]
        plane.authenticate = check
        _start(plane, agent, nursery, metadata=lambda: {"authorization": f"Bearer {tokens.pop(0)}"})
        await agent.until(lambda: agent.synced)
        failed = [state for state in agent.states if state.phase is Phase.FAILED]
        assert [state.reason for state in failed] == ["UNAUTHENTICATED: request authenticate failure"]
        assert [status.caller for status in plane.server.connections()] == ["agent"]

    _run(main)


def test_a_caller_that_is_no_longer_who_it_was_loses_its_stream_and_one_that_cannot_be_judged_keeps_it() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        answers: list[Exception | None] = [None, RpcError(Status.UNAVAILABLE, "nobody can say"), None]
        asked = 0

        async def confirm(call: Call) -> object:
            nonlocal asked
            asked += 1
            agent.notify()
            answer = answers[min(asked, len(answers)) - 1]
            await trio.lowlevel.checkpoint()
            if answer is not None:
                raise answer
            return "agent"

        plane.confirm = confirm
        _start(plane, agent, nursery)
        await agent.until(lambda: agent.synced)
        await agent.until(lambda: asked >= len(answers) + 2)
        assert not [state for state in agent.states if state.phase is Phase.FAILED]
        answers.append(RpcError(Status.UNAUTHENTICATED, "revoked"))
        await agent.until(lambda: any(state.phase is Phase.FAILED for state in agent.states))
        assert next(state.reason for state in agent.states if state.phase is Phase.FAILED) == "UNAUTHENTICATED: revoked"

    _run(main)


def test_a_node_that_does_not_say_who_it_is_is_refused() -> None:
    async def main(plane: _ControlPlane, agent: _Agent, nursery: trio.Nursery) -> None:
        _start(plane, agent, nursery, node_id="nobody")
        await agent.until(lambda: bool(agent.states) and agent.states[-1].phase is Phase.FAILED)
        assert "invalid node id 'nobody'" in agent.states[-1].reason

    _run(main)


def test_attempts_are_spaced_out_to_fifteen_seconds_whatever_fails() -> None:
    agent_states: list[AdsState] = []
    reasons = iter(["rpc", "token", "end"] * 100)

    @asynccontextmanager
    async def refuse() -> AsyncIterator[Channel]:
        raise RpcError(Status.UNAVAILABLE, "refused")
        yield

    def metadata() -> dict[str, str]:
        if next(reasons) == "token":
            raise FileNotFoundError("no token")
        return {}

    async def main() -> None:
        config = AdsClientConfig(refuse, metadata, node_id("", "a", "b"))
        with trio.move_on_after(300):
            await run_ads_client(config, lambda update: None, agent_states.append, rng=random.Random(1))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    pauses = [state.retry_in for state in agent_states if state.phase is Phase.FAILED]
    assert pauses[0] == pytest.approx(0.010, rel=0.21)
    assert all(later == pytest.approx(earlier * 2, rel=0.6) for earlier, later in itertools.pairwise(pauses[:9]))
    assert all(10 < pause <= 15 for pause in pauses[12:])
    assert 20 < len(pauses) < 40


def test_a_server_that_hangs_up_at_once_every_time_is_no_hot_loop() -> None:
    attempts = 0

    @asynccontextmanager
    async def connect() -> AsyncIterator[Channel]:
        nonlocal attempts
        attempts += 1
        near, far = trio.testing.memory_stream_pair()

        async def hang_up(stream: ServerStream) -> None:
            await stream.send(discovery.DeltaDiscoveryResponse(type_url=ADDRESS, nonce="1").SerializeToString())

        async with _channel_to(near, lambda: serve_connection(far, {ADS_METHOD: Bidi(hang_up)})) as channel:
            yield channel

    async def main() -> None:
        config = AdsClientConfig(connect, dict, node_id("", "a", "b"))
        with trio.move_on_after(120):
            await run_ads_client(config, lambda update: None)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert 10 < attempts < 30


def test_over_tls_with_a_token_that_is_read_anew(tmp_path: Path) -> None:
    certificate = write_serving_certificate(tmp_path, "istiod.istio-system.svc")
    token = tmp_path / "token"
    token.write_text("first\n")
    seen: list[str] = []

    async def authenticate(call: Call) -> object:
        seen.append(call.metadata["authorization"])
        assert call.metadata["clusterid"] == "Kubernetes"
        return "agent"

    async def main() -> None:
        cache, agent = ResourceCache(), _Agent()
        cache.apply(Delta(workloads=tuple(_workload(f"w{number}", f"10.1.{number // 250}.{number % 250}") for number in range(3000))))
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        context = server_tls(certificate.chain, certificate.key)
        config = AdsClientConfig(
            connect_tls("127.0.0.1", port, lambda: client_tls(certificate.root_pem), server_hostname="istiod.istio-system.svc"),
            bearer_metadata(token, cluster_id="Kubernetes"),
            node_id("10.0.0.9", "agent", "istio-system"),
        )
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                server = trio.CancelScope()

                async def run_server() -> None:
                    with server:
                        await serve(listeners, AdsServer(cache, authenticate=authenticate).handlers(), tls=lambda: context)

                nursery.start_soon(run_server)
                nursery.start_soon(run_ads_client, config, agent.on_update, agent.on_state)
                await agent.until(lambda: agent.synced)
                assert len(agent.names()) == 3000
                token.write_text("second")
                server.cancel()
                await agent.until(lambda: agent.states[-1].phase is Phase.FAILED)
                server = trio.CancelScope()
                nursery.start_soon(run_server)
                await agent.until(lambda: agent.synced)
                nursery.cancel_scope.cancel()
        for listener in listeners:
            await listener.aclose()
        assert seen == ["Bearer first", "Bearer second"]

    trio.run(main)


def test_an_empty_token_file_is_a_failed_attempt_and_not_an_empty_header(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        bearer_metadata(tmp_path / "token", cluster_id="c")()
