"""HBONE connections shared by the tunnels that may share them: same identities on both ends, same peer, same source address.

Differs from ztunnel on purpose: everybody who waits for a dial shares its failure too instead of
waiting on, a connection that was full is used again once streams ended, and one that dies before the peer answered is replaced by another.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeAlias, TypeVar

from OpenSSL import SSL

from mesh.model.address import IpAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.reactor.hbone import HboneLink, JudgePeer, connect_hbone
from mesh.reactor.loop import Reactor, Timer

SOONEST_SWEEP_SECONDS = 0.05
"""Between looks for unused connections, however short a time they may stay."""
GONE = "pool draining"
"""Why a pool that was closed has no connection."""
TIMED_OUT = "connection timed out"
"""How the reason of a dial begins that got no answer."""
REFUSED = "connection failed"
"""How the reason of a dial begins that the peer's host or the way to it refused."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What a pool may hold. ``max_streams``: tunnels on a connection at once; a peer may allow fewer, which `HboneLink.usable` knows.
    ``unused_release``: seconds after which a connection without tunnels goes."""

    max_streams: int
    unused_release: float


class PoolKey:
    """What two tunnels must have in common to share a connection. Who asks with the same object each time saves its hash, which is most of
    what a checkout costs: those of addresses and identities are calls in Python."""

    __slots__ = ("_hash", "_parts", "expected", "peer", "source", "source_ip")

    def __init__(self, source: SpiffeId, expected: frozenset[SpiffeId], peer: SocketAddress, source_ip: IpAddress) -> None:
        self.source = source
        self.expected = expected
        self.peer = peer
        self.source_ip = source_ip
        self._parts = (source, expected, peer, source_ip)
        self._hash = hash(self._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PoolKey) and self._parts == other._parts

    def __hash__(self) -> int:
        return self._hash


class PooledLink(Protocol):
    """What the pool asks of a connection: that of an `HboneLink`."""

    pooled: bool
    on_room: Callable[[], None] | None

    @property
    def active(self) -> int: ...

    @property
    def usable(self) -> bool: ...

    def close_gracefully(self) -> None: ...

    def abort(self, reason: str) -> None: ...


L = TypeVar("L", bound=PooledLink)

OnLink: TypeAlias = Callable[[L | str], None]
"""Called once: with a usable connection, or with the reason why there is none."""

Dial: TypeAlias = Callable[[PoolKey, OnLink[L], Callable[[L], None]], None]
"""Open a connection for a key; the last argument is called when an established one has closed."""


# No dataclass: of a generic one with slots mypyc makes a class that cannot be imported.
class _Shelf(Generic[L]):
    """The connections of one key, in the order in which they came, and who waits for the next."""

    __slots__ = ("dialling", "idle_since", "links", "roomy", "waiting")

    def __init__(self) -> None:
        self.links: dict[L, None] = {}
        self.roomy: dict[L, None] = {}
        """Those of them that may take a tunnel more. Where connections carry few, nearly all are full: to ask each of them again for every
        tunnel cost more than all the rest of it."""
        self.waiting: list[OnLink[L]] = []
        self.dialling = 0
        self.idle_since: float | None = None


class TunnelPool(Generic[L]):
    """One pool per pod and mover, or per waypoint.

    ``checkout`` answers at once when a connection has room, else after a dial that all share.
    """

    def __init__(self, reactor: Reactor, dial: Dial[L], limits: PoolLimits) -> None:
        self._reactor = reactor
        self._dial = dial
        self._max_streams = limits.max_streams
        self._sweep_every = max(limits.unused_release / 2, SOONEST_SWEEP_SECONDS)
        self._shelves: dict[PoolKey, _Shelf[L]] = {}
        self._sweeper: Timer | None = None
        self._gone = False

    def checkout(self, key: PoolKey, on_link: OnLink[L]) -> None:
        """Find or make a connection with room for one more stream. A pool that was closed at once has none any more."""
        if self._gone:
            on_link(GONE)
            return
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = self._shelves[key] = _Shelf()
        shelf.idle_since = None
        link = self._find_room(shelf)
        if link is not None:
            on_link(link)
            return
        shelf.waiting.append(on_link)
        if len(shelf.waiting) > shelf.dialling * self._max_streams:
            shelf.dialling += 1
            self._dial(key, lambda link: self._dialled(key, link), lambda link: self._closed(key, link))
        self._sweep_later()

    def _find_room(self, shelf: _Shelf[L]) -> L | None:
        """The oldest connection if it takes a tunnel more, else the first that does. Full ones stand aside until they say that there may be
        room. Of those that carry nothing and may not, one is kept, as the peer may allow it yet: one that never does would have one more
        with each tunnel."""
        full: list[L] = []
        idle: list[L] = []
        found = None
        # A peer gives the first connection of each of our movers to another of its own; which of several came to have room first is chance.
        oldest = next(iter(shelf.links), None)
        if oldest is not None and oldest in shelf.roomy and oldest.active < self._max_streams and oldest.usable:
            return oldest
        for link in shelf.roomy:
            if link.active < self._max_streams and link.usable:
                found = link
                break
            (full if link.active else idle).append(link)
        for link in full:
            del shelf.roomy[link]
            link.on_room = partial(self._has_room, shelf, link)
        for link in idle[1:]:
            link.close_gracefully()
        return found

    def _has_room(self, shelf: _Shelf[L], link: L) -> None:
        if link in shelf.links:
            shelf.roomy[link] = None

    def connections(self) -> int:
        """How many established connections the pool holds."""
        return sum(len(shelf.links) for shelf in self._shelves.values())

    def close(self, *, gracefully: bool) -> None:
        """Let go of every connection: after its streams ended, or at once; then also of those that are still being dialled."""
        if not gracefully:
            self._gone = True
            self._dial = _dial_nobody  # nobody asks any more; whoever made us, and gave a method of its own, is free to go
        for shelf in list(self._shelves.values()):
            for link in list(shelf.links):
                if gracefully:
                    link.close_gracefully()
                else:
                    link.abort(GONE)
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def _dialled(self, key: PoolKey, link: L | str) -> None:
        shelf = self._shelves[key]
        shelf.dialling -= 1
        if self._gone and not isinstance(link, str):
            link.abort(GONE)
            link = GONE
        if isinstance(link, str):
            served, shelf.waiting = shelf.waiting, []
            self._forget_if_empty(key, shelf)
        else:
            link.pooled = True
            shelf.links[link] = shelf.roomy[link] = None
            # The rest waits for the other dials, of which there are as many as they need.
            served, shelf.waiting = shelf.waiting[: self._max_streams], shelf.waiting[self._max_streams :]
        for number, on_link in enumerate(served):
            try:
                if isinstance(link, str) or number == 0 or link.usable:
                    on_link(link)
                else:
                    self.checkout(key, on_link)
            except Exception as exc:  # who fails with it must not keep the others waiting
                self._reactor.report(exc, f"who waited for a connection to {key.peer}")

    def _closed(self, key: PoolKey, link: L) -> None:
        shelf = self._shelves.get(key)
        if shelf is not None and link in shelf.links:
            del shelf.links[link]
            shelf.roomy.pop(link, None)
            self._forget_if_empty(key, shelf)

    def _forget_if_empty(self, key: PoolKey, shelf: _Shelf[L]) -> None:
        if not (shelf.links or shelf.waiting or shelf.dialling):
            self._shelves.pop(key, None)

    def _sweep_later(self) -> None:
        if self._sweeper is None:
            self._sweeper = self._reactor.call_later(self._sweep_every, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        now = self._reactor.now()
        for shelf in self._shelves.values():
            if any(link.active for link in shelf.links) or shelf.waiting:
                shelf.idle_since = None
            elif shelf.idle_since is None:
                shelf.idle_since = now
            elif now - shelf.idle_since >= self._sweep_every:
                for link in shelf.links:
                    link.close_gracefully()
        if self._shelves:
            self._sweep_later()


def _dial_nobody(key: PoolKey, on_link: object, on_closed: object) -> None:
    raise AssertionError("a pool that is gone dials")


def open_link(
    reactor: Reactor,
    connected_sock: socket.socket,
    context: SSL.Context,
    *,
    verify_peer: JudgePeer,
    on_link: OnLink[HboneLink],
    on_closed: Callable[[HboneLink], None],
) -> None:
    """What every `Dial` ends with: HBONE on a connected socket, which is the link's from now on."""
    link: HboneLink | None = None

    def ready(new: HboneLink) -> None:
        nonlocal link
        link = new
        on_link(new)

    def closed(because: str | None) -> None:
        if link is None:
            on_link(because or "connection closed by the peer")
        else:
            on_closed(link)

    connect_hbone(reactor, connected_sock, context, verify_peer=verify_peer, on_ready=ready, on_close=closed)


def dial_error(error: OSError) -> str:
    """ztunnel's words: the commonest cause of a silent HBONE port is a NetworkPolicy."""
    if isinstance(error, TimeoutError):
        return f"{TIMED_OUT}, maybe a NetworkPolicy is blocking HBONE port 15008: {error}"
    return f"{REFUSED}: {error}"


def is_unreachable(because: str) -> bool:
    """Whether a dial failed before anybody took the connection, by its reason: nothing was said about who the peer is."""
    return because.startswith((TIMED_OUT, REFUSED))
