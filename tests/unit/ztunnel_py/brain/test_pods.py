"""The executor of the pods' lifecycle, with movers, kernel and cluster played by the test."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing

from mesh.linux.netns import NetnsIdentity
from mesh.model.address import IpAddress, parse_ip
from mesh.model.enrolment import Enrolment
from mesh.telemetry.metrics import Registry, WorkloadManagerMetrics
from mesh.tls.rotation import CertificateManager
from ztunnel_py import messages
from ztunnel_py.brain import pods as module
from ztunnel_py.brain.movers import Holding
from ztunnel_py.brain.pods import PodKeeper
from ztunnel_py.cni.request import PodAdded
from ztunnel_py.config import AgentConfig, read_config
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.lifecycle import LINGER_SECONDS, Phase
from ztunnel_py.redirect.apply import CaptureFailed


def facts(uid: str = "uid-1", *, enrolled: bool = True, name: str = "web", netns: str = "/n/1") -> PodFacts:
    return PodFacts(uid, name, "shop", "web", Enrolment(enrolled, "because"), (parse_ip("10.0.0.1"),), netns)


async def at_once(function: Callable[..., object], *arguments: object) -> object:
    """In the place of a thread, for which a clock that jumps would not wait."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


async def no_certificate(identity: object) -> NoReturn:
    await trio.sleep_forever()


