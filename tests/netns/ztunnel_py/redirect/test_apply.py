"""Capture and release in real network namespaces, with a stand-in for the data plane."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address

import pytest

from mesh.linux.conntrack import original_udp_destination
from mesh.linux.netns import run_in_netns
from mesh.linux.nft import Chain, ChainType, Hook, HookPoint, Rule, Table, counter, ct_state, jump, render
from mesh.linux.nft_apply import delete_tables, replace_tables
from mesh.linux.sockets import (
    SO_MARK,
    local_address,
    loopback_listeners,
    make_upstream_socket,
    original_destination,
    peer_address,
    transparent_listener,
)
from mesh.model.address import SocketAddress
from mesh.model.ports import DIALLED_MARK, DNS, INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND, PROXY_MARK
from mesh.reactor.tcp import reset, socket_address
from mesh.testing.lab import wait_until
from mesh.testing.netns import PATIENCE_SECONDS, EchoServer, Netns, echoes, namespaces, wire
from ztunnel_py.redirect.apply import (
    CaptureFailed,
    apply_capture,
    begin_release,
    finish_release,
    observe_pod,
    read_capture,
    verify_capture,
)
from ztunnel_py.redirect.plan import NAT_TABLE, RAW_TABLE, PodCapture, RedirectPlan, plan_capture

COUNTED = re.compile(r"packets (\d+) bytes \d+")

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]

POD_V4, PEER_V4 = ip_address("10.77.0.2"), ip_address("10.77.0.1")
POD_V6, PEER_V6 = ip_address("fd77::2"), ip_address("fd77::1")
APP, REMOTE = 8080, 9090


class StandInProxy:
    """Accepts what is redirected, notes where it was going, and carries it on as the agent would: outbound as itself, inbound
    under the client's address."""

    def __init__(self, pod: Netns) -> None:
        self._pod = pod
        self.seen: list[tuple[int, SocketAddress, SocketAddress | None]] = []
        self._listeners = [pod.run(lambda port=port: transparent_listener(port, mark=PROXY_MARK)) for port in (OUTBOUND, INBOUND_PLAINTEXT)]
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self._peer: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> StandInProxy:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._wake.close()
        self._thread.join(PATIENCE_SECONDS)
        for sock in (*self._listeners, self._woken, *self._peer):
            sock.close()
        self._selector.close()

    def went_to(self, port: int) -> list[SocketAddress | None]:
        return [original for listener, _, original in list(self.seen) if listener == port]

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                if sock is self._woken:
                    return
                if sock in self._listeners:
                    self._accept(sock)
                else:
                    self._forward(sock)

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        sock.settimeout(PATIENCE_SECONDS)
        client, original, port = peer_address(sock), original_destination(sock), local_address(listener).port
        self.seen.append((port, client, original))
        assert original is not None
        upstream = self._pod.run(lambda: self._dial(original, client, inbound=port == INBOUND_PLAINTEXT))
        self._peer[sock], self._peer[upstream] = upstream, sock
        for one in (sock, upstream):
            self._selector.register(one, selectors.EVENT_READ)

    def _dial(self, target: SocketAddress, client: SocketAddress, *, inbound: bool) -> socket.socket:
        family = socket.AF_INET6 if target.ip.version == 6 else socket.AF_INET
        sock = make_upstream_socket(family, mark=DIALLED_MARK, source=client.ip if inbound else None)
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect((str(target.ip), target.port))
        return sock

    def _forward(self, sock: socket.socket) -> None:
        other = self._peer.get(sock)
        if other is None:
            return  # closed by what the other end of it brought in the same turn
        try:
            data = sock.recv(65536)
            if data:
                other.sendall(data)
                return
        except OSError:
            pass
        for one in (sock, other):
            self._selector.unregister(one)
            del self._peer[one]
            one.close()


