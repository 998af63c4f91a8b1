"""A whole agent replaced under load: rolled out, killed at any moment, and taken down for good."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.model.address import SocketAddress
from mesh.testing.lab import Lab, running_lab, wait_until
from mesh.testing.netns import Netns, echoes

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="entering a lab's namespaces from outside needs root")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
SHOP = {"shop/client", "shop/stranger", "shop/server", "shop/database"}
NODE = "n2"
"""The node whose agents are replaced; the server is there."""
HELD, BEAT = 50, 0.05


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("handover")) as lab:
        lab.label("shop", "istio.io/dataplane-mode=ambient")
        yield lab


@pytest.fixture
def client(lab: Lab) -> Iterator[Netns]:
    wait_until(lambda: health(lab) == "ready", "the lab's own agent is well", 90)
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "every pod of the shop is captured", 90)
    with lab.inside("shop/client") as place:
        yield place


@pytest.fixture
def echo(lab: Lab) -> SocketAddress:
    return SocketAddress.parse(f"{lab.pod('shop/server')['ips'][0]}:7000")


def health(lab: Lab) -> str:
    return next(str(node["agent"]) for node in lab.status()["nodes"] if node["name"] == NODE)


# --- more agents than one on a node


def own(lab: Lab, *part: str) -> list[int]:
    """Processes of the agent that the lab itself runs on the node."""
    return [pid for pid in lab.agent(NODE, *part) if b"\0POD_NAME=" not in Path(f"/proc/{pid}/environ").read_bytes()]


class Agent:
    """Another agent of the node, as the pod of a roll-out would have it: its own name and pages, the same run directory."""

    def __init__(self, lab: Lab, number: int, drain: float) -> None:
        (first,) = wait_until(lambda: own(lab), "the lab's own agent runs")
        environment = dict(line.split("=", 1) for line in Path(f"/proc/{first}/environ").read_text().split("\0") if "=" in line)
        base = 20_000 + 100 * number
        self.name = f"ztunnel-{number}"
        self._lab, self._readiness = lab, base + 21
        environment |= {
            "POD_NAME": self.name,
            "ADMIN_ADDR": f"localhost:{base}",
            "STATS_ADDR": f"[::]:{base + 20}",
            "READINESS_ADDR": f"[::]:{base + 21}",
            "CONNECTION_TERMINATION_DEADLINE": f"{drain:g}s",
            "SPARE_MOVER": "false",
        }
        command = Path(f"/proc/{first}/cmdline").read_text().split("\0")[:-1]
        self.log = lab.home / "logs" / f"{self.name}.log"
        with self.log.open("ab") as log:
            # The lab's mounts show the pods' namespaces; its PID namespace ends with it, whatever becomes of the test.
            entering = ["nsenter", f"--target={first}", "--mount", "--net", "--pid", "--uts", "--"]
            self.process = subprocess.Popen([*entering, *command], env=environment, stdout=log, stderr=log, start_new_session=True)

    @property
    def ready(self) -> bool:
        done = self._lab.run(NODE, "curl", "-sf", f"localhost:{self._readiness}/healthz/ready")
        return done.returncode == 0

    def processes(self) -> list[int]:
        """This machine's ids: the supervisor's, the brain's, the movers'."""
        found: list[int] = []
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                try:
                    ours = f"POD_NAME={self.name}\0".encode() in (process / "environ").read_bytes()
                    if ours and b"ztunnel_py\0" in (process / "cmdline").read_bytes():
                        found.append(int(process.name))
                except OSError:
                    continue
        return [pid for pid in found if pid != self.process.pid]

    def supervisor(self) -> int:
        return next(pid for pid in self.processes() if b"\0proxy\0" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def kill(self) -> tuple[float, float]:
        when = kill(*self.processes())
        self.process.wait(30)
        return when

    def end(self) -> None:
        """As the kubelet does, within the agent's own time."""
        if self.process.poll() is None:
            kill(self.supervisor(), number=signal.SIGTERM)


def answers_at_the_socket(lab: Lab) -> bool:
    path = lab.home / "run" / NODE / "admin.sock"
    done = subprocess.run(["curl", "-sf", "-o", "/dev/null", "--unix-socket", path, "http://agent/debug/status"], check=False)
    return done.returncode == 0


@contextmanager
def agent(lab: Lab, number: int, drain: float = 60.0) -> Iterator[Agent]:
    running = Agent(lab, number, drain)
    try:
        yield running
    finally:
        running.kill()


