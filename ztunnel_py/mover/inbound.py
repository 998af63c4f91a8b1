"""Ports 15008 and 15006: what comes to a captured pod, over HBONE or as plaintext.

The order is fixed: who calls, what do they want, may they, only then a connection to the application. `_dial_application` takes the
`Permit`: without one there is no connection.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from mesh.authz.evaluate import AppliedPolicies, Connection, Denial, Permit, authorize, is_undecided
from mesh.linux.sockets import local_address, original_destination
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.ports import RECURSIVE
from mesh.model.workload import Workload
from mesh.reactor.hbone import PROTOCOL_ERROR, HboneLink, Tunnel, TunnelRequest, serve_hbone
from mesh.reactor.relay import RelayResult, relay_tcp, relay_tunnel
from mesh.reactor.tcp import reset, socket_address
from mesh.state.inbound import InboundRefusal
from mesh.state.memo import Admission, AdmissionMemo
from mesh.telemetry.log import get_logger
from mesh.tls.peer import verify_client
from ztunnel_py.mover.credentials import Credentials
from ztunnel_py.mover.ledger import DRAINED, POLICY_CHANGED, Failure, Living
from ztunnel_py.mover.outbound import RECURSION
from ztunnel_py.mover.plane import POLICY_GRACE_SECONDS
from ztunnel_py.mover.pod import Dialling, Pod

REJECTED = "connection closed due to policy rejection: "

_log = get_logger("rbac")

Judgement: TypeAlias = tuple[AppliedPolicies, Permit | Denial]
"""The policies that were asked, and what they say."""


class InboundHbone:
    """One mutual TLS connection of a peer; each of its CONNECT streams becomes an `_InboundTunnel`."""

    def __init__(self, pod: Pod, sock: socket.socket, client: SocketAddress) -> None:
        self._pod = pod
        self._sock = sock
        self.client = client
        self.local = socket_address(sock.getsockname())
        self.told: str | None = None
        """The error in the last record of a tunnel: a connection that breaks with tunnels in it is told by theirs."""
        self._shown: SpiffeId | None = None
        self._link: HboneLink | None = None
        self._admissions: AdmissionMemo | None = None
        pod.plane.credentials.when_available(pod.identity(), self._serve)

    @property
    def peer(self) -> SpiffeId | None:
        """Who the peer has proved to be; None before the handshake's end, when it has only shown a certificate, as anybody may."""
        return self._shown if self._link is not None and self._link.peer_certificate is not None else None

    def _serve(self, credentials: Credentials | str) -> None:
        if isinstance(credentials, str) or self._pod.closed:
            reset(self._sock)
            self.refuse(credentials if isinstance(credentials, str) else DRAINED)
            return
        trust_domain = credentials.bundle.identity.trust_domain
        link = serve_hbone(
            self._pod.plane.reactor,
            self._sock,
            credentials.context,
            on_handshake=lambda der: self._verify(der, trust_domain),
            on_request=self._request,
            on_refused=lambda refused: self.refuse(refused.because),
            on_close=self._closed,
        )
        self._link = link
        self._pod.links.add(link)
        if self._pod.plane.shares is not None:
            self._pod.plane.shares.links.change(1)

    def judge(self, workload: Workload, request: TunnelRequest) -> Admission | InboundRefusal:
        """All that is to be decided about a request; made anew when anything in the mesh has changed."""
        if self._admissions is None:
            self._admissions = self._pod.plane.admissions.of(self.client.ip, self.peer, self.local.ip)
        return self._admissions.judge(workload, request.authority, request.headers.get("forwarded", ""))

    def _request(self, request: TunnelRequest) -> None:
        _InboundTunnel(self._pod, self, request)

    def _verify(self, der: bytes, trust_domain: str) -> str | None:
        result = verify_client(der, trust_domain)
        if isinstance(result, str):
            return result
        self._shown = result
        return None

    def _closed(self, because: str | None) -> None:
        if self._link is not None:
            self._pod.links.discard(self._link)
            if self._pod.plane.shares is not None:
                self._pod.plane.shares.links.change(-1)
        if because is not None and because != self.told and (self.peer is None or because.startswith(PROTOCOL_ERROR)):
            self.refuse(because)

    def refuse(self, because: str) -> None:
        """Log what was refused before a connection of the application was in question."""
        living = Living(self._pod.uid, "inbound", self.client, self.local, self._pod.plane.reactor.now(), source_identity=self.peer)
        self._pod.plane.ledger.refuse(living, because)