class World:
    """A pod and a peer, an application in each, and connections between them that can be asked whether they live."""

    def __init__(self, pod: Netns, peer: Netns, app: EchoServer, remote: EchoServer) -> None:
        self.pod, self.peer, self.app, self.remote = pod, peer, app, remote

    def plan(self, *, bypass_inbound: bool = False, dns: bool = False) -> RedirectPlan:
        return plan_capture(observe_pod(self.pod.fd, bypass_inbound=bypass_inbound, dns=dns))

    def outbound(self, version: int = 4) -> socket.socket:
        """A connection that the pod's application opens."""
        return self.pod.connect(SocketAddress(PEER_V4 if version == 4 else PEER_V6, REMOTE))

    def inbound(self, version: int = 4) -> socket.socket:
        """A connection to the pod's application."""
        return self.peer.connect(SocketAddress(POD_V4 if version == 4 else POD_V6, APP))

    def each_kind(self) -> list[socket.socket]:
        return [make(version) for make in (self.outbound, self.inbound) for version in (4, 6)]

    def state(self) -> str:
        """All that capture may touch, as text."""
        commands = (
            ["nft", "list", "ruleset"],
            *(["ip", f"-{version}", *what] for version in (4, 6) for what in (["rule"], ["route", "show", "table", "100"])),
        )
        return "".join(self.pod.output(*command, check=False) for command in commands)


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        pod, peer = stack.enter_context(namespaces("pod", "peer"))
        wire(pod, peer, (f"{POD_V4}/24", f"{POD_V6}/64"), (f"{PEER_V4}/24", f"{PEER_V6}/64"))
        app = stack.enter_context(EchoServer(pod.listen(APP)))
        remote = stack.enter_context(EchoServer(peer.listen(REMOTE)))
        yield World(pod, peer, app, remote)


