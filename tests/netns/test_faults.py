"""The node agent when the world around it fails: no control plane, killed processes, no descriptors, no disk, pods that vanish."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from mesh.model.address import SocketAddress
from mesh.testing.lab import Lab, running_lab, wait_until
from mesh.testing.netns import Netns, echoes

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="entering a lab's namespaces from outside needs root")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
SHOP = {"shop/client", "shop/stranger", "shop/server", "shop/database"}
POD = """
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {account}
  containers: [{{name: main, command: {command}}}]
"""
ECHO = "[python3, apps/echo.py, '7000']"
SLEEP = "[sleep, infinity]"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("faults")) as lab:
        yield lab


@pytest.fixture
def enrolled(lab: Lab) -> Iterator[Lab]:
    """The shop is in the mesh, all is well, and so it must be again after the test."""
    lab.label("shop", "istio.io/dataplane-mode=ambient")
    assert_well(lab)
    yield lab
    lab.remove("more.yaml")
    lab.label("shop", "istio.io/dataplane-mode=ambient")
    assert_well(lab)


@pytest.fixture
def client(enrolled: Lab) -> Iterator[Netns]:
    with enrolled.inside("shop/client") as place:
        yield place


@pytest.fixture
def echo(enrolled: Lab) -> SocketAddress:
    """The server's echo port, by the pod's own address."""
    return echo_of(enrolled, "shop/server")


def echo_of(lab: Lab, pod: str) -> SocketAddress:
    return SocketAddress.parse(f"{lab.pod(pod)['ips'][0]}:7000")


def assert_well(lab: Lab) -> None:
    """Agents are ready, the shop's pods are captured, and traffic between them is mutual TLS."""
    wait_until(lambda: health(lab, "n1") == health(lab, "n2") == "ready", "both agents are ready", 60)
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "every pod of the shop is captured", 60)
    with lab.inside("shop/client") as client:
        wait_until(lambda: is_mutual(lab, client, echo_of(lab, "shop/server")), "traffic is mutual TLS", 60)


def is_mutual(lab: Lab, client: Netns, echo: SocketAddress) -> bool:
    """One connection of the client's, and whether its agent carried it through a tunnel."""
    try:
        with client.connect(echo) as sock:
            host, port = sock.getsockname()
            if not echoes(sock):
                return False
    except OSError:
        return False
    lines = wait_until(lambda: records(lab, "n1", f"src.addr={host}:{port} "), "the connection is recorded", 5)
    return ":15008 " in lines[0]


def records(lab: Lab, node: str, word: str) -> list[str]:
    return [line for line in log(lab, node).splitlines() if "\taccess\t" in line and word in line]


def log(lab: Lab, node: str) -> str:
    return (lab.home / f"logs/ztunnel-{node}.log").read_text()


def health(lab: Lab, node: str) -> str:
    return next(str(found["agent"]) for found in lab.status()["nodes"] if found["name"] == node)