class _InboundTunnel:
    """One CONNECT stream, from its request to its record."""

    def __init__(self, pod: Pod, link: InboundHbone, request: TunnelRequest) -> None:
        self._pod = pod
        self._plane = pod.plane
        self._link = link
        self._request = request
        self._tunnel: Tunnel | None = None
        self._pending: Dialling | None = None
        self._admitted: tuple[int, Workload, Admission] | None = None
        """What was decided, at which version of the state and for which workload."""
        self._living = Living(pod.uid, "inbound", link.client, link.local, self._plane.reactor.now(), authority=request.authority)
        self._living.source_identity = link.peer
        self._living.relay_from = "upstream"
        self._living.stop = self._stop
        pod.when_workload_known(self._plane.ledger.guarded(self._living, self._resolve))

    def _resolve(self, workload: Workload | None) -> None:
        if workload is None:
            self._refuse(503, self._pod.unknown_workload())
            return
        admission = self._link.judge(workload, self._request)
        if isinstance(admission, InboundRefusal):
            self._refuse(admission.status, admission.because)
            return
        if admission.target.proxied is not None:
            self._refuse(503, "the application takes the PROXY protocol, which is not supported yet")
            return
        self._admitted = self._plane.state.version, workload, admission
        living = self._living
        living.target, living.target_identity = workload, workload.identity
        living.source, living.service = admission.source, admission.service
        _Entrance(self._pod, living, workload, admission.facts, self._judge, self._dial, self._deny).pass_through()

    def _judge(self, workload: Workload, facts: Connection) -> Judgement:
        if self._admitted is not None and self._admitted[0] == self._plane.state.version and self._admitted[1] is workload:
            return self._admitted[2].applied, self._admitted[2].verdict
        admission = self._link.judge(workload, self._request)
        # A change that came while it waited may have given the request another meaning than the one that was entered.
        if isinstance(admission, Admission) and admission.facts == facts:
            return admission.applied, admission.verdict
        return _judge(self._pod, workload, facts)

    def _dial(self, permit: Permit) -> None:
        if not self._request.alive:
            self._fail(Failure("the peer withdrew its request"))
            return
        self._request.on_gone = lambda because: self._fail(Failure(because))
        self._pending = _dial_application(self._pod, permit, self._plane.ledger.guarded(self._living, self._dialled))

    def _dialled(self, upstream: socket.socket | OSError) -> None:
        self._pending = self._request.on_gone = None
        if isinstance(upstream, OSError):
            self._request.refuse(503)
            self._plane.ledger.finish(self._living, failure=Failure(f"connection failed: {upstream}"))
            return
        workload = self._living.target
        assert workload is not None
        tunnel = self._tunnel = self._request.accept({"baggage": self._pod.baggage(workload)})
        self._living.relay = relay_tunnel(self._plane.reactor, upstream, tunnel, self._done, sock_is="upstream")

    def _done(self, result: RelayResult) -> None:
        self._link.told = result.error
        self._plane.ledger.finish(self._living, result)

    def _stop(self, because: str) -> None:
        """Ended from our side before the relay ran."""
        if self._tunnel is not None:
            self._tunnel.reset(reason=because)
        else:
            self._request.refuse(401 if because == POLICY_CHANGED else 503)
        self._fail(Failure(because))

    def _fail(self, failure: Failure) -> None:
        self._link.told = failure.because
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self._plane.ledger.finish(self._living, failure=failure)

    def _deny(self, because: str) -> None:
        self._request.refuse(401)
        self._plane.ledger.finish(self._living, failure=Failure(REJECTED + because, "DENY"))

    def _refuse(self, status: int, because: str) -> None:
        self._request.refuse(status)
        self._plane.ledger.refuse(self._living, because)


