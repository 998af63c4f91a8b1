"""Sockets that a pod has ready for its next dials: how many are made, when they go, and what a failure costs."""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from mesh.linux.ports import LocalPorts
from mesh.model.address import SocketAddress, parse_ip
from mesh.reactor.pool import PoolKey
from mesh.reactor.tcp import socket_address
from ztunnel_py.messages import PodInfo
from ztunnel_py.mover import pod as pods
from ztunnel_py.mover.inbound import InboundHbone, InboundPlaintext
from ztunnel_py.mover.outbound import Outbound
from ztunnel_py.mover.pod import SOCKETS_AHEAD, Pod, PodSockets

if TYPE_CHECKING:
    from tests.unit.ztunnel_py.mover.conftest import World

V4, V6 = SocketAddress(parse_ip("127.0.0.1"), 9), SocketAddress(parse_ip("::1"), 9)


class VisitedPod:
    """A pod whose namespace is ours; visits to it are counted."""

    def __init__(self, world: World) -> None:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
        world.network.places[fds[0]] = "uid"
        self._network = world.network
        self.pod = Pod(world.plane, PodInfo("uid", "client", "shop", "client"), PodSockets(*fds))

    @property
    def visits(self) -> int:
        return self._network.visits

    def take(self, count: int, address: SocketAddress = V4) -> None:
        """The sockets of so many dials, used and closed."""
        for _ in range(count):
            self.pod._make_socket(address, None, 0).close()

    def ahead(self, family: int = socket.AF_INET) -> int:
        return len(self.pod._ahead[family])


class Kernel:
    """Makes sockets while it has any left; remembers them all."""

    def __init__(self) -> None:
        self.left = 1000
        self.made: list[socket.socket] = []

    def make(self, family: int, *, mark: int | None) -> socket.socket:
        if self.left == 0:
            raise OSError(errno.EMFILE, "too many open files")
        self.left -= 1
        self.made.append(socket.socket(family))
        return self.made[-1]

    @property
    def all_closed(self) -> bool:
        return all(sock.fileno() == -1 for sock in self.made)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(pods, "make_upstream_socket", kernel.make)
    return kernel


def test_a_pod_that_dials_once_has_one_socket_made_and_one_that_goes_on_has_ever_more_up_to_a_bound(world: World, kernel: Kernel) -> None:
    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        made = []
        for visit in range(1, 8):
            visited.take(1)
            assert visited.visits == visit
            made.append(visited.ahead() + 1)
            visited.take(visited.ahead())
        assert made == [1, 2, 4, 8, 16, 16, 16]
        assert made[-1] == SOCKETS_AHEAD
        pod.close()
        assert kernel.all_closed

    world.run(main)


def test_families_have_sockets_of_their_own(world: World, kernel: Kernel) -> None:
    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        visited.take(2)
        assert visited.ahead(socket.AF_INET) == 1
        visited.take(1, V6)
        assert visited.ahead(socket.AF_INET) == 1
        assert {sock.family for sock in kernel.made[-2:]} == {socket.AF_INET6}
        pod.close()
        assert kernel.all_closed

    world.run(main)


