"""Transparent sockets in real namespaces. Original destinations are tested with the rules that make them: ztunnel_py/redirect."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from mesh.linux import nft
from mesh.linux.nft import Chain, ChainType, Hook, HookPoint, Rule, Table
from mesh.linux.nft_apply import replace_tables
from mesh.linux.sockets import (
    SO_MARK,
    bind_foreign,
    bind_port,
    local_address,
    make_upstream_socket,
    original_destination,
    peer_address,
    transparent_listener,
)
from mesh.model.address import SocketAddress
from mesh.testing.netns import EchoServer, Netns, echoes, namespaces, wire

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]

MARK = 0x539


def accept(listener: socket.socket) -> socket.socket:
    listener.settimeout(15)
    sock, _ = listener.accept()
    return sock


def redirect_everything(netns: Netns, port: int) -> None:
    rules = (Rule((nft.l4proto(6), nft.tcp_dport(port, negate=True), nft.redirect(port))),)
    table = Table("t", (Chain("prerouting", rules, Hook(ChainType.NAT, HookPoint.PREROUTING, -100)),))
    netns.run(lambda: replace_tables([table]))


@pytest.mark.parametrize("target", ["10.77.0.1:81", "10.77.0.1:15001", "[fd77::1]:81"])
def test_the_original_destination_is_found_on_a_dual_stack_listener(target: str) -> None:
    with namespaces("a", "b") as (a, b):
        wire(a, b, ("10.77.0.2/24", "fd77::2/64"), ("10.77.0.1/24", "fd77::1/64"))
        redirect_everything(b, 15001)
        with (
            b.run(lambda: transparent_listener(15001, mark=MARK)) as listener,
            a.connect(SocketAddress.parse(target)),
            accept(listener) as sock,
        ):
            assert original_destination(sock) == SocketAddress.parse(target)
            assert peer_address(sock).ip == ip_address("10.77.0.2" if "." in target else "fd77::2")


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_without_nat_there_is_no_original_destination(ip: str) -> None:
    with (
        namespaces("a") as (a,),
        a.run(lambda: transparent_listener(15001, mark=MARK)) as listener,
        a.connect(SocketAddress(ip_address(ip), 15001)),
        accept(listener) as sock,
    ):
        assert original_destination(sock) is None
        assert local_address(sock) == SocketAddress(ip_address(ip), 15001)


def test_without_ipv6_a_listener_is_ipv4_and_finds_the_original_destination() -> None:
    with namespaces("a", "b") as (a, b):
        wire(a, b, ("10.77.0.2/24",), ("10.77.0.1/24",))
        b.output("sysctl", "-w", "net.ipv6.conf.all.disable_ipv6=1")
        redirect_everything(b, 15001)
        with b.run(lambda: transparent_listener(15001, mark=MARK)) as listener:
            assert listener.family == socket.AF_INET
            with a.connect(SocketAddress(IPv4Address("10.77.0.1"), 81)), accept(listener) as sock:
                assert original_destination(sock) == SocketAddress(IPv4Address("10.77.0.1"), 81)


def test_listeners_and_what_they_accept_bear_the_mark() -> None:
    with namespaces("a") as (a,), a.run(lambda: transparent_listener(15001, mark=MARK)) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, SO_MARK) == MARK
        with a.connect(SocketAddress(IPv4Address("127.0.0.1"), 15001)), accept(listener) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, SO_MARK) == MARK


def test_a_port_that_a_process_of_the_pod_holds_is_an_error_that_names_it() -> None:
    with namespaces("a") as (a,), a.listen(15001), pytest.raises(OSError, match="listen on port 15001: Address already in use") as caught:
        a.run(lambda: transparent_listener(15001, mark=MARK))
    assert caught.value.errno == errno.EADDRINUSE


def test_two_listeners_share_a_port_only_when_both_ask_for_it() -> None:
    with namespaces("a") as (a,), a.run(lambda: transparent_listener(15001, mark=MARK, reuse_port=True)):
        with pytest.raises(OSError, match="Address already in use"):
            a.run(lambda: transparent_listener(15001, mark=MARK))
        a.run(lambda: transparent_listener(15001, mark=MARK, reuse_port=True)).close()


def test_one_client_address_serves_more_connections_than_it_has_ports_for_one_destination() -> None:
    """The port is chosen at connect: two destinations may be reached from one local address and port."""
    with namespaces("a") as (a,):
        a.output("ip", "address", "add", "10.5.5.5/32", "dev", "lo")
        a.output("sysctl", "-w", "net.ipv4.ip_local_port_range=40000 40003")
        with EchoServer(a.listen(1)), EchoServer(a.listen(2)):
            socks = [a.run(lambda port=port: dial_from(IPv4Address("10.5.5.5"), port)) for port in (1, 2) * 3]
            assert all(echoes(sock) for sock in socks)
            for sock in socks:
                sock.close()


def dial_from(source: IPv4Address | IPv6Address, port: int) -> socket.socket:
    sock = make_upstream_socket(socket.AF_INET, mark=MARK, source=source)
    sock.settimeout(15)
    sock.connect(("127.0.0.1", port))
    return sock


@pytest.fixture(params=["10.5.5.5", "fd05::5"])
def client(request: pytest.FixtureRequest) -> IPv4Address | IPv6Address:
    return ip_address(request.param)


def dial_from_port(client: IPv4Address | IPv6Address, local: int, port: int) -> socket.socket:
    """To ``port`` of the loopback address, in the name of ``client`` and by ``local`` if that is to be had."""
    family, target = (socket.AF_INET, "127.0.0.1") if client.version == 4 else (socket.AF_INET6, "::1")
    sock = make_upstream_socket(family, mark=MARK)
    sock.settimeout(15)
    bind_foreign(sock, client, local)
    sock.connect((target, port))
    return sock


@contextmanager
def place_of(client: IPv4Address | IPv6Address) -> Iterator[Netns]:
    """A namespace that takes what is meant for ``client`` for its own."""
    with namespaces("a") as (a,):
        a.output("ip", "address", "add", str(client), "dev", "lo", *(["nodad"] if client.version == 6 else []))
        yield a


def test_a_chosen_port_is_had_again_at_once_after_who_had_it_closed_first(client: IPv4Address | IPv6Address) -> None:
    with place_of(client) as a, EchoServer(a.listen(1)):
        for _ in range(5):
            with a.run(lambda: dial_from_port(client, 40001, 1)) as sock:
                assert local_address(sock) == SocketAddress(client, 40001)
                assert echoes(sock)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""  # the server has closed too: TIME_WAIT


def test_a_chosen_port_leads_to_several_destinations_and_once_to_each(client: IPv4Address | IPv6Address) -> None:
    with (
        place_of(client) as a,
        EchoServer(a.listen(1)),
        EchoServer(a.listen(2)),
        a.run(lambda: dial_from_port(client, 40001, 1)) as sock,
        a.run(lambda: dial_from_port(client, 40001, 2)) as other,
    ):
        assert local_address(sock) == local_address(other) == SocketAddress(client, 40001)
        assert echoes(sock)
        assert echoes(other)
        with pytest.raises(OSError, match="Cannot assign requested address") as caught:
            a.run(lambda: dial_from_port(client, 40001, 1))
        assert caught.value.errno == errno.EADDRNOTAVAIL


def test_where_somebody_listens_the_kernel_chooses_another_port(client: IPv4Address | IPv6Address) -> None:
    with place_of(client) as a, EchoServer(a.listen(1)), a.listen(40001), a.run(lambda: dial_from_port(client, 40001, 1)) as sock:
        assert local_address(sock).ip == client
        assert local_address(sock).port != 40001
        assert echoes(sock)


@pytest.mark.parametrize(("family", "target"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_chosen_port_of_ones_own_is_had_after_time_wait_and_left_to_who_listens(family: int, target: str) -> None:
    def dial() -> socket.socket:
        sock = make_upstream_socket(family, mark=MARK)
        sock.settimeout(15)
        bind_port(sock, 40001)
        sock.connect((target, 1))
        return sock

    with namespaces("a") as (a,), EchoServer(a.listen(1)):
        for _ in range(5):
            with a.run(dial) as sock:
                assert local_address(sock).port == 40001
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
        with a.listen(40001), a.run(dial) as sock:
            assert local_address(sock).port != 40001
            assert echoes(sock)


def test_upstream_sockets_send_small_writes_at_once_and_notice_dead_peers() -> None:
    with make_upstream_socket(socket.AF_INET, mark=None, source=None) as sock:
        options = {
            (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 180,
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 180,
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 9,
        }
        assert {key: sock.getsockopt(*key) for key in options} == options
        assert not sock.getblocking()
        assert not sock.get_inheritable()


def test_a_source_of_the_other_family_is_an_error_and_leaks_nothing() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"."):
        make_upstream_socket(socket.AF_INET, mark=None, source=IPv6Address("fd00::1"))
    assert len(os.listdir("/proc/self/fd")) == descriptors
