"""Network namespaces of a real kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from mesh.linux.netns import (
    NotANetworkNamespace,
    create_named_netns,
    delete_named_netns,
    entered,
    ipv6_enabled,
    netns_identity,
    open_netns,
    open_own_netns,
    run_in_netns,
    run_in_netns_from_trio,
)
from mesh.linux.sockets import local_address
from mesh.model.address import SocketAddress
from mesh.testing.netns import namespaces

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]


def own_identity() -> tuple[int, int]:
    fd = open_own_netns()
    try:
        return netns_identity(fd)
    finally:
        os.close(fd)


def test_a_function_runs_inside_and_its_caller_stays_outside() -> None:
    home = own_identity()
    with namespaces("a") as (netns,):
        assert run_in_netns(netns.fd, own_identity) == netns_identity(netns.fd) != home
    assert own_identity() == home


def test_an_exception_comes_back_from_inside() -> None:
    def fail() -> None:
        raise LookupError("from inside")

    with namespaces("a") as (netns,), pytest.raises(LookupError, match="from inside"):
        run_in_netns(netns.fd, fail)


def test_the_thread_that_was_inside_ends() -> None:
    with namespaces("a") as (netns,):
        threads = threading.active_count()
        ident = run_in_netns(netns.fd, threading.current_thread)
        assert not ident.is_alive()
        assert threading.active_count() == threads


@pytest.fixture
def home_fd() -> Iterator[int]:
    fd = open_own_netns()
    yield fd
    os.close(fd)


def test_entering_comes_back_also_after_an_exception(home_fd: int) -> None:
    home = own_identity()
    with namespaces("a") as (netns,):
        with entered(netns.fd, home_fd):
            assert own_identity() == netns_identity(netns.fd)
        with pytest.raises(LookupError), entered(netns.fd, home_fd):
            raise LookupError
        assert own_identity() == home


def test_a_namespace_that_cannot_be_entered_leaves_the_thread_where_it_was(home_fd: int) -> None:
    home = own_identity()
    with open("/dev/null", "rb") as file, pytest.raises(OSError, match="Invalid argument"), entered(file.fileno(), home_fd):
        raise AssertionError("unreachable")
    assert own_identity() == home


def test_a_process_that_cannot_come_back_ends() -> None:
    """Losing CAP_SYS_ADMIN inside makes the way back impossible: better no process than one in the wrong pod."""
    program = """
import ctypes, sys
from mesh.linux.netns import entered, open_netns, open_own_netns
fd, home = open_netns(sys.argv[1]), open_own_netns()
libc = ctypes.CDLL(None)
with entered(fd, home):
    assert libc.syscall(126, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0  # capset: none left
print("survived")
"""
    with namespaces("a") as (netns,):
        done = subprocess.run([sys.executable, "-c", program, netns.path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "")
    assert "cannot return" in done.stderr


def test_trio_goes_on_while_something_runs_inside_and_its_workers_stay_at_home() -> None:
    async def main() -> None:
        home = own_identity()
        with namespaces("a") as (netns,):
            release = threading.Event()
            async with trio.open_nursery() as nursery:
                entered_inside: list[tuple[int, int]] = []

                def wait_inside() -> None:
                    release.wait(30)
                    entered_inside.append(own_identity())

                nursery.start_soon(run_in_netns_from_trio, netns.fd, wait_inside)
                await trio.lowlevel.checkpoint()
                release.set()  # only a loop that is not blocked gets here
            assert entered_inside == [netns_identity(netns.fd)]
            assert {await trio.to_thread.run_sync(own_identity) for _ in range(5)} == {home}

    trio.run(main)


def test_a_name_keeps_a_namespace_and_goes_without_trace(tmp_path: Path) -> None:
    path = create_named_netns(tmp_path / "names", "one")
    fd = open_netns(path)
    identity = netns_identity(fd)
    os.close(fd)
    fd = open_netns(path)
    assert netns_identity(fd) == identity
    os.close(fd)
    delete_named_netns(path)
    delete_named_netns(path)
    assert list((tmp_path / "names").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    path = create_named_netns(tmp_path, "one")
    try:
        with pytest.raises(FileExistsError):
            create_named_netns(tmp_path, "one")
    finally:
        delete_named_netns(path)


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/ns/uts", "/proc/self/status"])
def test_what_is_no_network_namespace_is_not_opened_as_one(path: str) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotANetworkNamespace):
        open_netns(path)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_ipv6_is_asked_of_the_namespace() -> None:
    with namespaces("with", "without") as (with_v6, without):
        without.output("sysctl", "-w", "net.ipv6.conf.lo.disable_ipv6=1")
        assert (with_v6.run(ipv6_enabled), without.run(ipv6_enabled)) == (True, False)


def test_a_socket_stays_where_it_was_opened() -> None:
    with namespaces("a") as (netns,), netns.listen(0) as listener:
        port = local_address(listener).port
        with netns.connect(SocketAddress(IPv4Address("127.0.0.1"), port)):
            pass
        assert run_in_netns(netns.fd, own_identity) != own_identity()
        assert local_address(listener).port == port