def test_what_nobody_uses_is_closed_after_a_while_and_the_count_begins_anew(
    world: World, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        visited.take(1 + 2 + 4)
        assert visited.ahead() == 0
        monkeypatch.setattr(pods, "AHEAD_SECONDS", 0.01)
        visited.take(1)
        assert visited.ahead() == 7
        await world.until(lambda: visited.ahead() == 0)
        assert kernel.all_closed
        visited.take(1)
        assert visited.ahead() == 0
        pod.close()

    world.run(main)


def test_a_pod_that_goes_on_dialling_keeps_what_it_has_until_it_rests(world: World, kernel: Kernel) -> None:
    """Making the next ones puts the end off: only one clock runs."""

    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        timers = []
        for _ in range(3):
            visited.take(visited.ahead() + 1)
            timers.append(pod._trimmer)
        assert [timer is not None and timer.active for timer in timers] == [False, False, True]
        pod.close()
        assert not any(timer is not None and timer.active for timer in timers)

    world.run(main)


def test_a_failure_half_way_costs_nothing_while_one_socket_could_be_made(world: World, kernel: Kernel) -> None:
    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        visited.take(1 + 2)
        kernel.left = 3  # of four
        visited.take(3)
        with pytest.raises(OSError, match="too many open files"):
            visited.take(1)
        kernel.left = 1000
        visited.take(1)
        pod.close()
        assert kernel.all_closed

    world.run(main)


def test_a_dial_that_no_socket_can_be_made_for_is_told_later_and_no_socket_is_left(world: World, kernel: Kernel) -> None:
    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        kernel.left = 0
        told: list[socket.socket | OSError] = []
        pod.dial(V4, told.append)
        assert told == []
        await world.until(lambda: told)
        (failure,) = told
        assert isinstance(failure, OSError)
        assert failure.errno == errno.EMFILE
        pod.close()

    world.run(main)


def test_an_address_that_cannot_be_bound_costs_one_socket_and_not_the_others(
    world: World, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sock: socket.socket, source: object, port: int) -> None:
        raise OSError(errno.EADDRNOTAVAIL, "cannot assign requested address")

    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        visited.take(2)
        monkeypatch.setattr(pods, "bind_foreign", refuse)
        with pytest.raises(OSError, match="cannot assign"):
            pod._make_socket(V4, parse_ip("192.0.2.1"), 0)
        assert kernel.all_closed
        pod.close()

    world.run(main)


def test_a_closed_pod_has_no_sockets_and_makes_none(world: World, kernel: Kernel) -> None:
    async def main() -> None:
        visited = VisitedPod(world)
        pod = visited.pod
        visited.take(1 + 2 + 1)
        assert visited.ahead() == 3
        pod.close()
        assert kernel.all_closed
        with pytest.raises(OSError, match="no longer served"):
            visited.take(1)
        assert pod._trimmer is None or not pod._trimmer.active

    world.run(main)


class Names:
    """A pod's DNS, which has the pod as ours has."""

    under_way = 0

    def __init__(self, pod: Pod) -> None:
        self.pod = pod

    def listen(self, descriptors: Sequence[int]) -> None: ...

    def look_again(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def test_a_pod_that_is_dropped_leaves_nothing_for_the_garbage_collector(world: World) -> None:
    """A mover has that come seldom: what pods that come and go leave would be megabytes by then."""

    async def main() -> None:
        pod = world.pod("client")
        pod.sockets = replace(pod.sockets, dns=(os.open("/dev/null", os.O_RDONLY),))
        pod.stop_listening()
        pod.listen(outbound=Outbound, inbound_plaintext=InboundPlaintext, inbound_hbone=InboundHbone, dns=Names)
        failed: list[object] = []
        pod.pool.checkout(PoolKey(pod.identity(), frozenset(), V4, V4.ip), failed.append)
        await world.until(lambda: failed)
        world.forget(pod)
        pod.close()
        uid = pod.uid
        del pod
        await world.until(lambda: not [one for one in gc.get_objects() if type(one) is Pod and one.uid == uid])

    gc.disable()
    try:
        world.run(main)
    finally:
        gc.enable()


def test_a_chosen_port_that_a_living_connection_has_is_left_to_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(sock: socket.socket, source: object, port: int) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(source), port))

    async def main() -> None:
        pod = VisitedPod(world).pod
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as probe:
            probe.bind(("127.0.0.7", 0))
            free = probe.getsockname()[1]
            probe.close()
            monkeypatch.setattr(pods.LocalPorts, "here", lambda: LocalPorts(range(free, free + 1), (), 0))
            told: list[socket.socket | OSError] = []
            for number in (1, 2):
                pod.dial(socket_address(server.getsockname()), told.append, source=parse_ip("127.0.0.7"))
                await world.until(lambda number=number: len(told) == number)
            first, second = (sock for sock in told if isinstance(sock, socket.socket))
            assert first.getsockname() == ("127.0.0.7", free)
            assert second.getsockname()[0] == "127.0.0.7"
            assert second.getsockname()[1] != free
            first.close()
            second.close()
        pod.close()

    monkeypatch.setattr(pods, "bind_foreign", bind)
    world.run(main)
