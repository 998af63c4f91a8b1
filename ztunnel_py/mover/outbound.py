"""Port 15001: what a captured application dialled, to HBONE or plain TCP."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mesh.linux.sockets import local_address, original_destination
from mesh.model.address import GatewayAddress, SocketAddress
from mesh.model.ports import RECURSIVE
from mesh.model.route import Direct, Refusal, Route, Tunnel
from mesh.model.workload import Workload
from mesh.reactor.hbone import HboneLink, OnResponse, TunnelFailure
from mesh.reactor.hbone import Tunnel as OpenTunnel
from mesh.reactor.pool import REFUSED, is_unreachable
from mesh.reactor.relay import RelayResult, relay_tcp, relay_tunnel
from mesh.reactor.tcp import reset
from mesh.wire.forwarded import write_forwarded
from mesh.wire.traceparent import new_traceparent
from ztunnel_py.mover.ledger import Failure, Living
from ztunnel_py.mover.pod import Dialling, Pod

MOST_RETRIES = 3
"""A peer's agent may have several movers that die at once, and each has pooled connections of which one hears one after the other."""
MOST_ENDPOINTS = 3
"""Endpoints of one service that a connection is tried at: the control plane may not have been able yet to say that one has ended."""
LOOK_AGAIN_SECONDS: Final = 0.1
"""Between looks at a waypoint that is waited for (`missed`)."""
RECURSION = "attempted recursive call to ourselves"