class FakeMover:
    """Serves what it is told to, unless it sulks; reports what the test says."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.told: list[messages.Message] = []
        self.sulks = False
        self.connections: dict[str, int] = {}

    def post(self, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
        if self.world.no_descriptors and descriptors:
            raise OSError(errno.EMFILE, "Too many open files")
        self.told.append(message)
        if self.sulks:
            return
        match message:
            case messages.ServePod():
                self.say(messages.PodServing(message.pod.uid))
            case messages.ReleasePod():
                self.say(messages.PodConnections(message.uid, self.connections.get(message.uid, 0)))

    def say(self, message: messages.FromMover) -> None:
        self.world.nursery.start_soon(self._say, message)

    async def _say(self, message: messages.FromMover) -> None:
        await trio.lowlevel.checkpoint()
        self.world.keeper.mover_said(self, message)

    def now_has(self, uid: str, living: int) -> None:
        self.connections[uid] = living
        self.say(messages.PodConnections(uid, living))


class FakeMovers:
    def __init__(self) -> None:
        self.all: list[FakeMover] = []

    def living(self) -> list[FakeMover]:
        return list(self.all)

    def post(self, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
        for mover in self.all:
            mover.post(message, descriptors)


class FakePlace:
    """A cluster whose pods the test changes; annotations go by name, as in a directory of overlays."""

    def __init__(self) -> None:
        self.send, self._receive = trio.open_memory_channel[Mapping[str, PodFacts]](100)
        self.annotations: dict[str, str] = {}
        self.history: list[str] = []
        self.broken = ""
        self.cannot_withdraw = False
        self.forbids = False
        self.learnt: dict[str, str] = {}
        self.forgotten: list[str] = []
        self.notes: list[str] = []

    async def run(self) -> None:
        await trio.sleep_forever()

    async def watch(self) -> AsyncGenerator[Mapping[str, PodFacts], None]:
        async for found in self._receive:
            yield found

    async def annotate(self, pod: PodFacts, redirection: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.forbids:
            raise PermissionError("can't annotate the pod")
        if self.broken or (self.cannot_withdraw and not redirection):
            raise OSError(errno.ENOSPC, self.broken)
        self.history.append(redirection)
        if redirection:
            self.annotations[pod.name] = redirection
        else:
            self.annotations.pop(pod.name, None)

    async def is_annotated(self, pod: PodFacts) -> bool:
        return pod.name in self.annotations

    def learn(self, uid: str, netns_path: str, ips: tuple[IpAddress, ...]) -> str:
        self.learnt[uid] = netns_path
        return netns_path

    def forget(self, uid: str) -> None:
        self.forgotten.append(uid)

    def note(self, facts: PodFacts, reason: str, message: str, *, warning: bool) -> None:
        self.notes.append(f"{facts.name}: {reason}: {message}")


class World:
    """``kernel`` are the rules in each namespace; every function that touches one is replaced."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
        self.place = FakePlace()
        self.movers = FakeMovers()
        self.movers.all = [FakeMover(self, "0"), FakeMover(self, "1")]
        self.announced: set[str] = set()
        self.kernel: dict[str, str] = {}
        self.opened: dict[int, str] = {}
        self.inodes: dict[str, int] = {}
        self.capture_fails = ""
        self.answers_lookups = True
        self.open_fails: Callable[[PodFacts], NoReturn] | None = None
        self.dns: dict[str, bool] = {}
        """Of which captured pods look-ups are captured too."""
        self.no_descriptors = False
        self.pending: list[str] = []
        self.nursery: trio.Nursery
        monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
        monkeypatch.setattr(module, "open_place", lambda config: self.place)
        monkeypatch.setattr(PodKeeper, "_open_descriptors", lambda keeper, pod: self._open(pod))
        monkeypatch.setattr(module, "_capture", self._capture)
        monkeypatch.setattr(module, "_verify", self._verify)
        monkeypatch.setattr(module, "_begin_release", lambda netns, pod, dns, ipv6: self._set(netns, "releasing"))
        monkeypatch.setattr(module, "_finish_release", lambda netns, pod, dns, ipv6: self._set(netns, ""))
        monkeypatch.setattr(module, "_identity_at", lambda path: NetnsIdentity(self.inodes.get(path, 1), 1))
        monkeypatch.setattr(module, "netns_identity", lambda netns: NetnsIdentity(self.inodes.get(self.opened[netns], 1), 1))
        environ = {"NODE_NAME": "n1", "MESH_SOURCE": str(tmp_path), "MESH_STATUS_DIR": str(tmp_path)}
        config: AgentConfig = read_config(environ | settings)
        self.keeper = PodKeeper(
            config,
            self.movers,
            CertificateManager(no_certificate),
            WorkloadManagerMetrics(Registry()),
            lambda info: info.uid in self.announced,
        )

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.keep)
                await self.keeper.began.wait()
                await test()
                self.nursery.cancel_scope.cancel()

        before = len(os.listdir("/proc/self/fd"))
        try:
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        finally:
            for held in self.keeper._held.values():
                module.close_all(held.descriptors)
        assert len(os.listdir("/proc/self/fd")) <= before

    async def keep(self) -> None:
        self._stopped = trio.Event()
        with trio.CancelScope() as self._in_charge:
            await self.keeper.run(lambda pending: self.pending.__setitem__(slice(None), pending))
        self._stopped.set()

    async def leave_charge(self) -> None:
        self._in_charge.cancel()
        await self._stopped.wait()

    async def has(self, *pods: PodFacts) -> None:
        await self.place.send.send({pod.uid: pod for pod in pods})

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Minutes pass at once."""
        for _ in range(3000):
            if condition():
                return
            await trio.sleep(0.1)
        raise AssertionError(f"never: {what}")

    async def captured(self, *pods: PodFacts) -> None:
        await self.has(*pods)
        await self.until(lambda: all(self.phase(pod.uid) is Phase.CAPTURED for pod in pods), "captured")

    def phase(self, uid: str) -> Phase | None:
        found = self.keeper.statuses().get(uid)
        return found[1].phase if found else None

    def holds(self, uid: str) -> bool:
        return uid in self.keeper._held

    # The kernel

    def _open(self, pod: PodFacts) -> object:
        if self.open_fails is not None:
            self.open_fails(pod)
        descriptors = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(8 if self.answers_lookups else 4))
        self.opened[descriptors[0]] = pod.netns_path
        info = messages.PodInfo(pod.uid, pod.name, pod.namespace, pod.service_account)
        return module._Held(info, descriptors, NetnsIdentity(self.inodes.get(pod.netns_path, 1), 1))

    def _capture(self, netns: int, pod: PodFacts, dns: bool, ipv6: bool) -> None:
        if self.capture_fails:
            raise CaptureFailed(self.capture_fails)
        self.dns[pod.name] = dns
        self._set(netns, "captured")

    def _verify(self, netns: int, pod: PodFacts, dns: bool, ipv6: bool) -> list[str]:
        return [] if self.kernel.get(self.opened[netns]) == "captured" else ["rules are gone"]

    def _set(self, netns: int, rules: str) -> None:
        self.kernel[self.opened[netns]] = rules


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_pod_is_served_then_captured_then_announced(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        assert world.kernel == {"/n/1": "captured"}
        assert world.place.annotations == {"web": "enabled"}
        assert all(isinstance(mover.told[0], messages.ServePod) for mover in world.movers.all)

    world.run(test)


def test_a_mover_that_does_not_serve_keeps_the_pod_out_and_its_descriptors_closed(world: World) -> None:
    async def test() -> None:
        world.movers.all[1].sulks = True
        await world.has(facts())
        await world.until(lambda: world.pending, "it is told")
        assert world.pending == ["shop/web: the movers did not serve the pod within 5 s"]
        assert world.kernel == {}
        await world.until(lambda: not world.holds("uid-1"), "nothing is held")
        assert messages.DropPod("uid-1") in world.movers.all[0].told
        world.movers.all[1].sulks = False
        await world.until(lambda: world.phase("uid-1") is Phase.CAPTURED, "it is captured once the mover serves")
        assert world.pending == []

    world.run(test)


def test_without_descriptors_for_the_movers_nothing_is_left_open(world: World) -> None:
    async def test() -> None:
        world.no_descriptors = True
        await world.has(facts())
        await world.until(lambda: world.pending, "it is told")
        assert "Too many open files" in world.pending[0]
        assert not world.holds("uid-1")
        await world.has(facts(enrolled=False))
        await world.until(lambda: world.phase("uid-1") is None, "there is nothing to undo")

    world.run(test)


def test_a_capture_that_fails_is_told_and_tried_again(world: World) -> None:
    async def test() -> None:
        world.capture_fails = "cannot write the rules: no"
        await world.has(facts())
        await world.until(lambda: world.pending, "it is told")
        assert world.pending == ["shop/web: cannot write the rules: no"]
        await world.until(lambda: world.place.annotations.get("web") == "pending", "the annotation says so too")
        world.capture_fails = ""
        await world.until(lambda: world.phase("uid-1") is Phase.CAPTURED, "it is captured in the end")

    world.run(test)


def test_an_annotation_that_cannot_be_written_holds_up_nothing_else(world: World) -> None:
    async def test() -> None:
        world.place.broken = "No space left on device"
        await world.has(facts())
        await world.until(lambda: world.pending, "it is told")
        assert "No space left on device" in world.pending[0]
        assert world.kernel == {"/n/1": "captured"}
        await world.has()
        await world.until(lambda: not world.holds("uid-1"), "a pod that goes is let go all the same")
        world.place.broken = ""
        await world.until(lambda: world.phase("uid-1") is None, "and forgotten when its annotation could be withdrawn")

    world.run(test)


def test_a_released_pod_is_served_until_peers_are_told_and_a_while_longer(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        world.announced.add("uid-1")
        await world.has(facts(enrolled=False))
        await world.until(lambda: world.phase("uid-1") is Phase.DRAINING, "it drains")
        await trio.sleep(600)
        assert world.holds("uid-1"), "as long as the control plane sends peers here somebody must be here"
        world.announced.clear()
        world.keeper.mesh_changed()
        told = trio.current_time()
        await world.until(lambda: not world.holds("uid-1"), "it is let go")
        assert trio.current_time() - told >= LINGER_SECONDS
        assert world.kernel == {"/n/1": ""}

    world.run(test)


def test_a_released_pod_is_held_for_its_connections_over_all_movers(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        first, second = world.movers.all
        first.connections["uid-1"], second.connections["uid-1"] = 1, 1
        await world.has(facts(enrolled=False))
        await world.until(lambda: world.phase("uid-1") is Phase.DRAINING, "it drains")
        first.now_has("uid-1", 0)
        await trio.sleep(60)
        assert world.holds("uid-1")
        world.movers.all.remove(second)
        world.keeper.mover_left(second)
        await world.until(lambda: not world.holds("uid-1"), "the connections of a dead mover are no more")

    world.run(test)


def test_a_pod_that_is_wanted_again_while_it_drains_keeps_everything(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        world.announced.add("uid-1")
        await world.has(facts(enrolled=False))
        await world.until(lambda: world.phase("uid-1") is Phase.DRAINING, "it drains")
        held = world.keeper._held["uid-1"]
        await world.captured(facts())
        assert world.keeper._held["uid-1"] is held
        assert messages.KeepPod("uid-1") in world.movers.all[0].told
        await trio.sleep(600)
        assert world.phase("uid-1") is Phase.CAPTURED, "the end of the old grace means nothing any more"

    world.run(test)


def test_the_end_of_a_pod_does_not_take_the_annotation_of_its_successor(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        world.place.cannot_withdraw = True
        await world.has(facts("uid-2", netns="/n/2"))
        await world.until(lambda: world.phase("uid-2") is Phase.CAPTURED, "the second one is captured")
        world.place.cannot_withdraw = False
        await world.until(lambda: world.phase("uid-1") is None, "the first one ends")
        assert world.place.history == ["enabled", "enabled"]

    world.run(test)


def test_an_annotation_that_somebody_removed_is_written_again(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        world.place.annotations.clear()
        await world.until(lambda: world.place.annotations == {"web": "enabled"}, "it is there again")

    world.run(test)


def test_rules_that_somebody_removed_are_written_again(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        world.kernel.clear()
        await world.until(lambda: world.kernel == {"/n/1": "captured"}, "they are there again")
        assert world.place.annotations == {"web": "enabled"}

    world.run(test)


def test_a_namespace_replaced_under_its_path_is_captured_anew(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        held = world.keeper._held["uid-1"]
        world.inodes["/n/1"] = 2
        world.kernel.clear()
        await world.until(lambda: world.holds("uid-1") and world.keeper._held["uid-1"] is not held, "it is opened anew")
        await world.until(lambda: world.phase("uid-1") is Phase.CAPTURED, "and captured")
        assert world.kernel == {"/n/1": "captured"}

    world.run(test)


def test_a_mover_that_joins_is_given_every_pod_and_what_drains(world: World) -> None:
    async def test() -> None:
        await world.captured(facts(), facts("uid-2", name="api", netns="/n/2"))
        world.announced.add("uid-2")
        await world.has(facts(), facts("uid-2", enrolled=False, name="api", netns="/n/2"))
        await world.until(lambda: world.phase("uid-2") is Phase.DRAINING, "one drains")
        new = FakeMover(world, "2")
        world.movers.all.append(new)
        world.keeper.mover_joined(new, (), informed=True)
        served = [message.pod.uid for message in new.told if isinstance(message, messages.ServePod)]
        assert sorted(served) == ["uid-1", "uid-2"]
        about = [type(message) for message in new.told if "uid-2" in str(message)]
        assert about[0] is messages.ServePod
        assert about[-1] is messages.ReleasePod, "a pod that is served anew is not released"

    world.run(test)


def test_what_a_mover_brings_along_is_given_to_those_that_joined_before_it(world: World) -> None:
    """Nobody else would tell them: a pod that is held already is not opened."""

    async def test() -> None:
        early, late = world.movers.all
        world.movers.all.remove(late)
        world.keeper.mover_joined(early, (), informed=True)
        world.movers.all.append(late)
        world.keeper.mover_joined(late, (handed(world),), informed=True)
        assert early.told == [messages.ServePod(INFO)]
        assert late.told == []
        await world.captured(facts())
        assert await world.keeper.wait_served()

    world.run(test)


@pytest.mark.parametrize("side", ["brain", "mover"])
def test_a_captured_pod_is_given_again_to_a_mover_for_which_there_were_no_descriptors(world: World, side: str) -> None:
    async def test() -> None:
        await world.captured(facts())
        new = FakeMover(world, "2")
        new.sulks, world.no_descriptors = side == "mover", side == "brain"
        world.movers.all.append(new)
        world.keeper.mover_joined(new, (), informed=True)
        assert not await world.keeper.wait_served()
        new.sulks = world.no_descriptors = False
        await world.until(lambda: new in world.keeper._held["uid-1"].serving, "it serves the pod")

    world.run(test)


def test_a_pod_that_ended_while_it_was_looked_at_is_given_to_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of its descriptors may be those of another pod by then, whose connections would pass for the first one's."""
    looking, looked = trio.Event(), trio.Event()

    async def slow_thread(function: Callable[..., object], *arguments: object) -> object:
        if function is module._identity_at:
            looking.set()
            await looked.wait()
        return await at_once(function, *arguments)

    async def test() -> None:
        await world.captured(facts())
        monkeypatch.setattr(trio.to_thread, "run_sync", slow_thread)
        await looking.wait()
        new = FakeMover(world, "2")
        world.movers.all.append(new)
        await world.has()
        await world.until(lambda: not world.holds("uid-1"), "it is closed")
        looked.set()
        await trio.testing.wait_all_tasks_blocked()
        assert [message for message in new.told if isinstance(message, messages.ServePod)] == []

    world.run(test)


