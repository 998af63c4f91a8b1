"""Two agents of one node in one process: real sockets and the real lock, pods played by the test."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.tls.rotation import CertificateManager
from ztunnel_py import messages
from ztunnel_py.brain import charge as module
from ztunnel_py.brain.charge import Charge, must_not_yield
from ztunnel_py.brain.movers import Holding
from ztunnel_py.brain.pods import Elder, FromElder
from ztunnel_py.channel import Channel, ChannelClosed, close_all
from ztunnel_py.config import read_config
from ztunnel_py.supervisor import CHARGE

INFO = messages.PodInfo("uid-1", "web", "shop", "web")
CA = FakeCa()
WEB = SpiffeId("cluster.local", "shop", "web")


class FakePods:
    """Holds what it is given; ``history`` is what became of it."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[int, ...]] = {}
        self.elders: list[Elder] = []
        self.history: list[str] = []
        self.obeyed: list[FromElder] = []
        self.counted: list[tuple[str, int]] = []
        self.served = True
        self.on_count: Callable[[str, int], None] = lambda uid, living: None
        self.find_elders: Callable[[], Awaitable[None]]

    def hold(self) -> None:
        self.held[INFO.uid] = tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(4))

    def holdings(self) -> list[Holding]:
        return [Holding(INFO, descriptors) for descriptors in self.held.values()]

    def elder_joined(self, elder: Elder, holding: Sequence[Holding]) -> None:
        self.elders.append(elder)
        for held in holding:
            if held.pod.uid in self.held:
                close_all(held.descriptors)
            self.held.setdefault(held.pod.uid, held.descriptors)

    def elder_counted(self, elder: Elder, uid: str, living: int) -> None:
        self.counted.append((uid, living))

    def elder_left(self, elder: Elder) -> None:
        self.elders.remove(elder)

    async def wait_served(self) -> bool:
        await trio.sleep(0.01)
        return self.served

    def retire(self) -> None:
        self.history.append("retired")

    def resume(self) -> None:
        self.history.append("resumed")

    def obey(self, message: FromElder) -> None:
        self.obeyed.append(message)


class Agent:
    def __init__(self, run_dir: Path, name: str) -> None:
        self.run_dir, self.name = run_dir, name
        self.pods = FakePods()
        self.waits: list[str] = []
        self.acts = 0
        self.acting = False

        async def fetch(identity: SpiffeId) -> object:
            return CA.issue(identity)

        self.certificates = CertificateManager(fetch)
        environment = {"NODE_NAME": "n1", "MESH_SOURCE": str(run_dir), "MESH_STATUS_DIR": str(run_dir)}
        self.config = read_config({**environment, "RUN_DIR": str(run_dir), "POD_NAME": name})
        self.config.own_dir.mkdir(exist_ok=True)
        self.charge = Charge(self.config, self.pods, self.certificates)

    async def _act(self) -> None:
        self.acts += 1
        self.acting = True
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)  # what is under way is finished first
            self.acting = False

    @asynccontextmanager
    async def running(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
        """From the start of its supervisor to the death of all its processes."""
        lock = os.open(self.run_dir / "charge.lock", os.O_RDWR | os.O_CREAT, 0o600)
        monkeypatch.setenv(CHARGE, str(lock))
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.charge.serve)
                nursery.start_soon(self.charge.run, self._act, self.waits.append)
                yield self
                nursery.cancel_scope.cancel()
        finally:
            os.close(lock)
            for descriptors in self.pods.held.values():
                close_all(descriptors)
            self.pods.held.clear()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(module, "YIELD_SECONDS", 0.2)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(20):
            await test()

    before = len(os.listdir("/proc/self/fd"))
    trio.run(bounded)
    assert len(os.listdir("/proc/self/fd")) <= before, "descriptors are left over"


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - two agents that know nothing of the test
        await trio.sleep(0.005)


