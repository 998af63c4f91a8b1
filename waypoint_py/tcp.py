"""A connection whose bytes mean nothing to us: judged, shared out by weight, carried in both directions, and told of once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from mesh.model.l7.routing import Destination, TcpRoute, WeightedDestination
from mesh.reactor.loop import Timer
from waypoint_py.attempt import direct_endpoint
from waypoint_py.client_hello import ServerName
from waypoint_py.context import Connection
from waypoint_py.observer import ConnectionRecord
from waypoint_py.plane import Plane
from waypoint_py.policy.authorize import Judgement
from waypoint_py.replies import flag_of_failure
from waypoint_py.stream import HIGH_WATER, ByteStream
from waypoint_py.upstream.balancer import NoEndpoint, Wish
from waypoint_py.upstream.outlier import LocalOutcome
from waypoint_py.upstream.session import Cancel, Endpoint, UpstreamFailure
from waypoint_py.verdict import Flag, LocalReply

EARLY_AT_MOST: Final = HIGH_WATER
"""Bytes of a client that are kept until its connection to the application stands."""
MOST_TRIES: Final = 3
"""Endpoints that are dialled for one connection, where one refuses (Envoy's ``max_connect_attempts`` is 1, Istio's ten)."""


class TcpProxy:
    """One connection. ``route``: where it goes; None: to the workload that it was addressed to. ``early``: what the client has said by now;
    ``sni``: whom it asked for, if that was TLS; ``declared``: its port is meant for what is no HTTP."""

    def __init__(
        self,
        plane: Plane,
        stream: ByteStream,
        facts: Connection,
        route: TcpRoute | None,
        *,
        early: bytes,
        sni: ServerName,
        declared: bool,
        on_gone: Callable[[], None],
    ) -> None:
        self._plane = plane
        self._facts = facts
        self._route = route
        self._early = early
        self._sni = sni
        self._declared = declared
        self._on_gone = on_gone
        self._client = stream
        self._record = ConnectionRecord(facts, plane.local, plane.wall(), plane.reactor.now())
        self._record.server_name = sni if isinstance(sni, str) else None
        self._down = _Side(self, stream)
        self._up: _Side | None = None
        self._destination: Destination | None = None
        self._endpoint: Endpoint | None = None
        self._tried: list[str] = []
        self._dialling: Cancel | None = None
        self._parked: Cancel | None = None
        self._idle: Timer | None = None
        self._limit: Timer | None = None
        self._moved = plane.reactor.now()
        self._over = False

    def start(self) -> None:
        """Judge it, then dial. The client is heard meanwhile, up to a bound."""
        plane, facts = self._plane, self._facts
        plane.observer.connection_opened(self._record)
        self._client.attach(self._down)
        self._down.hold(self._early)
        asked = plane.store.judge_of(facts.service_key).find_connection_authorizer(facts, self._sni, declared=self._declared)
        if isinstance(asked, Judgement):
            self._record.judged(asked)
            self._refuse(asked.reply)
        elif asked is not None:
            self._parked = plane.waits.wait(plane.ext_authz.ask_connection(asked, facts).run, self._refuse, self._crashed)
        else:
            self._judge()

    def _refuse(self, reply: LocalReply | None) -> None:
        """What a CUSTOM policy came to; None: it lets through."""
        self._parked = None
        if self._over:
            return
        if reply is None:
            self._judge()
            return
        self._record.add_flags(*reply.flags)
        self._record.details, self._record.policy = reply.details, reply.policy
        self._end(reply.because)

    def _crashed(self, error: Exception) -> None:
        """A defect of ours, and so no leave to go on."""
        self._end(f"internal error: {error!r}")

    def _judge(self) -> None:
        judgement = self._plane.store.judge_of(self._facts.service_key).judge_connection(self._facts, self._sni)
        self._record.judged(judgement)
        if judgement.reply is not None:
            self._refuse(judgement.reply)
        else:
            self._share_out()

    def _share_out(self) -> None:
        if self._route is not None:
            chosen = pick(self._route, self._plane.rng)
            if isinstance(chosen, str):
                self._record.add_flags(Flag.NO_CLUSTER_FOUND)
                self._end(chosen)
                return
            self._destination = self._record.destination = chosen.destination
        self._dial()

    def abort(self, reason: str) -> None:
        """Cut it off in both directions."""
        self._end(reason)

    # --- upstream

    def _dial(self) -> None:
        plane, facts = self._plane, self._facts
        if self._destination is None:
            endpoint: Endpoint | NoEndpoint = direct_endpoint(facts)
        else:
            affinity = plane.balancer.find_affinity(self._destination, None, facts.peer_address)
            endpoint = plane.balancer.choose(self._destination, Wish(affinity, facts.destination.ip, self._tried), plane.reactor.now())
        if isinstance(endpoint, NoEndpoint):
            self._record.add_flags(Flag.NO_HEALTHY_UPSTREAM if endpoint.known else Flag.NO_CLUSTER_FOUND)
            self._end(endpoint.because)
            return
        self._endpoint = self._record.upstream = endpoint
        self._tried.append(endpoint.key)
        plane.balancer.began(endpoint)
        self._dialling = plane.connections.connect(endpoint, self._dialled, client=facts)

    def _dialled(self, upstream: ByteStream | UpstreamFailure) -> None:
        self._dialling = None
        endpoint = self._endpoint
        if self._over or endpoint is None:
            if not isinstance(upstream, UpstreamFailure):
                upstream.abort("the client is gone")
            return
        plane, now = self._plane, self._plane.reactor.now()
        if isinstance(upstream, UpstreamFailure):
            plane.balancer.ended(endpoint)
            self._endpoint = None
            plane.balancer.happened_here(endpoint, LocalOutcome.FAILED, now)
            if self._destination is not None and len(self._tried) < MOST_TRIES:
                self._dial()
                return
            self._record.add_flags(flag_of_failure(upstream))
            self._record.transport_failure = upstream.transport
            self._end(upstream.because)
            return
        plane.balancer.happened_here(endpoint, LocalOutcome.CONNECTED, now)
        self._record.upstream_local_address = upstream.local_address
        self._up = _Side(self, upstream)
        self._down.connect(self._up)
        self._up.connect(self._down)
        upstream.attach(self._up)
        pool = endpoint.policy.pool
        if pool.tcp_idle_timeout:
            self._moved = now
            self._idle = plane.reactor.call_later(pool.tcp_idle_timeout, lambda: self._on_idle(pool.tcp_idle_timeout))
        if pool.max_connection_duration:
            self._limit = plane.reactor.call_later(
                pool.max_connection_duration, lambda: self._end(f"the connection was {pool.max_connection_duration:g} s old")
            )

    def _on_idle(self, seconds: float) -> None:
        left = self._moved + seconds - self._plane.reactor.now()
        if left > 0:
            self._idle = self._plane.reactor.call_later(left, lambda: self._on_idle(seconds))
        else:
            self._end(f"nothing moved for {seconds:g} s")

    # --- what the sides say

    def moved(self, side: _Side, size: int) -> None:
        self._moved = self._plane.reactor.now()
        if side is self._down:
            self._record.bytes_received += size
        else:
            self._record.bytes_sent += size

    def side_closed(self, side: _Side, reason: str | None) -> None:
        """One stream is gone. Properly: when it is the second, all is well."""
        if self._over:
            return
        if reason is not None:
            if side is self._down:
                self._record.add_flags(Flag.DOWNSTREAM_CONNECTION_TERMINATION)
            else:
                self._record.add_flags(Flag.UPSTREAM_CONNECTION_TERMINATION)
            self._end(reason)
        elif self._up is None or (self._down.gone and self._up.gone):
            self._end(None)

    def _end(self, reason: str | None) -> None:
        """Once; ``reason`` None: both had said all they had to say."""
        if self._over:
            return
        self._over = True
        plane, record = self._plane, self._record
        for timer in (self._idle, self._limit):
            if timer is not None:
                timer.cancel()
        for waiting in (self._dialling, self._parked):
            if waiting is not None:
                waiting.cancel()
        if reason is not None:
            record.because = reason
            self._client.abort(reason)
            if self._up is not None:
                self._up.stream.abort(reason)
        if self._endpoint is not None:
            plane.balancer.ended(self._endpoint)
        record.ended = plane.reactor.now()
        try:
            plane.observer.connection_closed(record)
        except Exception as exc:  # who is told must not harm what is told of
            plane.reactor.report(exc, "the record of a connection")
        self._on_gone()


class _Side:
    """A `Sink` at one end: what comes here goes to the other end, which holds it back when it has enough."""

    def __init__(self, proxy: TcpProxy, stream: ByteStream) -> None:
        self._proxy = proxy
        self.stream = stream
        self.gone = False
        self._other: _Side | None = None
        self._held = bytearray()
        self._has_ended = False
        self._paused = False

    def hold(self, data: bytes) -> None:
        """Bytes that came before anybody asked."""
        self._held += data

    def connect(self, other: _Side) -> None:
        """From now on both ends stand."""
        self._other = other
        if self._held:
            held, self._held = self._held, bytearray()
            self._pass(held)
        if self._has_ended:
            other.stream.end()
        if self._paused and other.stream.unsent <= HIGH_WATER:
            self._paused = False
            self.stream.resume()

    def data(self, data: memoryview) -> None:
        if self._other is None:
            self._held += data
            if len(self._held) > EARLY_AT_MOST and not self._paused:
                self._paused = True
                self.stream.pause()
            return
        self._pass(data)

    def _pass(self, data: bytes | bytearray | memoryview) -> None:
        other = self._other
        assert other is not None  # connected
        self._proxy.moved(self, len(data))
        other.stream.write(data)
        if other.stream.unsent > HIGH_WATER and not self._paused:
            self._paused = True
            self.stream.pause()

    def ended(self) -> None:
        self._has_ended = True
        if self._other is not None:
            self._other.stream.end()

    def drained(self) -> None:
        other = self._other
        if other is not None and other._paused:
            other._paused = False
            other.stream.resume()

    def closed(self, reason: str | None) -> None:
        self.gone = True
        self._proxy.side_closed(self, reason)


def pick(route: TcpRoute, rng: random.Random) -> WeightedDestination | str:
    """One of the destinations by weight, or why there is none."""
    shares = [each for each in route.destinations if each.weight > 0]
    if not shares:
        return f"{route.origin} has no destination with a share"
    chosen = rng.choices(shares, [each.weight for each in shares])[0]
    if chosen.fails_with is not None:
        return f"{route.origin}: {chosen.because or 'its destination cannot be used'}"
    return chosen