@contextmanager
def closing(socks: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


@pytest.mark.parametrize(
    "capture",
    [PodCapture(ipv6=True), PodCapture(ipv6=False), PodCapture(ipv6=True, bypass_inbound=True), PodCapture(ipv6=True, dns=True)],
    ids=str,
)
def test_nft_lists_the_rules_exactly_as_we_print_them(world: World, capture: PodCapture) -> None:
    plan = plan_capture(capture)
    apply_capture(world.pod.fd, plan)
    assert world.pod.output("nft", "--stateless", "list", "ruleset") == render(plan.tables)
    begin_release(world.pod.fd, plan)
    assert world.pod.output("nft", "--stateless", "list", "ruleset") == render(plan.releasing)


@pytest.mark.parametrize("version", [4, 6])
def test_outbound_connections_reach_the_proxy_which_learns_where_they_were_going(world: World, version: int) -> None:
    with StandInProxy(world.pod) as proxy:
        apply_capture(world.pod.fd, world.plan())
        with world.outbound(version) as sock:
            assert echoes(sock)
        target = SocketAddress(PEER_V4 if version == 4 else PEER_V6, REMOTE)
        assert proxy.went_to(OUTBOUND) == [target]
        assert world.remote.saw(POD_V4 if version == 4 else POD_V6) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_a_port_that_the_proxy_just_had_leads_to_the_proxy_at_once(world: World, version: int) -> None:
    """A connection of the proxy's own, ended by a reset of its server: were it not tracked apart, conntrack would take a SYN with its
    addresses and ports for its own, and the dropping rule keep it for as long as that is remembered."""
    world.pod.output("sysctl", "-w", "net.netfilter.nf_conntrack_tcp_timeout_close=120")
    with StandInProxy(world.pod) as proxy, world.peer.listen(7070) as resetting:
        apply_capture(world.pod.fd, world.plan())
        target = SocketAddress(PEER_V4 if version == 4 else PEER_V6, 7070)
        port = lose_by_reset(world.pod, target, resetting, mark=DIALLED_MARK)
        with dial_from(world.pod, target, port):
            resetting.accept()[0].close()
            assert proxy.went_to(OUTBOUND) == [target]


@pytest.mark.parametrize("version", [4, 6])
def test_a_port_that_the_application_had_before_the_capture_does_not_lead_past_the_proxy(world: World, version: int) -> None:
    world.pod.output("sysctl", "-w", "net.netfilter.nf_conntrack_tcp_timeout_close=3")
    track(world.pod)
    with StandInProxy(world.pod) as proxy, world.peer.listen(7070) as resetting:
        target = SocketAddress(PEER_V4 if version == 4 else PEER_V6, 7070)
        port = lose_by_reset(world.pod, target, resetting)
        apply_capture(world.pod.fd, world.plan())
        resetting.settimeout(0.5)
        opening = threading.Thread(target=lambda: dial_from(world.pod, target, port).close())
        opening.start()
        with pytest.raises(TimeoutError):
            resetting.accept()
        wait_until(lambda: proxy.went_to(OUTBOUND) == [target], "once conntrack has forgotten the other, it is the proxy's")
        opening.join()
        resetting.settimeout(PATIENCE_SECONDS)
        resetting.accept()[0].close()


def track(netns: Netns) -> None:
    """conntrack works in a namespace once a rule asks for it."""
    rule = Rule((ct_state("new"), counter()))
    netns.run(lambda: replace_tables((Table("tracking", (Chain("input", (rule,), Hook(ChainType.FILTER, HookPoint.INPUT, 0)),)),)))


def lose_by_reset(netns: Netns, target: SocketAddress, resetting: socket.socket, *, mark: int | None = None) -> int:
    """Connect, and be reset by the server; the port that the connection had."""
    family = socket.AF_INET if target.ip.version == 4 else socket.AF_INET6
    with netns.run(lambda: make_upstream_socket(family, mark=mark)) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect((str(target.ip), target.port))
        port = local_address(sock).port
        reset(resetting.accept()[0])
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    return port


def dial_from(netns: Netns, target: SocketAddress, port: int) -> socket.socket:
    """An application's connection from a port of its choice."""
    sock = netns.run(lambda: socket.socket(socket.AF_INET if target.ip.version == 4 else socket.AF_INET6))
    sock.settimeout(PATIENCE_SECONDS)
    sock.bind(("0.0.0.0" if target.ip.version == 4 else "::", port))
    sock.connect((str(target.ip), target.port))
    return sock


def test_a_client_from_before_the_capture_does_not_come_past_the_proxy_again(world: World) -> None:
    with world.pod.listen(7070) as resetting:
        track(world.pod)
        target = SocketAddress(POD_V4, 7070)
        port = lose_by_reset(world.peer, target, resetting)
        with StandInProxy(world.pod) as proxy:
            apply_capture(world.pod.fd, world.plan())
            resetting.settimeout(0.5)
            with world.peer.run(lambda: socket.socket()) as again:
                again.settimeout(0.5)
                again.bind(("0.0.0.0", port))
                with pytest.raises(TimeoutError):
                    again.connect((str(target.ip), target.port))
            with pytest.raises(TimeoutError):
                resetting.accept()
            assert not proxy.seen


@pytest.mark.parametrize("version", [4, 6])
def test_the_application_sees_its_client_behind_the_proxy(world: World, version: int) -> None:
    with StandInProxy(world.pod) as proxy:
        apply_capture(world.pod.fd, world.plan())
        with world.inbound(version) as sock:
            assert echoes(sock, b"x" * 50_000)
        assert proxy.went_to(INBOUND_PLAINTEXT) == [SocketAddress(POD_V4 if version == 4 else POD_V6, APP)]
        assert [client.ip for client in world.app.clients] == [PEER_V4 if version == 4 else PEER_V6]


def test_the_pod_talks_to_itself_past_the_proxy(world: World) -> None:
    with StandInProxy(world.pod) as proxy:
        apply_capture(world.pod.fd, world.plan())
        for ip in ("127.0.0.1", "::1", str(POD_V4), str(POD_V6)):
            with world.pod.connect(SocketAddress(ip_address(ip), APP)) as sock:
                assert echoes(sock)
        assert proxy.seen == []


def test_the_hbone_port_is_reached_directly(world: World) -> None:
    with StandInProxy(world.pod) as proxy, EchoServer(world.pod.listen(INBOUND_HBONE)) as hbone:
        apply_capture(world.pod.fd, world.plan())
        with world.peer.connect(SocketAddress(POD_V4, INBOUND_HBONE)) as sock:
            assert echoes(sock)
        assert (hbone.saw(PEER_V4), proxy.seen) == (1, [])


def test_with_bypass_only_outbound_connections_are_captured(world: World) -> None:
    with StandInProxy(world.pod) as proxy:
        apply_capture(world.pod.fd, world.plan(bypass_inbound=True))
        with closing(world.each_kind()) as socks:
            assert all(echoes(sock) for sock in socks)
        assert (len(proxy.went_to(OUTBOUND)), len(proxy.went_to(INBOUND_PLAINTEXT))) == (2, 0)


def test_a_pod_without_ipv6_is_captured_for_ipv4(world: World) -> None:
    world.pod.output("sysctl", "-w", "net.ipv6.conf.lo.disable_ipv6=1")
    plan = world.plan()
    assert plan.families == (socket.AF_INET,)
    with StandInProxy(world.pod) as proxy:
        apply_capture(world.pod.fd, plan)
        assert verify_capture(world.pod.fd, plan) == []
        with closing([world.outbound(4), world.inbound(4)]) as socks:
            assert all(echoes(sock) for sock in socks)
        assert len(proxy.seen) == 2


def test_an_agent_without_ipv6_leaves_the_ipv6_of_a_pod_alone(world: World) -> None:
    plan = plan_capture(observe_pod(world.pod.fd, bypass_inbound=False, ipv6=False))
    with StandInProxy(world.pod) as proxy:
        apply_capture(world.pod.fd, plan)
        with closing(world.each_kind()) as socks:
            assert all(echoes(sock) for sock in socks)
        assert sorted(client.ip.version for _, client, _ in proxy.seen) == [4, 4]


def test_fifty_connections_that_were_there_before_capture_live_on(world: World) -> None:
    """Half opened by the pod, half by its peer, over IPv4 and IPv6; some idle throughout, some busy while the rules appear."""
    make = [world.outbound, world.inbound]
    with closing([make[number % 2](4 if number % 4 < 2 else 6) for number in range(50)]) as held, StandInProxy(world.pod) as proxy:
        assert all(echoes(sock) for sock in held[10:])
        with busy(held[40:]) as interrupted:
            plan = world.plan()
            apply_capture(world.pod.fd, plan)
            assert [number for number, sock in enumerate(held[:40]) if not echoes(sock)] == []
            with closing(world.each_kind()) as new:
                assert all(echoes(sock) for sock in new)
        assert interrupted == []
        assert (len(proxy.went_to(OUTBOUND)), len(proxy.went_to(INBOUND_PLAINTEXT))) == (2, 2)
        assert [number for number, sock in enumerate(held) if not echoes(sock)] == []


@contextmanager
def busy(socks: list[socket.socket]) -> Iterator[list[int]]:
    """Keep these connections talking all the time; yields the numbers of those that broke."""
    broken: list[int] = []
    stop = threading.Event()

    def talk(number: int, sock: socket.socket) -> None:
        while not stop.is_set():
            if not echoes(sock, b"busy" * 100):
                broken.append(number)
                return

    threads = [threading.Thread(target=talk, args=(number, sock), daemon=True) for number, sock in enumerate(socks)]
    for thread in threads:
        thread.start()
    try:
        yield broken
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)


