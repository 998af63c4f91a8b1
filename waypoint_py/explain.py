"""Why a request would go where: every decision that would be made about it now, in order, with its reason. Nothing is sent.

The same functions decide that decide about real requests, so that explanation and behaviour cannot differ.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from mesh.http.message import Headers, Request
from mesh.http.path import BadPath, normalise
from mesh.model.address import InvalidAddress, NetworkAddress, SocketAddress
from mesh.model.identity import InvalidSpiffeId, SpiffeId
from mesh.model.l7.policy import AuthorizationPolicy, PolicyAction
from mesh.model.l7.routing import Destination, Fault, Forward, Retry
from mesh.state.store import MeshState
from mesh.wire.authority import Authority, parse_authority
from mesh.wire.errors import RemoteProtocolError
from waypoint_py.admission import Ourselves, Refused, ToService, ToWorkload, admit
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import Consultation, Judge
from waypoint_py.policy.facts import TokenFacts
from waypoint_py.policy.tokens import Passed, Wanted
from waypoint_py.preparation import prepare
from waypoint_py.routing.actions import CompiledDestination, answer
from waypoint_py.store import PortRuntime, Store
from waypoint_py.tcp import pick
from waypoint_py.upstream.balancer import Balancer, NoEndpoint, Wish

Json: TypeAlias = dict[str, Any]


class InvalidQuestion(ValueError):
    """The question is none; the text says what was expected."""


_PARAMETERS: Final = frozenset({"destination", "peer", "peer_address", "method", "path", "authority"})
_HEADER: Final = "header."


@dataclass(frozen=True, slots=True)
class Question:
    """A request as a client would send it. ``peer``: who; ``peer_address``: from where."""

    target: Authority
    peer: SpiffeId
    peer_address: SocketAddress
    request: Request

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> Question:
        """Of ``destination``, ``peer`` and optionally ``peer_address``, ``method``, ``path``, ``authority``, ``header.NAME``.
        Raises InvalidQuestion, also of what is none of these: left out, it would be answered for another request than was meant."""
        for name in query:
            if name not in _PARAMETERS and not name.startswith(_HEADER):
                raise InvalidQuestion(f"{name}: no such parameter")
        try:
            target = parse_authority(query.get("destination", ""))
            peer = SpiffeId.parse(query.get("peer", ""))
            address = SocketAddress.parse(query.get("peer_address", "192.0.2.1:1"))
        except RemoteProtocolError as exc:
            raise InvalidQuestion(f"destination: {exc.reason}") from exc
        except InvalidSpiffeId as exc:
            raise InvalidQuestion(f"peer: {exc}") from exc
        except InvalidAddress as exc:
            raise InvalidQuestion(f"peer_address: {exc}") from exc
        headers: Headers = [
            (name.removeprefix(_HEADER).lower().encode(), value.encode()) for name, value in query.items() if name.startswith(_HEADER)
        ]
        request = Request(
            query.get("method", "GET").encode(),
            b"http",
            query.get("authority", str(target)).encode(),
            query.get("path", "/").encode(),
            headers,
        )
        return cls(target, peer, address, request)


class Explainer:
    """Of one waypoint."""

    def __init__(self, state: MeshState, store: Store, us: Ourselves, identity: SpiffeId, balancer: Balancer, now: float) -> None:
        self._state = state
        self._store = store
        self._us = us
        self._identity = identity
        self._balancer = balancer
        self._now = now
        self._steps: list[Json] = []

    def explain(self, question: Question) -> Json:
        """``steps`` in order, and the ``outcome`` in a sentence."""
        outcome = self._explain(question)
        return {"outcome": outcome, "steps": self._steps}

    def _note(self, step: str, because: str, **more: object) -> None:
        self._steps.append({"step": step, "because": because, **{key: value for key, value in more.items() if value not in (None, "")}})

    def _explain(self, question: Question) -> str:
        settings = self._store.settings
        domains = settings.trust_domains or (self._identity.trust_domain,)
        if question.peer.trust_domain not in domains:
            self._note("connection", f"{question.peer} is of no trust domain of the mesh")
            return "the connection is refused within TLS"
        admitted = admit(self._state, self._us, self._store.charge, question.peer.namespace, question.target)
        match admitted:
            case Refused(status, because):
                self._note("CONNECT", because, status=status)
                return f"CONNECT is answered {status}"
            case ToWorkload(workload, destination):
                self._note("CONNECT", f"{destination} is workload {workload.namespace}/{workload.name}, which has this waypoint")
                facts = self._facts(question, destination, admitted)
                return self._http(question.request, facts, None)
            case ToService(service, destination):
                self._note("CONNECT", f"{destination} is service {service.key}, which has this waypoint")
                port = self._store.find_port(str(service.key), destination.port)
                if port is None:
                    self._note("configuration", f"nothing is configured for {service.key} port {destination.port}")
                    return "CONNECT is answered 503"
                facts = self._facts(question, destination, admitted)
                self._note("protocol", f"port {destination.port} is declared as {port.config.protocol.value}")
                if port.config.protocol.value == "tcp":
                    return self._tcp(facts, port)
                return self._http(question.request, facts, port)

    def _facts(self, question: Question, destination: SocketAddress, admitted: ToService | ToWorkload) -> Connection:
        workload = self._state.find_workload_of_peer(question.peer_address.ip, self._us.network, question.peer)
        if workload is None:
            address = NetworkAddress(self._us.network, question.peer_address.ip)
            workload = self._state.find_workload_at(address)
        service = admitted.service if isinstance(admitted, ToService) else None
        target = admitted.workload if isinstance(admitted, ToWorkload) else None
        return Connection(question.peer, question.peer_address, destination, service, target, workload)

    def _tcp(self, facts: Connection, port: PortRuntime) -> str:
        judgement = self._store.judge_of(facts.service_key).judge_connection(facts)
        self._note("authorization", judgement.because, policies=self._verdicts(None, facts, None), policy=judgement.policy)
        if judgement.reply is not None:
            return "the connection is reset: policy"
        chosen = pick(port.tcp, random.Random())
        if isinstance(chosen, str):
            self._note("route", chosen)
            return "the connection is reset: no destination"
        self._note(
            "route", str(port.tcp.origin), destinations=[describe_share(each.destination, each.weight) for each in port.tcp.destinations]
        )
        return f"carried to one of {len(port.tcp.destinations)} destinations"

    def _http(self, request: Request, facts: Connection, port: PortRuntime | None) -> str:
        settings = self._store.settings
        path = normalise(request.path, settings.path_normalization)
        if isinstance(path, BadPath):
            self._note("path", path.reason)
            return "answered 400"
        self._note("path", f"normalised by {settings.path_normalization.value}", path=path.decode("utf-8", "replace"))
        request.path = path
        prepare(request, peer=facts.peer, us=self._identity, include_identity=settings.include_client_identity, rng=random.Random())
        return self._judge(request, facts) or self._route(request, facts, port)

    def _judge(self, request: Request, facts: Connection) -> str | None:
        """None: it is let through."""
        judge = self._store.judge_of(facts.service_key)
        asked = judge.find_authorizer(request, facts)
        if isinstance(asked, Consultation):
            self._note("custom", asked.because, policy=asked.policy)
        elif asked is not None and asked.reply is not None:
            self._note("custom", asked.because, policy=asked.policy)
            return f"answered {asked.reply.status}: policy"
        checker = self._store.checker_of(facts.service_key)
        claims: TokenFacts | None = None
        if not checker.idle:
            checked = checker.check(request, time.time())
            if isinstance(checked, Wanted):
                self._note("token", f"keys of {checked.rule.issuer} would have to be fetched first")
                return None
            if not isinstance(checked, Passed):
                self._note("token", checked.reply.because)
                return f"answered {checked.reply.status}: token"
            claims = checked.facts
            checked.changes.apply(request)
            self._note("token", f"proves {claims.principal}" if claims is not None else "there is none")
        judgement = judge.judge(request, facts, claims)
        self._note("authorization", judgement.because, policies=self._verdicts(request, facts, claims), policy=judgement.policy)
        return f"answered {judgement.reply.status}: policy" if judgement.reply is not None else None

    def _verdicts(self, request: Request | None, facts: Connection, claims: TokenFacts | None) -> list[Json]:
        """Each policy by itself."""
        return [self._verdict(policy, request, facts, claims) for policy in self._store.policies_for(facts.service_key)]

    def _verdict(self, policy: AuthorizationPolicy, request: Request | None, facts: Connection, claims: TokenFacts | None) -> Json:
        alone = Judge([policy])
        judgement = alone.judge(request, facts, claims) if request is not None else alone.judge_connection(facts)
        if policy.action is PolicyAction.CUSTOM:
            asked = alone.find_authorizer(request, facts) if request is not None else alone.find_connection_authorizer(facts)
            matched, because = asked is not None, asked.because if asked is not None else "no rule matches"
        elif policy.dry_run:
            matched = bool(judgement.dry_run)
            because = "; ".join(verdict.because for verdict in judgement.dry_run) or "no rule matches"
        elif policy.action is PolicyAction.AUDIT:
            matched, because = bool(judgement.audited), ", ".join(judgement.audited) or "no rule matches"
        elif policy.action is PolicyAction.DENY:
            matched, because = judgement.reply is not None, judgement.because if judgement.reply is not None else "no rule matches"
        else:
            matched, because = judgement.reply is None, judgement.because if judgement.reply is None else "no rule matches"
        return {
            "policy": str(policy.origin),
            "action": policy.action.value,
            "matches": matched,
            "because": because,
            **({"dryRun": True} if policy.dry_run else {}),
            **({"unreadable": policy.unreadable} if policy.unreadable else {}),
        }

    def _route(self, request: Request, facts: Connection, port: PortRuntime | None) -> str:
        if port is None:
            self._note("route", "traffic to a workload has no routes")
            return f"sent to {facts.destination}"
        matched = port.routes.find(request, port.config.port)
        if matched is None:
            self._note("route", f"none of {port.routes.size} routes matches")
            return "answered 404: no route"
        self._note("route", matched.because, name=matched.name)
        route = matched.route.route
        for feature, words in (
            ("fault", _say_fault(route.fault)),
            ("timeout", f"{route.timeout:g} s" if route.timeout is not None else ""),
            ("retry", _say_retry(route.retry)),
        ):
            if words:
                self._note(feature, words)
        own = answer(matched.route, request, matched.path, facts.destination.port)
        if own is not None:
            self._note("action", own.because, status=own.status)
            return f"answered {own.status} by the route"
        if not isinstance(route.action, Forward) or matched.route.weights is None:
            self._note("action", "no destination has a share")
            return "answered by the route: no destination"
        endpoints = [self._endpoint(destination, facts) for destination in matched.route.weights.destinations]
        self._note("destinations", f"{len(endpoints)} with a share", destinations=endpoints)
        return _say_outcome(endpoints)

    def _endpoint(self, destination: CompiledDestination, facts: Connection) -> Json:
        to = destination.to.destination.at(facts.destination.port)
        shown = describe_share(to, destination.to.weight)
        if destination.to.fails_with is not None:
            return {**shown, "because": destination.to.because or "it cannot be used", "status": destination.to.fails_with}
        found = self._balancer.choose(to, Wish(like=facts.destination.ip), self._now)
        if isinstance(found, NoEndpoint):
            return {**shown, "because": found.because, "status": 503}
        return {**shown, "endpoint": found.key, "because": found.because}


def describe_share(to: Destination, weight: int) -> Json:
    subset = f" subset {to.subset}" if to.subset else ""
    return {"destination": f"{to.namespace}/{to.hostname}:{to.port}{subset}", "weight": weight}


def _say_outcome(shares: list[Json]) -> str:
    """``shares``: the destinations, of which those that serve nobody have the ``status`` that a request gets there."""
    failing = [share for share in shares if "status" in share]
    if not failing:
        return "forwarded" if len(shares) > 1 else f"forwarded: {shares[0]['endpoint']}"
    statuses = " or ".join(str(status) for status in sorted({share["status"] for share in failing}))
    because = "; ".join(dict.fromkeys(share["because"] for share in failing))
    if len(failing) == len(shares):
        return f"answered {statuses}: {because}"
    weight, total = sum(share["weight"] for share in failing), sum(share["weight"] for share in shares)
    return f"forwarded, but {weight} of {total} are answered {statuses}: {because}"


def _say_fault(fault: Fault | None) -> str:
    if fault is None:
        return ""
    said = [f"{fault.delay_percent:g}% are held up for {fault.delay:g} s"] if fault.delay and fault.delay_percent else []
    if fault.abort_percent and (fault.status is not None or fault.grpc_status is not None):
        what = f"status {fault.status}" if fault.status is not None else f"gRPC status {fault.grpc_status}"
        said.append(f"{fault.abort_percent:g}% end with {what}")
    return ", ".join(said)


def _say_retry(retry: Retry | None) -> str:
    if retry is None or not retry.attempts:
        return ""
    statuses = f", for statuses {', '.join(map(str, retry.statuses))}" if retry.statuses else ""
    limit = f"; {retry.per_try_timeout:g} s for each try" if retry.per_try_timeout is not None else ""
    return f"up to {retry.attempts} on {', '.join(retry.on)}{statuses}{limit}"