def test_what_a_mover_brings_along_after_a_successor_accepts_is_given_to_nobody(world: World) -> None:
    async def test() -> None:
        early, late = world.movers.all
        world.movers.all.remove(late)
        world.keeper.retire()
        world.movers.all.append(late)
        world.keeper.mover_joined(late, (handed(world),), informed=True)
        assert [*early.told, *late.told] == [messages.StopAccepting(), messages.StopAccepting()]

    world.run(test)


def test_what_a_mover_still_serves_of_a_pod_that_was_dropped_is_dropped_again(world: World) -> None:
    """It was told while its connection to the brain was broken."""

    async def test() -> None:
        await world.captured(facts())
        await world.has()
        await world.until(lambda: world.phase("uid-1") is None, "it is gone")
        mover = world.movers.all[0]
        mover.told.clear()
        descriptors = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(4))
        world.opened[descriptors[0]] = "/n/1"
        world.keeper.mover_joined(mover, (Holding(messages.PodInfo("uid-1", "web", "shop", "web"), descriptors),), informed=True)
        await world.until(lambda: messages.DropPod("uid-1") in mover.told, "it is told again")
        assert not world.holds("uid-1")

    world.run(test)


@pytest.mark.parametrize("inode", [1, 2])
def test_a_pod_is_not_released_in_the_namespace_of_another(world: World, monkeypatch: pytest.MonkeyPatch, inode: int) -> None:
    """Its own is gone, and its path, by the number of a process, is another's."""
    world.inodes["/proc/7/ns/net"] = inode

    def open_netns(path: str) -> int:
        fd = os.open("/dev/null", os.O_RDONLY)
        world.opened[fd] = path
        return fd

    monkeypatch.setattr(module, "open_netns", open_netns)

    async def test() -> None:
        await world.captured(facts())
        await world.has(facts(), replace(facts("uid-2", enrolled=False, name="job", netns="/proc/7/ns/net"), redirection="enabled"))
        await world.until(lambda: "" in world.place.history, "its annotation is withdrawn")
        await world.until(lambda: world.keeper.statuses().keys() == {"uid-1"}, "all is done about it")
        assert world.kernel == {"/n/1": "captured"} | ({} if inode == 1 else {"/proc/7/ns/net": ""})

    world.run(test)