@pytest.mark.parametrize(("asker", "own", "ending", "yields"), [(2, 1, False, True), (1, 2, False, False), (1, 2, True, True)])
def test_only_a_younger_agent_takes_over_unless_the_one_in_charge_ends(asker: int, own: int, ending: bool, yields: bool) -> None:
    assert (must_not_yield(asker=asker, own=own, ending=ending) is None) is yields


def test_a_younger_agent_takes_over_and_the_older_retires_once_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with Agent(tmp_path, "old").running(monkeypatch) as old:
            await until(lambda: old.acting)
            old.pods.hold()
            old.certificates.request(WEB)
            old.certificates.adopt(CA.issue(WEB))
            new = Agent(tmp_path, "new")
            new.certificates.request(WEB)
            new.pods.served = False
            async with new.running(monkeypatch):
                await until(lambda: new.acting)
                assert not old.acting
                assert set(new.pods.held) == {"uid-1"}
                assert new.certificates.find_bundle(WEB) is not None
                await trio.sleep(0.1)
                assert old.pods.history == ["resumed"], "it accepts until the new one does"
                new.pods.served = True
                await until(lambda: old.pods.history == ["resumed", "retired"])
                await old.charge.wait_handed_over()
                # What the new one says of pods the old one has connections of
                new.pods.elders[0].post(messages.ReleasePod("uid-1"))
                await until(lambda: old.pods.obeyed == [messages.ReleasePod("uid-1")])
                old.pods.on_count("uid-1", 3)
                await until(lambda: new.pods.counted == [("uid-1", 3)])
            await until(lambda: old.acting)
            assert old.pods.history[-1] == "resumed", "the new one has died: nobody is left without"

    run(test)


def test_two_agents_are_never_in_charge_at_once_and_an_older_one_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with Agent(tmp_path, "old").running(monkeypatch) as old:
            await until(lambda: old.acting)
            async with Agent(tmp_path, "new").running(monkeypatch) as new:
                await until(lambda: new.acting)
                for _ in range(50):
                    await trio.sleep(0.01)
                    assert (old.acting, new.acting) == (False, True)
                await until(lambda: "the agent in charge is younger" in old.waits)
                assert (old.charge.has_successor, new.charge.has_successor) == (True, False)
                new.charge.end()
                await until(lambda: old.acting)  # a roll-out that is undone
                assert not new.acting

    run(test)


def test_who_comes_while_nobody_is_left_begins_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with Agent(tmp_path, "old").running(monkeypatch) as old:
            await until(lambda: old.acting)
        async with Agent(tmp_path, "new").running(monkeypatch) as new:  # the dead one's socket is still there
            await until(lambda: new.acting)
            assert new.pods.elders == []

    run(test)


def test_an_agent_comes_back_as_old_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with Agent(tmp_path, "old").running(monkeypatch):
            pass
        async with Agent(tmp_path, "new").running(monkeypatch) as new:
            await until(lambda: new.acting)
            async with Agent(tmp_path, "old").running(monkeypatch) as old:
                await until(lambda: "the agent in charge is younger" in old.waits)
                assert new.acting

    run(test)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 100, b"\x00\x00\x00\x02\x00\x81\xa0"])
def test_who_says_nothing_sensible_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, garbage: bytes) -> None:
    async def test() -> None:
        async with Agent(tmp_path, "old").running(monkeypatch) as old:
            await until(lambda: old.acting)
            sock = trio.socket.socket(trio.socket.AF_UNIX)
            with sock:
                await sock.connect(str(tmp_path / "old/handover.sock"))
                channel: Channel[messages.ToSuccessor] = Channel(sock, messages.ToSuccessor)
                if garbage:
                    await sock.send(garbage)
                else:
                    await channel.send(messages.Serving())
                with pytest.raises(ChannelClosed):
                    await channel.receive()
                channel.close()
            assert old.acting
            assert old.pods.history == ["resumed"]

    run(test)