def test_without_the_test_for_new_connections_capture_would_cut_living_ones(world: World) -> None:
    """What Istio's rules do; if this ever fails the kernel has learnt better and our extra test may go."""
    with closing(world.each_kind()) as held, StandInProxy(world.pod):
        apply_capture(world.pod.fd, world.plan())
        finish_release(world.pod.fd)
        rules = render(world.plan().tables).replace("tcp flags syn / fin,syn,rst,ack ", "meta l4proto tcp ")
        load(world.pod, rules)
        assert [echoes(sock) for sock in held] == [False] * 4


def load(netns: Netns, rules: str) -> None:
    """Have nft itself install rules, in one transaction."""
    fd = os.memfd_create("rules")
    try:
        os.write(fd, rules.encode())
        netns.output("nft", "-f", f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


def test_redirected_connections_live_through_release_and_new_ones_go_free(world: World) -> None:
    plan = world.plan()
    with closing([]) as held, StandInProxy(world.pod) as proxy:
        held += world.each_kind()  # before the mesh
        apply_capture(world.pod.fd, plan)
        held += world.each_kind()  # redirected
        assert all(echoes(sock) for sock in held)
        assert len(proxy.seen) == 4
        begin_release(world.pod.fd, plan)
        held += world.each_kind()  # free
        assert [number for number, sock in enumerate(held) if not echoes(sock)] == []
        assert len(proxy.seen) == 4
        apply_capture(world.pod.fd, plan)
        held += world.each_kind()  # redirected again
        assert [number for number, sock in enumerate(held) if not echoes(sock)] == []
        assert len(proxy.seen) == 8


def test_a_released_pod_still_serves_peers_that_come_through_the_tunnel(world: World) -> None:
    """The agent dials the application under the client's address although nothing is redirected any more."""
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    begin_release(world.pod.fd, plan)
    for pod, peer in ((POD_V4, PEER_V4), (POD_V6, PEER_V6)):
        with world.pod.run(lambda pod=pod, peer=peer: dial_as(pod, peer)) as sock:
            assert echoes(sock)
        assert world.app.saw(peer) == 1


def dial_as(pod: object, client: object) -> socket.socket:
    family = socket.AF_INET6 if ":" in str(pod) else socket.AF_INET
    sock = make_upstream_socket(family, mark=DIALLED_MARK, source=ip_address(str(client)))
    sock.settimeout(PATIENCE_SECONDS)
    sock.connect((str(pod), APP))
    return sock


def let_agent_choose_only(pod: Netns, port: int) -> None:
    """connect() prefers ports with the parity of the lowest; so that is the one it takes first."""
    pod.output("sysctl", "-w", f"net.ipv4.ip_local_port_range={port} {port + 1}")


def call_from(world: World, port: int, version: int) -> socket.socket:
    """A client's connection to the application from a port of its choice."""
    return dial_from(world.peer, SocketAddress(POD_V4 if version == 4 else POD_V6, APP), port)


@pytest.mark.parametrize("version", [4, 6])
def test_a_port_that_a_client_holds_a_connection_from_serves_the_agent_in_its_name(world: World, version: int) -> None:
    """Without a zone of its own the agent's SYN goes the way of the client's connection, which ends, and nobody tells the client."""
    with StandInProxy(world.pod) as proxy, closing([]) as held:
        apply_capture(world.pod.fd, world.plan())
        held.append(call_from(world, 40000, version))
        assert echoes(held[0])
        let_agent_choose_only(world.pod, 40000)
        held.append(call_from(world, 50000, version))
        assert [echoes(sock) for sock in (*held, *held)] == [True] * 4
        assert world.app.clients[1] == SocketAddress(PEER_V4 if version == 4 else PEER_V6, 40000), "they had the same port"
        assert len(proxy.went_to(INBOUND_PLAINTEXT)) == 2


@pytest.mark.parametrize("version", [4, 6])
def test_a_port_that_the_agent_holds_a_connection_from_serves_the_client_itself(world: World, version: int) -> None:
    """Its own zone again: else the client's SYN is dropped, as one of a connection past the agent."""
    with StandInProxy(world.pod) as proxy, closing([]) as held:
        apply_capture(world.pod.fd, world.plan())
        let_agent_choose_only(world.pod, 40000)
        held.append(call_from(world, 50000, version))
        assert echoes(held[0])
        assert world.app.clients[0].port == 40000
        world.pod.output("sysctl", "-w", "net.ipv4.ip_local_port_range=45000 45001")
        held.append(call_from(world, 40000, version))
        assert [echoes(sock) for sock in (*held, *held)] == [True] * 4
        assert len(proxy.went_to(INBOUND_PLAINTEXT)) == 2


@pytest.mark.parametrize("version", [4, 6])
def test_while_a_pod_is_released_a_client_may_use_the_port_that_the_agent_holds(world: World, version: int) -> None:
    """To the application's kernel both would be one connection; nat gives the later one another port there."""
    plan = world.plan()
    with StandInProxy(world.pod) as proxy, closing([]) as held:
        apply_capture(world.pod.fd, plan)
        let_agent_choose_only(world.pod, 40000)
        held.append(call_from(world, 50000, version))
        assert echoes(held[0])
        begin_release(world.pod.fd, plan)
        held.append(call_from(world, 40000, version))
        assert [echoes(sock) for sock in (*held, *held)] == [True] * 4
        assert len(proxy.went_to(INBOUND_PLAINTEXT)) == 1
        assert len(set(world.app.clients)) == 2


@pytest.mark.parametrize("version", [4, 6])
def test_a_connection_from_before_the_capture_keeps_its_port_to_itself(world: World, version: int) -> None:
    """Once anything was said in it since: until then conntrack does not know it."""
    with StandInProxy(world.pod), closing([call_from(world, 40000, version)]) as held:
        apply_capture(world.pod.fd, world.plan())
        assert echoes(held[0])
        let_agent_choose_only(world.pod, 40000)
        held.append(call_from(world, 50000, version))
        assert [echoes(sock) for sock in (*held, *held)] == [True] * 4
        assert len(set(world.app.clients)) == 2


def test_after_release_the_namespace_is_as_it_was(world: World) -> None:
    before = world.state()
    plan = world.plan()
    with StandInProxy(world.pod):
        apply_capture(world.pod.fd, plan)
        with closing(world.each_kind()) as socks:
            assert all(echoes(sock) for sock in socks)
        begin_release(world.pod.fd, plan)
        with closing(world.each_kind()) as free:
            finish_release(world.pod.fd)
            assert all(echoes(sock) for sock in free)
    assert world.state() == before
    finish_release(world.pod.fd)
    assert world.state() == before


def test_capture_leaves_other_rules_and_routes_alone(world: World) -> None:
    world.pod.output("nft", "add table inet theirs; add chain inet theirs c; add rule inet theirs c tcp dport 1 drop")
    world.pod.output("ip", "rule", "add", "fwmark", "0x7", "lookup", "100", "pref", "32764")
    world.pod.output("ip", "route", "add", "10.9.9.0/24", "dev", "eth0", "table", "100")
    before = world.state()
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    begin_release(world.pod.fd, plan)
    finish_release(world.pod.fd)
    assert world.state() == before


def test_applying_again_changes_nothing_and_keeps_the_counters(world: World) -> None:
    plan = world.plan()
    with StandInProxy(world.pod):
        assert apply_capture(world.pod.fd, plan)
        with world.outbound() as sock:
            assert echoes(sock)
        before = world.state()
        assert not apply_capture(world.pod.fd, plan)
        after = world.state()
        assert COUNTED.sub("", after) == COUNTED.sub("", before)
        counted = [(int(old), int(new)) for old, new in zip(COUNTED.findall(before), COUNTED.findall(after), strict=True)]
        assert all(new >= old for old, new in counted), "packets of the connection's end may come late, but none is forgotten"
        assert "packets 1" in before


@pytest.mark.parametrize(
    ("damage", "difference"),
    [
        ("nft flush chain inet istio-ambient-nat output", "table istio-ambient-nat: chain output: a rule is missing: "),
        ("nft delete table inet istio-ambient-mangle", "table istio-ambient-mangle is missing"),
        ("nft insert rule inet istio-ambient-nat output accept", "table istio-ambient-nat: chain output: rule 1 is not: "),
        ("nft add rule inet istio-ambient-nat output accept", "table istio-ambient-nat: chain output: 1 rules too many"),
        ("nft add chain inet istio-ambient-nat surprise", "table istio-ambient-nat: chain surprise is not ours"),
        ("ip rule delete pref 32764", "IPv4 rule is missing: fwmark 0x111/0xfff lookup 100"),
        ("ip -6 rule delete pref 32764", "IPv6 rule is missing: fwmark 0x111/0xfff lookup 100"),
        ("ip route flush table 100", "IPv4 route is missing: local default dev lo table 100"),
        ("ip -6 route flush table 100", "IPv6 route is missing: local default dev lo table 100"),
    ],
)
def test_verification_finds_what_somebody_changed_and_applying_repairs_it(world: World, damage: str, difference: str) -> None:
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    assert verify_capture(world.pod.fd, plan) == []
    intact = world.state()
    world.pod.output(*damage.split())
    found = verify_capture(world.pod.fd, plan)
    assert found
    assert found[0].startswith(difference)
    assert apply_capture(world.pod.fd, plan)
    assert verify_capture(world.pod.fd, plan) == []
    assert world.state() == intact


def test_rules_that_only_look_like_ours_are_found(world: World) -> None:
    """The same comment, another port: what a rule does counts."""
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    forged = render(plan.tables).replace("redirect to :15001", "redirect to :15002", 1)
    load(world.pod, "flush ruleset; " + forged)
    assert [difference.partition(": rule")[0] for difference in verify_capture(world.pod.fd, plan)] == [f"table {NAT_TABLE}: chain output"]


def test_rules_are_read_with_what_is_not_ours_marked_and_with_the_tables_of_others(world: World) -> None:
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    world.pod.output("nft", "add", "rule", "inet", NAT_TABLE, "output", "tcp", "dport", "99", "drop")
    world.pod.output("nft", "add", "table", "inet", "strangers")
    reading = read_capture(world.pod.fd, plan, releasing=False)
    assert reading.differences == (f"table {NAT_TABLE}: chain output: 1 rules too many",)
    assert reading.foreign == ("strangers",)
    rules = {chain.name: chain.rules for table in reading.tables if table.name == NAT_TABLE for chain in table.chains}
    assert [rule.text for rule in rules["prerouting"]] == [rule.text for rule in plan.tables[0].chains[0].rules]
    assert [rule.expected for rule in rules["output"]] == [True] * len(plan.tables[0].chains[1].rules) + [False]


def test_a_pod_that_is_being_released_is_read_against_what_is_left_of_the_capture(world: World) -> None:
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    begin_release(world.pod.fd, plan)
    assert read_capture(world.pod.fd, plan, releasing=True).differences == ()
    assert read_capture(world.pod.fd, plan, releasing=False).differences != ()


def test_residue_of_another_agent_under_the_same_names_is_replaced(world: World) -> None:
    world.pod.output(
        "nft", f"add table inet {NAT_TABLE}; add chain inet {NAT_TABLE} istio-output; add rule inet {NAT_TABLE} istio-output drop"
    )
    world.pod.output("ip", "rule", "add", "fwmark", "0x111/0xfff", "lookup", "100", "pref", "32764")
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    assert verify_capture(world.pod.fd, plan) == []
    assert world.pod.output("nft", "--stateless", "list", "ruleset") == render(plan.tables)


def test_a_refused_plan_changes_nothing_and_names_the_rule(world: World) -> None:
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    before = world.state()
    broken = RedirectPlan((*plan.tables, Table("broken", (Chain("c", (Rule((jump("nowhere"),)),)),))), plan.releasing, plan.families)
    with pytest.raises(CaptureFailed, match="add rule broken c jump nowhere: No such file or directory"):
        apply_capture(world.pod.fd, broken)
    assert world.state() == before


def test_a_namespace_that_cannot_be_entered_is_an_error_with_its_reason() -> None:
    with open("/dev/null", "rb") as file, pytest.raises(CaptureFailed, match="Invalid argument"):
        apply_capture(file.fileno(), plan_capture(PodCapture(ipv6=False)))


def test_no_descriptor_and_no_thread_is_left_behind(world: World) -> None:
    plan = world.plan()
    apply_capture(world.pod.fd, plan)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        apply_capture(world.pod.fd, plan)
        verify_capture(world.pod.fd, plan)
        begin_release(world.pod.fd, plan)
        finish_release(world.pod.fd)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert [thread for thread in threading.enumerate() if thread.name == "netns"] == []


def test_replacing_a_table_never_leaves_a_moment_without_it(world: World) -> None:
    """A connection opened while the tables are rewritten over and over is always redirected."""
    plan = world.plan()
    with StandInProxy(world.pod) as proxy:
        apply_capture(world.pod.fd, plan)
        stop = threading.Event()

        def rewrite() -> None:
            while not stop.is_set():
                replace_tables(plan.tables)

        writer = threading.Thread(target=lambda: run_in_netns(world.pod.fd, rewrite), daemon=True)
        writer.start()
        try:
            for _ in range(100):
                with world.outbound() as sock:
                    assert echoes(sock)
        finally:
            stop.set()
            writer.join(PATIENCE_SECONDS)
        assert len(proxy.went_to(OUTBOUND)) == 100


# Look-ups of names


class StandInResolver:
    """Answers datagrams and TCP connections with its name, from a thread; in the pod on loopback, in the peer for all."""

    def __init__(self, name: bytes, socks: list[socket.socket]) -> None:
        self._name = name
        self._socks = socks
        self.asked: list[tuple[SocketAddress, SocketAddress]] = []
        """Who asked, and where."""
        self.held: list[tuple[socket.socket, tuple[str, int]]] = []
        """Who asked for an answer ``later``."""
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> StandInResolver:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._wake.close()
        self._thread.join(PATIENCE_SECONDS)
        for sock in (*self._socks, self._woken):
            sock.close()

    def answer_held(self) -> None:
        while self.held:
            sock, peer = self.held.pop()
            sock.sendto(self._name, peer)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in (*self._socks, self._woken):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._woken:
                        return
                    if sock.type == socket.SOCK_DGRAM:
                        question, peer = sock.recvfrom(1000)
                        self.asked.append((socket_address(peer), local_address(sock)))
                        if question == b"later":
                            self.held.append((sock, peer))
                        else:
                            sock.sendto(self._name, peer)
                    else:
                        with contextlib.suppress(OSError):
                            stream, peer = sock.accept()
                            self.asked.append((socket_address(peer), local_address(sock)))
                            stream.sendall(self._name)
                            stream.close()


@contextmanager
def resolvers(world: World) -> Iterator[tuple[StandInResolver, StandInResolver]]:
    """The agent's, on port 15053 of the pod, and the outside's, on port 53 of the peer."""
    socks: list[socket.socket] = []
    for ip in (PEER_V4, PEER_V6):
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        datagrams = world.peer.run(lambda family=family: socket.socket(family, socket.SOCK_DGRAM))
        datagrams.bind((str(ip), 53))
        socks += [datagrams, world.peer.listen(53, str(ip))]
    with StandInResolver(b"agent", world.pod.run(lambda: loopback_listeners(DNS))) as agent, StandInResolver(b"outside", socks) as outside:
        yield agent, outside


class Asker:
    """An application's socket that asks the peer for names."""

    def __init__(self, world: World, version: int, *, mark: int = 0, name: tuple[str, int] | None = None) -> None:
        self.server = SocketAddress(PEER_V4 if version == 4 else PEER_V6, 53)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        self.sock = world.pod.run(lambda: socket.socket(family, socket.SOCK_DGRAM))
        if mark:
            self.sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        self.sock.settimeout(PATIENCE_SECONDS)
        if name is not None:
            self.sock.bind(name)
        self.sock.connect((str(self.server.ip), 53))

    def ask(self) -> bytes:
        self.sock.send(b"?")
        return self.sock.recv(100)


def ask_over_tcp(world: World, version: int) -> bytes:
    with world.pod.connect(SocketAddress(PEER_V4 if version == 4 else PEER_V6, 53)) as sock:
        return sock.recv(100)


@pytest.mark.parametrize("version", [4, 6])
def test_look_ups_reach_the_agent_which_learns_where_they_were_going(world: World, version: int) -> None:
    with resolvers(world) as (agent, outside):
        apply_capture(world.pod.fd, world.plan(dns=True))
        assert (Asker(world, version).ask(), ask_over_tcp(world, version)) == (b"agent", b"agent")
        assert outside.asked == []
        peer, local = agent.asked[0]
        assert world.pod.run(lambda: original_udp_destination(local, peer)) == SocketAddress(PEER_V4 if version == 4 else PEER_V6, 53)


def test_a_datagram_that_nothing_redirected_has_no_other_destination(world: World) -> None:
    with resolvers(world) as (agent, _):
        apply_capture(world.pod.fd, world.plan(dns=True))
        sock = world.pod.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(("127.0.0.1", DNS))
        sock.send(b"?")
        assert sock.recv(100) == b"agent"
        peer, local = agent.asked[0]
        assert world.pod.run(lambda: original_udp_destination(local, peer)) is None
        gone = SocketAddress(peer.ip, 1)
        assert world.pod.run(lambda: original_udp_destination(local, gone)) is None


@pytest.mark.parametrize("version", [4, 6])
def test_the_agents_own_look_ups_go_out_even_from_a_port_that_an_application_had(world: World, version: int) -> None:
    with resolvers(world) as (agent, _):
        apply_capture(world.pod.fd, world.plan(dns=True))
        application = Asker(world, version)
        assert application.ask() == b"agent"
        name = application.sock.getsockname()
        application.sock.close()
        mine = Asker(world, version, mark=PROXY_MARK, name=name)
        assert mine.ask() == b"outside"
        assert len(agent.asked) == 1
        mine.sock.close()
        assert Asker(world, version, name=name).ask() == b"agent", "and the application's come to it, even from a port that it had"


def test_without_a_zone_of_their_own_the_agents_look_ups_would_come_back_to_it(world: World) -> None:
    """Why the raw table is there; if this ever fails it may go."""
    with resolvers(world):
        apply_capture(world.pod.fd, world.plan(dns=True))
        world.pod.run(lambda: delete_tables([RAW_TABLE]))
        application = Asker(world, 4)
        assert application.ask() == b"agent"
        name = application.sock.getsockname()
        application.sock.close()
        assert Asker(world, 4, mark=PROXY_MARK, name=name).ask() == b"agent"


@pytest.mark.parametrize("version", [4, 6])
def test_look_ups_under_way_are_answered_when_their_capture_begins_changes_and_ends(world: World, version: int) -> None:
    """A socket that asks again and again, and one whose answer is still to come, at every step."""
    with resolvers(world) as (agent, outside):
        steady = Asker(world, version)
        assert steady.ask() == b"outside"
        for change in (
            lambda: apply_capture(world.pod.fd, world.plan()),
            lambda: apply_capture(world.pod.fd, world.plan(dns=True)),
            lambda: apply_capture(world.pod.fd, world.plan(dns=False)),
            lambda: apply_capture(world.pod.fd, world.plan(dns=True)),
            lambda: begin_release(world.pod.fd, world.plan(dns=True)),
            lambda: finish_release(world.pod.fd),
        ):
            late = Asker(world, version)
            late.sock.send(b"later")
            wait_until(lambda: agent.held or outside.held, "the look-up has arrived")
            change()
            for resolver in (agent, outside):
                resolver.answer_held()
            assert late.sock.recv(100) in (b"agent", b"outside")
            assert steady.ask() in (b"agent", b"outside")
            assert Asker(world, version).ask() in (b"agent", b"outside")
        assert Asker(world, version).ask() == b"outside"
        assert "istio-ambient" not in world.state()


def test_rules_for_look_ups_that_are_not_wanted_any_more_are_a_difference(world: World) -> None:
    apply_capture(world.pod.fd, world.plan(dns=True))
    assert verify_capture(world.pod.fd, world.plan(dns=True)) == []
    differences = verify_capture(world.pod.fd, world.plan())
    assert "table istio-ambient-raw: chain prerouting: 1 rules too many" in differences
    assert apply_capture(world.pod.fd, world.plan())
    assert verify_capture(world.pod.fd, world.plan()) == []
    world.pod.run(lambda: delete_tables([RAW_TABLE]))
    assert verify_capture(world.pod.fd, world.plan(dns=True)) != []