def test_what_a_mover_holds_of_a_namespace_that_was_replaced_it_gives_up_for_the_present_one(world: World) -> None:
    """It was told while its connection to the brain was broken. Counted as serving, it would never accept in the new one."""

    async def test() -> None:
        await world.captured(facts())
        elder = FakeMover(world, "elder")
        mover = FakeMover(world, "2")
        world.movers.all.append(mover)
        for other, join in (
            (mover, lambda mover, holding: world.keeper.mover_joined(mover, holding, informed=True)),
            (elder, world.keeper.elder_joined),
        ):
            descriptors = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(4))
            world.opened[descriptors[0]] = "/n/old"
            world.inodes["/n/old"] = 7
            join(other, (Holding(messages.PodInfo("uid-1", "web", "shop", "web"), descriptors),))
            wanted = [messages.DropPod] if other is elder else [messages.DropPod, messages.ServePod]
            assert [type(message) for message in other.told] == wanted
        assert not world.keeper._held["uid-1"].elders

    world.run(test)


def test_what_movers_serve_before_the_source_was_read_stays_as_it_is(world: World) -> None:
    async def test() -> None:
        mover = world.movers.all[0]
        descriptors = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(4))
        world.opened[descriptors[0]] = "/n/1"
        world.kernel["/n/1"] = "captured"
        world.place.annotations["web"] = "enabled"
        world.keeper.mover_joined(mover, (Holding(messages.PodInfo("uid-1", "web", "shop", "web"), descriptors),), informed=True)
        await trio.sleep(600)
        assert world.kernel == {"/n/1": "captured"}
        assert world.holds("uid-1")
        other = world.movers.all[1]
        world.keeper.mover_joined(other, (), informed=True)
        await world.captured(replace(facts(), redirection="enabled"))
        assert not [message for message in mover.told if isinstance(message, messages.DropPod)]

    world.run(test)