def kill(*pids: int, number: int = signal.SIGKILL) -> tuple[float, float]:
    """The times before and after; after SIGKILL that is when the last one was gone, which on a busy machine comes later."""
    before = time.monotonic()
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    if number == signal.SIGKILL:
        wait_until(lambda: not any(map(lives, pids)), "the killed are dead")
    return before, time.monotonic()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- load


class Load:
    """`HELD` connections with a number to and fro, and a new connection every `BEAT` seconds."""

    def __init__(self, client: Netns, echo: SocketAddress, held: int = HELD) -> None:
        self._client, self._echo = client, echo
        self._held = [client.connect(echo) for _ in range(held)]
        self._over = threading.Event()
        self.lost: list[str] = []
        self.refused: list[tuple[float, float, str]] = []
        """When the connection was begun and when it ended, and how."""
        self.served = 0
        self.slowest = 0.0
        self._threads = [threading.Thread(target=body) for body in (self._hold, self._come)]
        for thread in self._threads:
            thread.start()

    def _hold(self) -> None:
        number = 0
        while not self._over.wait(BEAT):
            number += 1
            for sock in list(self._held):
                try:
                    sock.sendall(b"%08d" % number)
                    assert _read(sock, 8) == b"%08d" % number
                except (OSError, EOFError) as exc:
                    self.lost.append(repr(exc))
                    self._held.remove(sock)

    def _come(self) -> None:
        def one() -> None:
            began = time.monotonic()
            try:
                with self._client.connect(self._echo) as sock:
                    sock.sendall(b"new")
                    _read(sock, 3)
                self.served += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
            except (OSError, EOFError) as exc:
                self.refused.append((began, time.monotonic(), repr(exc)))

        threads: list[threading.Thread] = []
        while not self._over.wait(BEAT):
            threads.append(threading.Thread(target=one))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def goes_on(self) -> None:
        """Until some new connections, begun after now, have been served."""
        enough = self.served + len(self.refused) + 20
        wait_until(lambda: self.served + len(self.refused) >= enough, "connections come")

    def refused_but(self, *kills: tuple[float, float]) -> list[tuple[float, float, str]]:
        """New connections that were refused, but for those that began before a kill and ended with it: what a mover has accepted when it
        dies is lost with it, as what it holds."""
        return [one for one in self.refused if not any(one[0] <= after and one[1] >= before for before, after in kills)]

    def close_held(self) -> None:
        for sock in self._held:
            sock.close()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self.close_held()
        print(f"held {HELD}, lost {len(self.lost)}; new {self.served}, refused {len(self.refused)}, slowest {self.slowest:.2f} s")


def _read(sock: object, size: int) -> bytes:
    got = b""
    while len(got) < size:
        more = sock.recv(size - len(got))
        if not more:
            raise EOFError("closed by the peer")
        got += more
    return got


@contextmanager
def load(client: Netns, echo: SocketAddress, held: int = HELD) -> Iterator[Load]:
    running = Load(client, echo, held)
    try:
        running.goes_on()
        yield running
    finally:
        running.stop()


# --- roll-out


def test_a_roll_out_refuses_nothing_and_ends_the_old_agent_with_its_last_connection(lab: Lab, client: Netns, echo: SocketAddress) -> None:
    with agent(lab, 1) as old:
        wait_until(lambda: old.ready, "it has taken over from the lab's own", 90)
        with load(client, echo) as traffic, agent(lab, 2) as new:
            wait_until(lambda: new.ready, "the next has taken over", 90)
            traffic.goes_on()
            old.end()
            wait_until(lambda: "draining" in old.log.read_text(), "the old one drains")
            traffic.goes_on()
            assert traffic.lost == []
            assert old.process.poll() is None, "it still has connections"
            new_log = new.log.read_text().count('direction="inbound"')
            traffic.goes_on()
            assert new.log.read_text().count('direction="inbound"') > new_log, "new connections are the new one's"
            with load(client, echo, held=0) as rest:
                traffic.stop()
                assert wait_until(lambda: old.process.poll() is not None, "it ends with its last connection")
                rest.goes_on()
                assert rest.refused == []
            assert old.process.wait() == 0
            assert traffic.refused == []
            assert not (lab.home / "run" / NODE / old.name).exists()
    assert lab.pods_in_mesh() == SHOP


