"""The pool of tunnels, with a dial that the test answers by hand."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

import trio

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.reactor.loop import Reactor
from mesh.reactor.pool import GONE, OnLink, PoolKey, PoolLimits, TunnelPool

CLIENT = SpiffeId("cluster.local", "shop", "client")
SERVER = SpiffeId("cluster.local", "shop", "server")
MAX_STREAMS = 100
LIMITS = PoolLimits(MAX_STREAMS, unused_release=300.0)


def key(ip: str = "10.0.0.2", source: str = "10.0.0.1") -> PoolKey:
    return PoolKey(CLIENT, frozenset({SERVER}), SocketAddress(IPv4Address(ip), 15008), IPv4Address(source))


class Link:
    """What the pool looks at in a link."""

    def __init__(self, active: int = 0) -> None:
        self.streams = active
        self.asked = 0
        self.usable = True
        self.pooled = False
        self.on_room: Callable[[], None] | None = None
        self.closed_gracefully = trio.Event()

    @property
    def active(self) -> int:
        self.asked += 1
        return self.streams

    def end(self, streams: int = 1) -> None:
        self.streams -= streams
        on_room, self.on_room = self.on_room, None
        if on_room is not None:
            on_room()

    def close_gracefully(self) -> None:
        self.closed_gracefully.set()

    def abort(self, reason: str) -> None:
        self.usable = False


class Dials:
    def __init__(self, limits: PoolLimits = LIMITS, reactor: Reactor | None = None) -> None:
        self.open: list[tuple[PoolKey, OnLink[Link], Callable[[Link], None]]] = []
        self.pool: TunnelPool[Link] = TunnelPool(reactor or Reactor(), self._dial, limits)
        self.got: list[Link | str] = []

    def _dial(self, key: PoolKey, on_link: OnLink[Link], on_closed: Callable[[Link], None]) -> None:
        self.open.append((key, on_link, on_closed))

    def checkout(self, wanted: PoolKey) -> None:
        def take(link: Link | str) -> None:
            if not isinstance(link, str):
                link.streams += 1
            self.got.append(link)

        self.pool.checkout(wanted, take)

    def answer(self, link: Link | str, dial: int = 0) -> None:
        self.open.pop(dial)[1](link)


def test_a_burst_for_one_peer_shares_one_dial() -> None:
    dials = Dials()
    for _ in range(MAX_STREAMS):
        dials.checkout(key())
    assert len(dials.open) == 1
    link = Link()
    dials.answer(link)
    assert dials.got == [link] * MAX_STREAMS


def test_more_than_one_connection_carries_is_dialled_for_twice() -> None:
    dials = Dials()
    for _ in range(MAX_STREAMS + 1):
        dials.checkout(key())
    assert len(dials.open) == 2
    first, second = Link(), Link()
    dials.answer(first)
    dials.answer(second)
    assert dials.got.count(first) == MAX_STREAMS
    assert dials.got.count(second) == 1


def test_as_many_connections_as_tunnels_when_each_is_to_have_its_own() -> None:
    dials = Dials(PoolLimits(max_streams=1, unused_release=300.0))
    for _ in range(3):
        dials.checkout(key())
    assert len(dials.open) == 3
    links = [Link(), Link(), Link()]
    for link in links:
        dials.answer(link)
    assert dials.got == links


def test_a_connection_goes_when_it_carried_nothing_for_a_while() -> None:
    reactor = Reactor()
    dials = Dials(PoolLimits(max_streams=1, unused_release=0.0), reactor)
    unused, used = Link(), Link()

    async def main() -> None:
        for link in (unused, used):
            dials.checkout(key(source=f"10.0.0.{len(dials.got) + 1}"))
            dials.answer(link)
        unused.end()
        with trio.fail_after(10):
            await unused.closed_gracefully.wait()

    reactor.run(main)
    reactor.close()
    assert not used.closed_gracefully.is_set()


def test_everybody_who_waits_learns_that_the_dial_failed() -> None:
    dials = Dials()
    for _ in range(3):
        dials.checkout(key())
    dials.answer("connection failed: refused")
    assert dials.got == ["connection failed: refused"] * 3
    dials.checkout(key())
    assert len(dials.open) == 1, "the next one dials anew"


def test_tunnels_from_different_addresses_or_to_different_peers_do_not_share() -> None:
    dials = Dials()
    dials.checkout(key())
    dials.checkout(key(ip="10.0.0.3"))
    dials.checkout(key(source="10.0.0.9"))
    assert len(dials.open) == 3


def test_a_full_connection_is_used_again_once_its_streams_ended() -> None:
    dials = Dials()
    dials.checkout(key())
    link = Link(active=MAX_STREAMS - 1)
    dials.answer(link)
    dials.checkout(key())
    assert len(dials.open) == 1, "full: another is dialled"
    link.end(97)
    dials.checkout(key())
    assert dials.got == [link, link]


def test_a_full_connection_that_closed_is_not_used_again_when_its_streams_end() -> None:
    dials = Dials(PoolLimits(max_streams=1, unused_release=300.0))
    dials.checkout(key())
    (_, _, on_closed), link = dials.open[0], Link()
    dials.answer(link)
    dials.checkout(key())
    on_closed(link)
    link.end()
    dials.checkout(key())
    assert dials.got == [link]


def test_the_oldest_connection_with_room_is_used_before_all_others() -> None:
    dials = Dials(PoolLimits(max_streams=1, unused_release=300.0))
    oldest, younger = Link(), Link()
    for link in (oldest, younger):
        dials.checkout(key())
        dials.answer(link)
    younger.end()
    oldest.end()
    dials.checkout(key())
    assert dials.got == [oldest, younger, oldest]


def test_full_connections_are_not_asked_again_for_every_tunnel() -> None:
    dials = Dials(PoolLimits(max_streams=1, unused_release=300.0))
    links = [Link() for _ in range(20)]
    for link in links:
        dials.checkout(key())
        dials.answer(link)
    assert dials.got == links
    assert max(link.asked for link in links) <= 3


def test_a_connection_without_a_stream_that_may_carry_none_now_is_asked_again() -> None:
    """Its peer has allowed none yet: no stream could end."""
    dials = Dials()
    dials.checkout(key())
    link = Link()
    dials.answer(link)
    link.end()
    link.usable = False
    dials.checkout(key())
    link.usable = True
    dials.checkout(key())
    assert dials.got == [link, link]


def test_a_peer_that_allows_no_streams_is_not_given_one_more_connection_each_time() -> None:
    dials = Dials()
    links = [Link() for _ in range(5)]
    for link in links:
        dials.checkout(key())
        dials.answer(link)
        link.end()
        link.usable = False
    dials.checkout(key())
    assert [link.closed_gracefully.is_set() for link in links] == [False, True, True, True, True]


def test_a_connection_that_went_away_is_not_handed_out() -> None:
    dials = Dials()
    dials.checkout(key())
    link = Link()
    dials.answer(link)
    link.usable = False
    dials.checkout(key())
    assert len(dials.open) == 1
    assert dials.got == [link]


def test_closing_the_pool_lets_streams_finish_when_asked_to() -> None:
    dials = Dials()
    dials.checkout(key())
    link = Link()
    dials.answer(link)
    dials.pool.close(gracefully=True)
    assert link.closed_gracefully.is_set()


def test_a_pool_that_was_closed_gives_up_what_is_still_dialled_and_gives_out_nothing() -> None:
    dials = Dials()
    dials.checkout(key())
    dials.pool.close(gracefully=False)
    late = Link()
    dials.answer(late)
    assert not late.usable, "the connection that came too late is cut"
    assert dials.got == [GONE]
    dials.checkout(key())
    assert dials.got == [GONE, GONE]
    assert not dials.open
    assert dials.pool.connections() == 0


def test_a_pool_that_is_drained_still_serves_whom_it_has_promised() -> None:
    dials = Dials()
    dials.checkout(key())
    dials.pool.close(gracefully=True)
    link = Link()
    dials.answer(link)
    assert dials.got == [link]


def test_one_that_fails_with_its_connection_keeps_nobody_waiting() -> None:
    errors: list[BaseException] = []
    dials = Dials()
    dials.pool = TunnelPool(Reactor(on_error=lambda error, where: errors.append(error)), dials._dial, LIMITS)

    def fail(link: Link | str) -> None:
        raise ZeroDivisionError

    dials.pool.checkout(key(), fail)
    dials.checkout(key())
    link = Link()
    dials.answer(link)
    assert dials.got == [link]
    assert [type(error) for error in errors] == [ZeroDivisionError]