def test_a_mover_that_knows_nothing_of_the_mesh_yet_leaves_pods_to_those_that_do(world: World) -> None:
    async def test() -> None:
        serving, new = world.movers.all
        world.movers.all.remove(new)
        descriptors = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(4))
        world.opened[descriptors[0]] = "/n/1"
        holding = (Holding(messages.PodInfo("uid-1", "web", "shop", "web"), descriptors),)
        world.keeper.mover_joined(serving, holding, informed=False)
        world.movers.all.append(new)
        world.keeper.mover_joined(new, (), informed=False)
        await trio.sleep(60)
        assert new.told == []
        world.keeper.serve_everywhere()
        assert [type(message).__name__ for message in new.told] == ["ServePod"]
        assert serving.told == []

    world.run(test)


def test_a_pod_that_nobody_serves_is_given_to_whoever_comes(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        for mover in list(world.movers.all):
            world.movers.all.remove(mover)
            world.keeper.mover_left(mover)
        new = FakeMover(world, "2")
        world.movers.all.append(new)
        world.keeper.mover_joined(new, (), informed=False)
        assert [type(message).__name__ for message in new.told] == ["ServePod"]

    world.run(test)


@pytest.mark.parametrize(
    ("settings", "held", "expected"),
    [
        ({}, True, {"unset": True, "on": True, "off": False}),
        ({"AMBIENT_DNS_CAPTURE": "false"}, True, {"unset": False, "on": True, "off": False}),
        ({"ISTIO_META_DNS_CAPTURE": "false"}, True, {"unset": False, "on": False, "off": False}),
        # The movers of another configuration hold the pods, without sockets for look-ups: nobody would answer.
        ({}, False, {"unset": False, "on": False, "off": False}),
    ],
)
def test_look_ups_are_captured_where_the_pod_or_else_the_agent_wants_it_and_somebody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str], held: bool, expected: dict[str, bool]
) -> None:
    world = World(tmp_path, monkeypatch, **settings)
    world.answers_lookups = held
    wishes = {"unset": None, "on": True, "off": False}

    async def test() -> None:
        await world.captured(*(replace(facts(name, name=name, netns=f"/n/{name}"), dns=dns) for name, dns in wishes.items()))
        assert world.dns == expected

    world.run(test)