def kill(*pids: int, number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@contextmanager
def no_control_plane(lab: Lab) -> Iterator[None]:
    """Its port refuses everybody, and nothing that it says on connections that are there gets out."""
    rules = (
        "add table inet away",
        "add chain inet away in { type filter hook input priority 0; }",
        "add chain inet away out { type filter hook output priority 0; }",
        "add rule inet away in tcp dport 15012 reject with tcp reset",
        "add rule inet away out tcp sport 15012 tcp flags & rst == 0 drop",
    )
    done = lab.run("istiod", "nft", "; ".join(rules))
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        lab.run("istiod", "nft", "delete table inet away")


@contextmanager
def held(place: Netns, address: SocketAddress, count: int) -> Iterator[list[socket.socket]]:
    """Connections that have echoed once."""
    with ExitStack() as stack:
        socks = [stack.enter_context(place.connect(address)) for _ in range(count)]
        assert all(echoes(sock) for sock in socks)
        yield socks


def tables(place: Netns) -> set[str]:
    """Our nftables tables in a pod."""
    return {line.split()[2] for line in place.output("nft", "list", "tables").splitlines() if "istio-ambient" in line}


# --- the control plane


def test_an_agent_that_starts_without_a_control_plane_says_so_and_recovers(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    (supervisor,) = lab.agent("n1")
    processes = [supervisor, *lab.agent("n1", "brain"), *lab.agent("n1", "mover")]
    with no_control_plane(lab):
        kill(supervisor, *lab.agent("n1", "mover", "spare"))  # the one mover that would go on serving
        wait_until(lambda: not any(map(is_alive, processes)), "nothing of the agent outlives its supervisor")
        says = wait_until(
            lambda: (text := health(lab, "n1")).startswith("not ready") and "next attempt in" in text and text, "it says that it waits"
        )
        assert "state manager (" in says
        assert "workload proxy manager (waiting for the first configuration)" in says
        assert tables(client), "what was captured stays so: nothing leaves in plaintext meanwhile"
        with pytest.raises(OSError, match=r"refused|timed out"):
            client.connect(echo)
        attempts = log(lab, "n1").count("xds.disconnected")
        wait_until(lambda: log(lab, "n1").count("xds.disconnected") > attempts, "it goes on trying")
    wait_until(lambda: health(lab, "n1") == "ready", "it becomes ready when the control plane is back")
    wait_until(lambda: is_mutual(lab, client, echo), "and its pods' traffic flows")


def test_without_a_control_plane_traffic_goes_on_and_new_pods_wait(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    with held(client, echo, 5) as socks:
        with no_control_plane(lab):
            assert is_mutual(lab, client, echo)
            lab.write("more.yaml", POD.format(name="late", namespace="shop", node="n1", account="client", command=SLEEP))
            wait_until(lambda: "shop/late" in lab.pods_in_mesh(), "a new pod is captured")
            with lab.inside("shop/late") as late, late.connect(echo) as sock:
                assert not echoes(sock), "nothing leaves a captured pod that the agent knows nothing about"
            assert 'error="failed to fetch information about local workload: client.shop (late)"' in "".join(
                records(lab, "n1", lab.pod("shop/late")["ips"][0])
            )
        with lab.inside("shop/late") as late:
            wait_until(lambda: is_mutual(lab, late, echo), "the new pod's traffic flows once it is described")
        assert all(echoes(sock) for sock in socks)


def test_without_a_control_plane_a_brain_and_a_mover_may_die_and_all_connections_are_served(
    enrolled: Lab, client: Netns, echo: SocketAddress
) -> None:
    lab = enrolled
    with no_control_plane(lab):
        joined = log(lab, "n1").count("mover.joined")
        kill(*lab.agent("n1", "brain"))
        wait_until(lambda: log(lab, "n1").count("mover.joined") == joined + 2, "another brain meets the movers")
        one, other = lab.agent("n1", "mover")
        kill(one)
        wait_until(lambda: log(lab, "n1").count("mover.joined") == joined + 3, "another mover is there, and knows nothing of the mesh")
        for _ in range(20):
            assert is_mutual(lab, client, echo)
    wait_until(lambda: health(lab, "n1") == "ready", "the control plane is back")
    kill(other)
    assert is_mutual(lab, client, echo), "the mover that came knows all there is"


def test_a_released_pod_is_served_until_its_peers_are_told(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    with no_control_plane(lab):
        lab.label("shop", "istio.io/dataplane-mode-")
        wait_until(lambda: not lab.pods_not_outside(), "the pods leave")
        # Whoever still has the tunnel in mind, for longer than any grace after the label, must be served.
        with lab.inside("shop/server") as server:
            deadline = time.monotonic() + 7
            while time.monotonic() < deadline:
                with client.connect(SocketAddress(echo.ip, 15008)):
                    pass
                assert "istio-ambient-mangle" in tables(server)
                time.sleep(0.2)
    with lab.inside("shop/server") as server:
        wait_until(lambda: not tables(server), "once they are told, everything goes")


# --- killed processes


def test_a_brain_killed_at_any_moment_of_a_change_leaves_no_pod_in_between(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab, rng = enrolled, random.Random(7)
    with ExitStack() as stack, held(client, echo, 5) as socks:
        places = {name: stack.enter_context(lab.inside(name)) for name in SHOP}
        for number in range(6):
            lab.label("shop", "istio.io/dataplane-mode=ambient" if number % 2 else "istio.io/dataplane-mode-")
            for _ in range(2):
                time.sleep(rng.uniform(0.0, 0.4))
                kill(*lab.agent("n1", "brain"), *lab.agent("n2", "brain"))
            wanted = SHOP if number % 2 else set[str]()
            # A pod that lost its label counts as leaving until its agent has let go of it, which a killed brain does later.
            pods = lab.pods_in_mesh if wanted else lab.pods_not_outside
            wait_until(lambda wanted=wanted, pods=pods: pods() == wanted, f"all are {'in' if wanted else 'out'}", 60)
            for name, place in places.items():
                chains = place.output("nft", "list", "ruleset")
                assert ("redirect to :15001" in chains) == bool(wanted), f"{name}: rules and annotation disagree\n{chains}"
            assert all(echoes(sock) for sock in socks), "held connections are lost"
        lab.label("shop", "istio.io/dataplane-mode-")
    # No connection is held any more.
    for name in SHOP:
        with lab.inside(name) as place:
            wait_until(lambda place=place: not tables(place), f"nothing is left in {name}", 60)
            wait_until(lambda place=place: ":15001" not in place.output("ss", "-Hltn"), f"nobody listens in {name}")


def test_a_mover_killed_amid_a_transfer_ends_it_with_a_reset(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    with client.connect(echo) as sock:
        outcome: list[str] = []

        def send() -> None:
            block = bytes(1 << 16)
            try:
                while True:
                    sock.sendall(block)
            except OSError as exc:
                outcome.append(type(exc).__name__)

        received, killed = 0, False
        sender = threading.Thread(target=send)
        sender.start()
        try:
            while data := sock.recv(1 << 16):
                received += len(data)
                if received > 20 << 20 and not killed:
                    killed = True
                    kill(*lab.agent("n2", "mover"))
        except ConnectionError as exc:
            outcome.append(type(exc).__name__)
        sender.join()
    # The kernel tells an error once, to whichever call asks first.
    assert "ConnectionResetError" in outcome, "a truncated answer must not look like a whole one"
    wait_until(lambda: len(lab.agent("n2", "mover")) == 2, "the movers are replaced")
    wait_until(lambda: is_mutual(lab, client, echo), "and serve")


def test_a_mover_that_stands_still_costs_a_burst_no_connection(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    for stuck in lab.agent("n1", "mover"):
        (alive,) = set(lab.agent("n1", "mover")) - {stuck}
        kill(stuck, number=signal.SIGSTOP)
        try:
            with ExitStack() as stack, ThreadPoolExecutor(16) as threads:
                for _ in range(4):
                    socks = [stack.enter_context(sock) for sock in threads.map(lambda _: client.connect(echo), range(16))]
                    assert all(threads.map(echoes, socks))
                before = cpu_ticks(alive)
                time.sleep(1)
                assert cpu_ticks(alive) - before < os.sysconf("SC_CLK_TCK") / 4, "it looks again and again though nothing waits"
        finally:
            kill(stuck, number=signal.SIGCONT)
        wait_until(lambda: sum(shared_counts(lab, "n1")[::2]) == 0, "none of them is still counted")
    for _ in range(20):
        assert is_mutual(lab, client, echo)


def test_a_mover_killed_in_a_burst_costs_what_it_took_and_is_counted_anew(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled

    def attempt(_: int) -> bool:
        try:
            with client.connect(echo) as sock:
                return echoes(sock)
        except OSError:
            return False

    for killed in lab.agent("n1", "mover"):
        with ThreadPoolExecutor(16) as threads:
            served = [threads.submit(attempt, number) for number in range(400)]
            wait_until(lambda: sum(future.done() for future in served) > 100, "a part of them is served")  # noqa: B023  # called before the loop goes on
            kill(killed)
            assert sum(future.result() for future in served) >= 400 - 16, "others than those that it had are lost"
        wait_until(lambda: len(set(lab.agent("n1", "mover")) - {killed}) == 2, "it is replaced")  # noqa: B023  # likewise
        wait_until(lambda: sum(shared_counts(lab, "n1")[::2]) == 0, "what it had is forgotten")


def shared_counts(lab: Lab, node: str) -> list[int]:
    """Of each mover, how many connections and how many HBONE connections of peers the others think that it has."""
    return list(memoryview((lab.home / f"run/{node}/ztunnel/shares").read_bytes()).cast("q"))


def cpu_ticks(pid: int) -> int:
    """User and system time (proc_pid_stat(5))."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]))


def test_movers_killed_while_a_pod_drains_let_it_go(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    with held(client, echo, 5) as socks:
        lab.label("shop", "istio.io/dataplane-mode-")
        wait_until(lambda: "pod.draining" in log(lab, "n2").rpartition("pod.releasing")[2], "the server drains")
        assert all(echoes(sock) for sock in socks)
        kill(*lab.agent("n2", "mover"))
        wait_until(lambda: not any(echoes(sock) for sock in socks), "their connections are lost")
    for name in SHOP:
        with lab.inside(name) as place:
            wait_until(lambda place=place: not tables(place), f"nothing is left in {name}")
    assert echoes(client.connect(echo))


def test_an_unknown_mover_of_a_dead_brain_is_drained(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    orphan = lab.agent("n1", "mover", "0")
    (lab.home / "run/n1/ztunnel/mover-0.pid").unlink()
    kill(*lab.agent("n1", "brain"))
    wait_until(lambda: not any(map(is_alive, orphan)), "it ends: nobody would have told it of changes")
    wait_until(lambda: len(lab.agent("n1", "mover")) == 2, "its slot has another")
    assert "mover.surplus" in log(lab, "n1")


def test_sigterm_gives_held_connections_their_deadline_and_ends_well(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    (supervisor,) = lab.agent("n1")
    spare = lab.agent("n1", "mover", "spare")
    processes = [supervisor, *lab.agent("n1", "brain"), *lab.agent("n1", "mover", "0")]
    kill(*spare, number=signal.SIGSTOP)  # so that none of the connections is its own
    with ExitStack() as stack:
        try:
            socks = stack.enter_context(held(client, echo, 5))
        finally:
            kill(*spare, number=signal.SIGCONT)
        before = log(lab, "n1").count("draining")
        kill(supervisor, number=signal.SIGTERM)
        wait_until(lambda: log(lab, "n1").count("draining") > before, "the agent drains")
        assert all(echoes(sock) for sock in socks), "what lives goes on"
        wait_until(lambda: not any(map(is_alive, processes)), "all of the agent ends")
        assert not any(echoes(sock) for sock in socks)
        assert echoes(stack.enter_context(client.connect(echo))), "the mover that runs apart serves meanwhile"
        assert lab.agent("n1", "mover", "spare") == spare
    exits = {process["name"]: process["last_exit"] for process in lab.status()["processes"]}
    assert exits["ztunnel-n1"] == "exit status 0"
    assert len([line for line in log(lab, "n1").splitlines() if "connection closed due to connection drain" in line]) >= 5


# --- out of something


def test_movers_without_descriptors_refuse_and_recover(enrolled: Lab, client: Netns, echo: SocketAddress) -> None:
    lab = enrolled
    movers = lab.agent("n2", "mover")
    before = lab.descriptors("n2")
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in movers}
    with ExitStack() as stack:
        for pid, (_, hard) in limits.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 12, hard))
        with lab.inside("outside/caller") as outside:
            served, lost = 0, 0
            for _ in range(100):
                with suppress(OSError):
                    sock = stack.enter_context(outside.connect(echo))
                    sock.settimeout(1)
                    served, lost = (served + 1, lost) if echoes(sock) else (served, lost + 1)
                if lost > 10:
                    break
            assert served
            assert lost > 10, "the test has not used up the descriptors"
            assert lab.agent("n2", "mover") == movers, "a mover died of it"
            # A pod that comes now can't be served; it must be later.
            lab.write("more.yaml", POD.format(name="late", namespace="shop", node="n2", account="server", command=SLEEP))
            wait_until(lambda: "the movers did not serve the pod" in health(lab, "n2"), "the agent says what is wrong", 60)
            for pid, limit in limits.items():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
            stack.close()
            wait_until(lambda: "shop/late" in lab.pods_in_mesh(), "the pod is served in the end", 60)
            wait_until(lambda: is_mutual(lab, client, echo), "connections are served again")
    assert lab.agent("n2", "mover") == movers
    lab.remove("more.yaml")
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "the pod is gone")
    wait_until(lambda: not lab.descriptors("n2") - before - Counter(socket=4), "no descriptor is left over")
    dump = json.loads(lab.run("n2", "curl", "-sS", "localhost:15000/config_dump").stdout)
    assert [
        connection
        for pod in dump["workloadState"].values()
        for connections in pod["connections"].values()
        for connection in connections
        if connection["actualDst"].endswith(":7000")
    ] == [], "connections that ended are still counted as living"


def test_a_status_directory_that_cannot_be_written_is_told_and_made_good(enrolled: Lab) -> None:
    lab = enrolled
    status, away = lab.home / "status/n1", lab.home / "n1-away"
    status.rename(away)
    status.write_text("in the way")
    try:
        lab.write("more.yaml", POD.format(name="late", namespace="shop", node="n1", account="client", command=SLEEP))
        wait_until(lambda: "shop/late: " in health(lab, "n1"), "the agent says which pod it can't announce")
    finally:
        status.unlink()
        away.rename(status)
    wait_until(lambda: "shop/late" in lab.pods_in_mesh(), "the pod is announced in the end", 60)


def test_an_emptied_status_directory_is_filled_again(enrolled: Lab) -> None:
    lab = enrolled
    for file in (lab.home / "status/n2").glob("pod_shop_*"):
        file.unlink()
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "the pods are announced again", 60)


# --- pods come and go


def test_a_pod_deleted_under_traffic_takes_its_connections_and_leaves_nothing(enrolled: Lab, client: Netns) -> None:
    lab = enrolled
    before = lab.descriptors("n2")
    lab.write("more.yaml", POD.format(name="brief", namespace="shop", node="n2", account="server", command=ECHO))
    wait_until(lambda: "shop/brief" in lab.pods_in_mesh(), "the pod is captured")
    address = echo_of(lab, "shop/brief")
    wait_until(lambda: is_mutual(lab, client, address), "it serves")
    with held(client, address, 1) as socks:
        lab.remove("more.yaml")
        wait_until(lambda: not any(echoes(sock) for sock in socks), "its connections end")
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "it is gone")
    wait_until(lambda: not lab.descriptors("n2") - before - Counter(socket=4), "nothing of it is held")


def test_a_pod_deleted_while_it_is_enrolled_leaves_nothing(enrolled: Lab) -> None:
    lab, rng = enrolled, random.Random(11)
    before = lab.descriptors("n2") + lab.descriptors("n2", "brain")
    for _ in range(6):
        lab.write("more.yaml", POD.format(name="brief", namespace="shop", node="n2", account="server", command=ECHO))
        time.sleep(rng.uniform(0.05, 0.6))
        lab.remove("more.yaml")
        time.sleep(rng.uniform(0.0, 0.2))
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "it is gone")
    wait_until(lambda: not lab.descriptors("n2") + lab.descriptors("n2", "brain") - before - Counter(socket=4), "nothing of it is held")
    assert "brief" not in health(lab, "n2")
    assert not list((lab.home / "status/n2").glob("*brief*"))


def test_a_pod_that_comes_back_under_its_name_and_address_is_captured_like_the_first(enrolled: Lab, client: Netns) -> None:
    lab = enrolled
    text = POD.format(name="again", namespace="shop", node="n2", account="server", command=ECHO)
    uids, ips = set[str](), set[str]()
    for number in range(3):
        lab.write("more.yaml", text)
        wait_until(lambda: "shop/again" in lab.pods_in_mesh(), f"life {number}: it is captured")
        pod = lab.pod("shop/again")
        uids.add(pod["uid"])
        ips.add(pod["ips"][0])
        address = SocketAddress.parse(f"{pod['ips'][0]}:7000")
        wait_until(lambda address=address: is_mutual(lab, client, address), f"life {number}: its traffic is mutual TLS")
        lab.remove("more.yaml")
        wait_until(lambda: all(f"{pod['namespace']}/{pod['name']}" != "shop/again" for pod in lab.status()["pods"]), "it is deleted")
    assert (len(uids), len(ips)) == (3, 1)


def test_a_source_that_vanishes_and_returns_is_followed(enrolled: Lab) -> None:
    lab = enrolled
    text = (lab.source / "shop.yaml").read_text()
    lab.remove("shop.yaml")
    try:
        wait_until(lambda: not lab.pods_in_mesh(), "the pods go with it")
    finally:
        lab.write("shop.yaml", text)
    assert_well(lab)


def test_thirty_pods_at_once_are_captured_and_go_at_once(enrolled: Lab, client: Netns) -> None:
    lab = enrolled
    before = {node: lab.descriptors(node) + lab.descriptors(node, "brain") for node in ("n1", "n2")}
    nodes = itertools.cycle(["n1", "n2"])
    many = "".join(
        POD.format(name=f"many-{number}", namespace="shop", node=next(nodes), account="server", command=ECHO) for number in range(30)
    )
    lab.write("more.yaml", many)
    wait_until(lambda: len(lab.pods_in_mesh()) == len(SHOP) + 30, "all are captured", 120)
    for name in ("shop/many-0", "shop/many-29"):
        address = echo_of(lab, name)
        wait_until(lambda address=address: is_mutual(lab, client, address), f"{name} is reached by mutual TLS")
    lab.remove("more.yaml")
    wait_until(lambda: lab.pods_in_mesh() == SHOP, "all are gone", 120)
    for node, count in before.items():
        wait_until(
            lambda node=node, count=count: not lab.descriptors(node) + lab.descriptors(node, "brain") - count - Counter(socket=6),
            f"nothing of them is held on {node}",
            60,
        )