def test_a_new_agent_killed_at_any_moment_of_the_hand_over_costs_nothing_of_the_old_one(
    lab: Lab, client: Netns, echo: SocketAddress
) -> None:
    rng, kills = random.Random(5), list[tuple[float, float]]()
    with agent(lab, 3) as old:
        wait_until(lambda: old.ready, "it has taken over from the lab's own", 90)
        with load(client, echo) as traffic:
            for number in range(5):
                with agent(lab, 4 + number) as new:
                    if number:  # the first one dies on its own, in the midst of starting
                        wait_until(lambda new=new: "taken_over" in new.log.read_text(), "it takes over", 90)
                    time.sleep(rng.uniform(0.0, 0.3))
                    kills.append(new.kill())
                traffic.goes_on()
            wait_until(lambda: old.ready, "the old one is in charge again")
            wait_until(lambda: answers_at_the_socket(lab), "it answers where the youngest had put its own socket")
            traffic.goes_on()
            assert (traffic.lost, traffic.refused_but(*kills)) == ([], [])
    assert lab.pods_in_mesh() == SHOP


def test_an_old_agent_killed_after_the_hand_over_costs_its_own_connections_only(lab: Lab, client: Netns, echo: SocketAddress) -> None:
    with agent(lab, 10) as old:
        wait_until(lambda: old.ready, "it has taken over from the lab's own", 90)
        with load(client, echo) as traffic, agent(lab, 11) as new:
            wait_until(lambda: new.ready, "the next has taken over", 90)
            traffic.goes_on()
            old.kill()
            traffic.goes_on()
            wait_until(lambda: len(traffic.lost) == HELD, "what the old one held ends")
            assert traffic.refused == []
            # A pod that is un-labelled now must not be held for the dead.
            traffic.stop()
            lab.label("shop", "istio.io/dataplane-mode-")
            try:
                wait_until(lambda: not lab.pods_not_outside(), "the pods leave", 60)
                assert echoes(client.connect(echo))
            finally:
                lab.label("shop", "istio.io/dataplane-mode=ambient")
            wait_until(lambda: lab.pods_in_mesh() == SHOP, "the pods are back", 60)
            assert new.ready


def test_an_agent_that_is_never_ready_takes_nothing_over(lab: Lab, client: Netns, echo: SocketAddress) -> None:
    with agent(lab, 12) as old:
        wait_until(lambda: old.ready, "it has taken over from the lab's own", 90)
        lab.meshctl("lab", "kill", "--name", lab.name, "istiod", "--signal", "STOP")
        try:
            with load(client, echo) as traffic, agent(lab, 13) as new:
                wait_until(lambda: "mover.joined" in new.log.read_text(), "it runs, and knows nothing of the mesh", 90)
                traffic.goes_on()
                assert not new.ready
                assert old.ready
                assert (traffic.lost, traffic.refused) == ([], [])
        finally:
            lab.meshctl("lab", "kill", "--name", lab.name, "istiod", "--signal", "CONT")


# --- SIGKILL of all


def test_a_whole_agent_killed_refuses_nothing_while_it_is_away(lab: Lab, client: Netns, echo: SocketAddress) -> None:
    kills: list[tuple[float, float]] = []
    with load(client, echo) as traffic:
        for _ in range(3):
            wait_until(lambda: health(lab) == "ready", "the agent is there", 60)
            whole = [*own(lab), *own(lab, "brain"), *own(lab, "mover", "0")]
            assert len(whole) == 3
            killed = kill(*whole)
            while True:  # at least once: the lab starts another at once
                assert echoes(client.connect(echo)), "somebody serves while there is no agent"
                if own(lab, "brain"):
                    break
            traffic.goes_on()
            kills.append(killed)
            assert traffic.refused_but(*kills) == []


# --- the end of all


def test_a_mesh_that_is_taken_down_leaves_no_pod_redirected_to_nobody(lab: Lab, client: Netns, echo: SocketAddress) -> None:
    run_dir = lab.home / "run" / NODE
    with load(client, echo, held=0) as traffic, lab.inside("shop/server") as server:
        assert "istio-ambient" in server.output("nft", "list", "tables")
        (run_dir / "uninstall").touch()
        (supervisor,) = own(lab)
        kill(supervisor, number=signal.SIGTERM)
        wait_until(lambda: "istio-ambient" not in server.output("nft", "list", "tables"), "no rule is left")
        wait_until(lambda: "for_good=true" in lab.log(NODE), "the agent says why")
        traffic.goes_on()
        assert traffic.refused == []
        wait_until(lambda: not (run_dir / "uninstall").exists(), "the order is carried out")
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "the lab starts another agent, which captures them again", 90)