def test_a_pod_that_changes_its_mind_about_look_ups_is_captured_anew(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        assert world.dns == {"web": True}
        await world.has(replace(facts(), dns=False))
        await world.until(lambda: world.dns == {"web": False}, "without look-ups")
        assert world.place.annotations == {"web": "enabled"}

    world.run(test)


# Pods that start


def added(name: str = "web", uid: str = "uid-1", netns: str = "/n/1") -> PodAdded:
    return PodAdded("shop", name, uid, netns, (parse_ip("10.0.0.1"),))


def test_a_pod_that_starts_is_held_until_its_rules_are_proved(world: World) -> None:
    async def test() -> None:
        world.place.broken = "the API server is away"
        world.capture_fails = "no rules"
        answers: list[str] = []

        async def ask() -> None:
            answers.append(await world.keeper.hold(added()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(1)
            await world.has(facts())
            await world.until(lambda: world.phase("uid-1") is Phase.PENDING, "the capture fails")
            assert not answers
            world.capture_fails = ""
        assert answers == ["captured: because"], "although it could not be announced"
        assert world.kernel == {"/n/1": "captured"}
        assert world.place.learnt == {"uid-1": "/n/1"}

    world.run(test)


def test_a_pod_whose_network_was_made_anew_is_held_until_that_one_is_captured(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        answers: list[str] = []

        async def ask() -> None:
            answers.append(await world.keeper.hold(added(netns="/n/2")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await world.until(lambda: world.place.learnt, "the new one is told")
            assert not answers
            await world.has(facts(netns="/n/2"))
        assert world.kernel["/n/2"] == "captured"

    world.run(test)


def test_a_pod_whose_network_was_made_anew_while_no_agent_was_there_is_held_until_that_one_is_captured(world: World) -> None:
    """Movers kept the sockets of the old one, and hand them over."""

    async def test() -> None:
        descriptors = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(4))
        world.opened[descriptors[0]] = "/n/old"
        world.inodes["/n/old"] = 7
        holding = (Holding(messages.PodInfo("uid-1", "web", "shop", "web"), descriptors),)
        for mover in world.movers.all:
            world.keeper.mover_joined(mover, holding, informed=True)
        await world.has(facts())
        assert await world.keeper.hold(added()) == "captured: because"
        assert world.kernel.get("/n/1") == "captured"

    world.run(test)


def test_a_pod_outside_the_mesh_starts_at_once(world: World) -> None:
    async def test() -> None:
        await world.has(facts(enrolled=False))
        assert await world.keeper.hold(added()) == "because"
        assert world.kernel == {}

    world.run(test)


def test_a_pod_that_cannot_be_captured_does_not_start_and_its_owner_is_told(world: World) -> None:
    async def test() -> None:
        world.capture_fails = "no rules"
        await world.has(facts())
        with pytest.raises(module.CannotServe, match="not captured after 20 s: no rules"):
            await world.keeper.hold(added())
        assert "web: NotCaptured: not in the mesh yet, will be tried again: no rules" in world.place.notes
        world.capture_fails = ""
        await world.until(lambda: world.place.notes[-1] == "web: Captured: in the mesh now", "told that all is well")

    world.run(test)


def test_a_pod_nobody_has_heard_of_is_not_decided_on(world: World) -> None:
    async def test() -> None:
        with pytest.raises(module.NotYet, match="has not read"):
            await world.keeper.hold(added())
        await world.has(facts("uid-2"))
        with pytest.raises(module.NotYet, match="has not told"):
            await world.keeper.hold(added())

    world.run(test)


def test_an_agent_that_does_not_capture_yet_says_so_at_once(world: World) -> None:
    async def ask() -> None:
        with pytest.raises(module.NotYet, match="no configuration"):
            await world.keeper.hold(added())

    trio.run(ask)


def test_a_pod_deleted_while_it_is_being_captured_is_given_up(world: World) -> None:
    async def test() -> None:
        world.capture_fails = "no rules"
        await world.has(facts())
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(module.CannotServe, match="deleted meanwhile"):
                    await world.keeper.hold(added())

            nursery.start_soon(ask)
            await world.until(lambda: world.phase("uid-1") is Phase.PENDING, "the capture fails")
            await world.has()
        await world.until(lambda: not world.holds("uid-1"), "let go")

    world.run(test)


def test_two_hundred_pods_that_start_at_once_are_all_let_go_when_captured(world: World) -> None:
    async def test() -> None:
        answers: list[str] = []

        async def ask(number: int) -> None:
            answers.append(await world.keeper.hold(added(f"web-{number}", f"uid-{number}", f"/n/{number}")))

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(ask, number)
            await world.has(*(facts(f"uid-{number}", name=f"web-{number}", netns=f"/n/{number}") for number in range(200)))
        assert len(answers) == 200
        assert set(world.kernel.values()) == {"captured"}

    world.run(test)


def test_a_labelled_pod_on_the_hosts_network_is_reported_once(world: World) -> None:
    async def test() -> None:
        lost = replace(facts("uid-9", enrolled=False, name="exporter"), unsupported="labelled, but on the host's network")
        for _ in range(2):
            await world.has(lost)
        await world.has(lost, facts())
        await world.until(lambda: world.phase("uid-1") is Phase.CAPTURED, "the other is captured")
        assert world.place.notes == ["exporter: NotCaptured: labelled, but on the host's network"]
        assert "uid-9" not in world.keeper.statuses()

    world.run(test)


def test_a_namespace_that_is_gone_is_looked_for_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        def gone(keeper: PodKeeper, pod: PodFacts) -> NoReturn:
            raise FileNotFoundError(errno.ENOENT, "no such file", pod.netns_path)

        with monkeypatch.context() as patched:
            patched.setattr(PodKeeper, "_open_descriptors", gone)
            await world.has(facts())
            await world.until(lambda: world.place.forgotten, "forgotten")
        await world.has(facts(netns="/n/2"))
        await world.until(lambda: world.phase("uid-1") is Phase.CAPTURED, "captured in the new one")
        assert world.kernel == {"/n/2": "captured"}

    world.run(test)


# Two agents of a node, and the end of the mesh


class FakeElder:
    def __init__(self) -> None:
        self.told: list[messages.Message] = []

    def post(self, message: messages.Message) -> None:
        self.told.append(message)


INFO = messages.PodInfo("uid-1", "web", "shop", "web")


def handed(world: World) -> Holding:
    descriptors = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(4))
    world.opened[descriptors[0]] = "/n/1"
    world.kernel["/n/1"] = "captured"
    return Holding(INFO, descriptors)


def test_a_pod_taken_over_is_served_captured_and_held_for_the_elders_connections(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "netns_identity", lambda fd: NetnsIdentity(1, 1))
    elder = FakeElder()

    async def test() -> None:
        world.keeper.elder_joined(elder, [handed(world), handed(world)])
        assert await world.keeper.wait_served()
        await world.captured(facts())
        assert world.place.annotations == {"web": "enabled"}
        await world.has(facts(enrolled=False))
        await world.until(lambda: world.phase("uid-1") is Phase.DRAINING, "it drains")
        assert elder.told == [messages.ReleasePod("uid-1")]
        await trio.sleep(60)
        assert world.holds("uid-1"), "the elder has not said how many it has"
        world.keeper.elder_counted(elder, "uid-1", 1)
        await trio.sleep(60)
        assert world.holds("uid-1")
        world.keeper.elder_counted(elder, "uid-1", 0)
        await world.until(lambda: not world.holds("uid-1"), "it is let go")
        assert elder.told[-1] == messages.DropPod("uid-1")

    world.run(test)


def test_a_pod_is_not_held_for_an_elder_that_died(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "netns_identity", lambda fd: NetnsIdentity(1, 1))
    elder = FakeElder()

    async def test() -> None:
        world.keeper.elder_joined(elder, [handed(world)])
        await world.captured(facts())
        await world.has(facts(enrolled=False))
        await world.until(lambda: world.phase("uid-1") is Phase.DRAINING, "it drains")
        world.keeper.elder_counted(elder, "uid-1", 5)
        world.keeper.elder_left(elder)
        await world.until(lambda: not world.holds("uid-1"), "it is let go")

    world.run(test)


def test_what_an_elder_hands_over_is_all_taken_though_no_descriptors_are_left_for_the_movers(world: World) -> None:
    """Who hands over is told nothing of a failure, and what was taken half would be closed twice."""

    async def test() -> None:
        world.no_descriptors = True
        elder = FakeElder()
        first, second = handed(world), handed(world)
        other = Holding(messages.PodInfo("uid-2", "api", "shop", "api"), second.descriptors)
        world.keeper.elder_joined(elder, [first, other])
        assert world.keeper.holdings() == [first, other]
        world.no_descriptors = False
        world.keeper.serve_everywhere()
        assert await world.keeper.wait_served()

    world.run(test)


def test_an_agent_that_is_not_in_charge_does_nothing_but_what_its_successor_says(world: World) -> None:
    counted: list[tuple[str, int]] = []
    world.keeper.on_count = lambda uid, living: counted.append((uid, living))

    async def test() -> None:
        await world.captured(facts())
        world.keeper.obey(messages.DropPod("uid-1"))
        assert world.holds("uid-1"), "nobody else is in charge"
        await world.leave_charge()
        world.keeper.retire()
        await world.until(lambda: all(mover.told[-1] == messages.StopAccepting() for mover in world.movers.all), "the movers stop")
        first = world.movers.all[0]
        first.connections["uid-1"] = 2
        world.keeper.obey(messages.ReleasePod("uid-1"))
        await world.until(lambda: counted == [("uid-1", 2)], "it counts for its successor")
        first.now_has("uid-1", 0)
        await world.until(lambda: counted[-1] == ("uid-1", 0), "and goes on")
        assert world.kernel == {"/n/1": "captured"}
        assert world.place.history == ["enabled"]
        world.keeper.obey(messages.DropPod("uid-1"))
        assert not world.holds("uid-1")
        assert world.kernel == {"/n/1": "captured"}

    world.run(test)


def test_an_agent_that_is_in_charge_again_accepts_and_looks_at_everything_anew(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        await world.leave_charge()
        world.keeper.retire()
        world.kernel["/n/1"] = "whatever another agent wrote"
        world.place.annotations.clear()
        world.keeper.resume()
        world.nursery.start_soon(world.keep)
        await world.has(facts())
        await world.until(lambda: world.place.annotations == {"web": "enabled"}, "it is announced again")
        assert world.kernel == {"/n/1": "captured"}
        assert all(isinstance(mover.told[-1], messages.ServePod) for mover in world.movers.all)

    world.run(test)


def test_ports_that_another_agent_of_the_node_has_are_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "netns_identity", lambda fd: NetnsIdentity(1, 1))
    elder = FakeElder()

    def in_use(pod: PodFacts) -> NoReturn:
        raise OSError(errno.EADDRINUSE, "listen on port 15001: Address already in use")

    async def find_elders() -> None:
        await trio.lowlevel.checkpoint()
        world.keeper.elder_joined(elder, [handed(world)])

    world.open_fails = in_use
    world.keeper.find_elders = find_elders

    async def test() -> None:
        await world.captured(facts())

    world.run(test)


def test_the_end_of_the_mesh_releases_every_pod_and_ends_when_it_is_done(world: World) -> None:
    async def test() -> None:
        await world.captured(facts(), facts("uid-2", name="db", netns="/n/2"))
        began = trio.current_time()
        await world.keeper.release_all(600, "the DaemonSet is gone")
        assert trio.current_time() - began < 60
        assert world.kernel == {"/n/1": "", "/n/2": ""}
        assert world.place.annotations == {}
        await world.has(facts(), facts("uid-3", name="new", netns="/n/3"))
        await trio.sleep(60)
        assert "/n/3" not in world.kernel, "nobody is captured any more"

    world.run(test)


def test_the_end_of_the_mesh_removes_the_rules_of_pods_whose_connections_do_not_end(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        world.movers.all[0].connections["uid-1"] = 1
        await world.keeper.release_all(20, "the DaemonSet is gone")
        assert world.kernel == {"/n/1": ""}

    world.run(test)


def test_the_end_of_the_mesh_waits_for_no_right_that_is_gone(world: World) -> None:
    async def test() -> None:
        await world.captured(facts())
        world.place.forbids = True
        await world.keeper.release_all(60, "the DaemonSet is gone")
        assert world.kernel == {"/n/1": ""}
        assert not world.holds("uid-1")

    world.run(test)