class Outbound:
    """One connection of the application, from its accept to its record. Methods are its steps, in order."""

    def __init__(self, pod: Pod, sock: socket.socket, client: SocketAddress) -> None:
        self._pod = pod
        self._plane = pod.plane
        self._sock = sock
        self._retries = 0
        self._pending: Dialling | None = None
        self._unreachable: frozenset[str] = frozenset()
        self._waypoint: GatewayAddress | None = None
        """The one that it is to pass."""
        self._waits = False
        target = original_destination(sock)
        self._target = target if target is not None else client
        self._living = self._begin(client)
        self._guarded = self._plane.ledger.guarded
        # Nothing redirects what the pod sends to its own addresses: to our port there, it is for nobody else. Dialled, it would come back
        # for ever, with two more descriptors each time.
        if target is None or (target.port in RECURSIVE and (target.ip.is_loopback or target == local_address(sock))):
            self._refuse(RECURSION)
        else:
            pod.when_workload_known(self._guarded(self._living, self._route))

    def _begin(self, client: SocketAddress) -> Living:
        living = Living(self._pod.uid, "outbound", client, self._target, self._plane.reactor.now())
        living.stop = lambda because: self._fail(Failure(because))
        return living

    def _route(self, workload: Workload | None) -> None:
        if workload is None:
            self._refuse(self._pod.unknown_workload())
        else:
            self._follow(self._plane.routes.resolve(workload, self._target, self._plane.rng), workload)

    def _follow(self, route: Route, workload: Workload) -> None:
        living = self._living
        living.source = workload
        living.because = f"{route.because}; it was waited for" if self._waits else route.because
        living.service = route.service
        self._waypoint = None if isinstance(route, Direct) else route.waypoint
        match route:
            case Refusal():
                self._wait_or(lambda: self._refuse(route.because))
            case Direct():
                living.destination, living.target = route.next_hop, route.workload
                self._plane.ledger.open(living)
                self._pending = self._pod.dial(route.next_hop, self._guarded(living, self._connected_plain))
            case Tunnel():
                living.destination, living.target, living.authority = route.next_hop, route.workload, route.authority
                living.source_identity = workload.identity
                living.target_identity = route.workload.identity
                self._plane.ledger.open(living)
                self._checkout(route, workload)

    # Plain TCP

    def _connected_plain(self, upstream: socket.socket | OSError) -> None:
        self._pending = None
        if isinstance(upstream, OSError):
            self._fail_or_go_elsewhere(Failure(f"{REFUSED}: {upstream}"))
        else:
            self._living.relay = relay_tcp(self._plane.reactor, self._sock, upstream, self._done)

    # HBONE

    def _checkout(self, route: Tunnel, workload: Workload) -> None:
        key = self._pod.pool_key(route, workload, self._living.client.ip)
        self._pod.pool.checkout(key, self._guarded(self._living, lambda link: self._open_tunnel(link, route, workload)))

    def _open_tunnel(self, link: HboneLink | str, route: Tunnel, workload: Workload) -> None:
        if self._living.ended_by is not None:
            return
        if isinstance(link, str):
            self._fail_or_go_elsewhere(Failure(link, flag_of(link)))
            return
        if self._waypoint is not None:
            self._plane.missed.reach(self._waypoint)
        headers = {
            "baggage": self._pod.baggage(workload),
            "forwarded": write_forwarded(self._living.client, route.service.hostname if route.service is not None else None),
            "traceparent": new_traceparent(self._plane.rng),
        }
        answered: OnResponse = self._guarded(self._living, lambda answer: self._answered(answer, route, workload))
        link.open_tunnel(route.authority, headers, answered)

    def _answered(self, answer: OpenTunnel | TunnelFailure, route: Tunnel, workload: Workload) -> None:
        if self._living.ended_by is not None:
            if isinstance(answer, OpenTunnel):
                answer.reset()
        elif isinstance(answer, OpenTunnel):
            self._living.relay = relay_tunnel(self._plane.reactor, self._sock, answer, self._done)
        elif answer.retryable and self._retries < MOST_RETRIES:
            # The pooled connection died, or went away, before the peer answered: nothing of the application's is lost yet.
            self._retries += 1
            self._checkout(route, workload)
        else:
            self._fail(Failure(answer.because, "DENY" if answer.status == 401 else "CONNECT"))

    # Ends

    def _fail_or_go_elsewhere(self, failure: Failure) -> None:
        """No connection came about. If nobody was there, the service may have another endpoint, or the waypoint another pod.

        ztunnel fails here. Nothing of the application's was sent yet, and it has heard nothing but that its connection is open; every
        endpoint tried leaves a record of its own.
        """
        living = self._living
        source, tried = living.source, living.target
        if source is None or tried is None or self._pod.closed or not is_unreachable(failure.because):
            self._fail(failure)
            return
        self._unreachable |= {tried.uid}
        route = self._plane.routes.resolve(source, self._target, self._plane.rng, self._unreachable)
        other = None if isinstance(route, Refusal) else route.workload
        if other is None or other.uid in self._unreachable or len(self._unreachable) == MOST_ENDPOINTS:
            self._wait_or(lambda: self._fail(failure))
            return
        self._plane.ledger.finish(living, failure=Failure(f"{failure.because}; another endpoint is tried", failure.flags))
        self._living = self._begin(living.client)
        self._follow(replace(route, because=f"{route.because}; {len(self._unreachable)} not reached before"), source)

    def _wait_or(self, give_up: Callable[[], None]) -> None:
        """Look again in a moment, if a waypoint is missed for a short time only."""
        plane, waypoint = self._plane, self._waypoint
        now = plane.reactor.now()
        if waypoint is None or self._pod.closed or now >= plane.missed.miss(waypoint, now):
            give_up()
            return
        self._waits = True
        again: Callable[[None], None] = self._guarded(self._living, lambda _: self._look_again())
        self._pending = Dialling(plane.reactor.call_later(LOOK_AGAIN_SECONDS, lambda: again(None)))

    def _look_again(self) -> None:
        self._pending = None
        self._unreachable = frozenset()
        living, source = self._living, self._living.source
        assert source is not None  # it had a route
        route = self._plane.routes.resolve(source, self._target, self._plane.rng)
        if living.ends is not None:  # entered, for an instance that did not answer
            if isinstance(route, Tunnel) and living.target is not None and route.workload.uid == living.target.uid:
                living.because = f"{route.because}; it was waited for"
                self._checkout(route, source)
                return
            self._plane.ledger.finish(living, failure=Failure(f"{REFUSED}: another instance of the waypoint is waited for"))
            self._living = self._begin(living.client)
        self._follow(route, source)

    def _done(self, result: RelayResult) -> None:
        self._plane.ledger.finish(self._living, result)

    def _fail(self, failure: Failure) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        reset(self._sock)
        self._plane.ledger.finish(self._living, failure=failure)

    def _refuse(self, because: str) -> None:
        self._pending = None
        reset(self._sock)
        self._plane.ledger.refuse(self._living, because)


def flag_of(because: str) -> str:
    """The response flag of a failed dial, from the reason's first words."""
    return next((flag for words, flag in _FLAGS if because.startswith(words)), "CONNECT")


_FLAGS: tuple[tuple[str, str], ...] = (
    ("connection timed out, maybe a NetworkPolicy", "NETWORK_POLICY"),
    ("identity error", "IDENTITY_ERROR"),
    ("tls ", "TLS_FAILURE"),
    ("h2 ", "H2_HANDSHAKE_FAILURE"),
    ("http2 ", "H2_HANDSHAKE_FAILURE"),
)