class InboundPlaintext:
    """One plaintext connection to the pod: policy without an identity, then the application as its client meant it."""

    def __init__(self, pod: Pod, sock: socket.socket, client: SocketAddress) -> None:
        self._pod = pod
        self._plane = pod.plane
        self._sock = sock
        self._pending: Dialling | None = None
        target = original_destination(sock)
        self._target = target if target is not None else local_address(sock)
        self._living = Living(pod.uid, "inbound", client, self._target, self._plane.reactor.now())
        self._living.stop = self._stop
        if target is None or target.port in RECURSIVE:
            self._refuse(RECURSION)
        else:
            pod.when_workload_known(self._plane.ledger.guarded(self._living, self._resolve))

    def _resolve(self, workload: Workload | None) -> None:
        if workload is None:
            self._refuse(self._pod.unknown_workload())
            return
        living = self._living
        living.target = workload
        living.source = self._plane.state.find_workload_of_peer(living.client.ip, workload.network, None)
        living.service = self._plane.state.find_destination_service(workload, self._target.port, None)
        facts = Connection(living.client.ip, None, self._target)
        _Entrance(self._pod, living, workload, facts, partial(_judge, self._pod), self._dial, self._deny).pass_through()

    def _dial(self, permit: Permit) -> None:
        self._pending = _dial_application(self._pod, permit, self._plane.ledger.guarded(self._living, self._dialled))

    def _dialled(self, upstream: socket.socket | OSError) -> None:
        self._pending = None
        if isinstance(upstream, OSError):
            self._end(Failure(f"connection failed: {upstream}"))
        else:
            self._living.relay = relay_tcp(self._plane.reactor, self._sock, upstream, self._done)

    def _done(self, result: RelayResult) -> None:
        self._plane.ledger.finish(self._living, result)

    def _stop(self, because: str) -> None:
        self._end(Failure(because))

    def _deny(self, because: str) -> None:
        self._end(Failure(REJECTED + because, "DENY"))

    def _end(self, failure: Failure) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        reset(self._sock)
        self._plane.ledger.finish(self._living, failure=failure)

    def _refuse(self, because: str) -> None:
        reset(self._sock)
        self._plane.ledger.refuse(self._living, because)


class _Entrance:
    """A connection is entered, then policy is asked, and again while it is undecided. No function within another: one that names itself is
    a cycle, and every connection would leave one to the garbage collector."""

    __slots__ = ("_deadline", "_denied", "_facts", "_judge", "_living", "_permitted", "_pod", "_workload")

    def __init__(
        self,
        pod: Pod,
        living: Living,
        workload: Workload,
        facts: Connection,
        judge: Callable[[Workload, Connection], Judgement],
        permitted: Callable[[Permit], None],
        denied: Callable[[str], None],
    ) -> None:
        self._pod = pod
        self._living = living
        self._workload = workload
        self._facts = facts
        self._judge = judge
        self._permitted = permitted
        self._denied = denied
        self._deadline: float | None = None

    def pass_through(self) -> None:
        """Enter, then ask: in this order no change of policy can slip between."""
        self._living.facts = self._facts
        self._pod.plane.ledger.open(self._living)
        self._ask()

    def _ask(self) -> None:
        living = self._living
        if living.ended_by is not None:
            return
        applied, verdict = self._judge(self._pod.find_workload() or self._workload, self._facts)
        if is_undecided(applied, verdict):
            now = self._pod.plane.reactor.now()
            if self._deadline is None:
                self._deadline = now + POLICY_GRACE_SECONDS
            if now < self._deadline:
                self._pod.plane.policies_awaited.wait(None, self._deadline - now, self._ask, self._ask)
                return
        living.applied, living.verdict = applied, verdict
        for dry_run in verdict.dry_run:
            _log.info("dry-run", src=str(living.client), dst=str(living.destination), verdict=str(dry_run))
        match verdict:
            case Permit():
                self._permitted(verdict)
            case Denial():
                self._denied(verdict.because)


def _judge(pod: Pod, workload: Workload, facts: Connection) -> Judgement:
    applied = pod.plane.state.policies_for(workload)
    return applied, authorize(applied, facts)


def _dial_application(pod: Pod, permit: Permit, on_done: Callable[[socket.socket | OSError], None]) -> Dialling:
    """Connect to the application as its client. The permit is the authority to do so, and says where to."""
    return pod.dial(permit.connection.destination, on_done, source=permit.connection.source_ip)
