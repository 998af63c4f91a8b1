"""Policies of node proxies that judge callers which they do not see: behind a waypoint every connection comes from the waypoint.

A policy without ``targetRefs`` that names clients holds for the workload, and there the caller of what passed a waypoint is the waypoint:
an ALLOW lets nothing through, a DENY finds nobody. It is enforced as it stands; whoever wrote it is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from mesh.authz.match import Facts, PreparedRules
from mesh.model.address import GatewayAddress, IpAddress, NamespacedHostname, NetworkAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Clause, Match, Policy, Rule, Scope
from mesh.model.service import Service
from mesh.model.workload import Workload

_ANYWHERE = parse_ip("0.0.0.0")


@dataclass(frozen=True, slots=True)
class _Caller:
    """An instance of a waypoint, as workloads behind it see it."""

    identity: SpiffeId
    ip: IpAddress


def find_blind(policies: Iterable[Policy], workloads: Mapping[str, Workload], services: Mapping[str, Service]) -> dict[str, str]:
    """What is wrong with each policy, by its key. ``policies``: those that were made of AuthorizationPolicies, as node proxies get them."""
    naming = {policy.key: policy for policy in policies if any(map(_names_sources, policy.rules))}
    if not naming:
        return {}
    found: dict[str, str] = {}
    seen: set[tuple[str, tuple[str, ...], SpiffeId]] = set()
    for workload, caller in _find_behind(workloads.values(), services):
        kind = workload.namespace, workload.authorization_policies, caller.identity
        if kind in seen:
            continue  # workloads come in thousands, and few kinds
        seen.add(kind)
        for policy in naming.values():
            if policy.key not in found and _applies(policy, workload) and (effect := _judge(policy, caller)):
                name = f"{workload.namespace}/{workload.name}"
                found[policy.key] = f"{name} gets connections from the waypoint {caller.identity.principal}: {effect}. {_ADVICE}"
    return found


_ADVICE = "Give the policy targetRefs, so that the waypoint enforces it, or name the waypoint in it"


def _find_behind(workloads: Iterable[Workload], services: Mapping[str, Service]) -> Iterator[tuple[Workload, _Caller]]:
    """Workloads that get connections from waypoints, each with one instance of one."""
    fronts = {service.key: service.waypoint for service in services.values() if service.waypoint is not None}
    listed = list(workloads)
    if not fronts and all(workload.waypoint is None for workload in listed):
        return
    callers = _find_callers(
        {*fronts.values(), *(workload.waypoint for workload in listed if workload.waypoint is not None)}, listed, services
    )
    for workload in listed:
        waypoint = workload.waypoint or next((fronts[key] for key in workload.services if key in fronts), None)
        caller = callers.get(waypoint) if waypoint is not None else None
        if caller is not None:
            yield workload, caller


def _find_callers(
    waypoints: Iterable[GatewayAddress], workloads: Iterable[Workload], services: Mapping[str, Service]
) -> dict[GatewayAddress, _Caller]:
    """An instance of each: of the service whose name or address it has, or the workload whose address it has."""
    by_service: dict[NamespacedHostname, GatewayAddress] = {}
    by_address: dict[NetworkAddress, GatewayAddress] = {}
    for waypoint in waypoints:
        if isinstance(waypoint.destination, NamespacedHostname):
            by_service[waypoint.destination] = waypoint
        else:
            by_address[waypoint.destination] = waypoint
    for service in services.values() if by_address else ():
        for address in service.addresses:
            if address in by_address:
                by_service[service.key] = by_address[address]
    found: dict[GatewayAddress, _Caller] = {}
    for workload in workloads:
        for key in workload.services.keys() & by_service.keys() if by_service else ():
            found[by_service[key]] = _caller(workload)
        for ip in workload.addresses if by_address else ():
            known = by_address.get(NetworkAddress(workload.network, ip))
            if known is not None:
                found[known] = _caller(workload)
    return found


def _caller(workload: Workload) -> _Caller:
    identity = SpiffeId(workload.trust_domain, workload.namespace, workload.service_account)
    return _Caller(identity, workload.addresses[0] if workload.addresses else _ANYWHERE)


def _applies(policy: Policy, workload: Workload) -> bool:
    match policy.scope:
        case Scope.GLOBAL:
            return True
        case Scope.NAMESPACE:
            return policy.namespace == workload.namespace
    return policy.key in workload.authorization_policies


def _judge(policy: Policy, caller: _Caller) -> str:
    """What the policy does to what the waypoint sends; empty: nothing that it would not do to clients."""
    facts = Facts.of(caller.ip, caller.identity, _ANYWHERE, 0)
    if policy.action is Action.ALLOW:
        admitted = any(PreparedRules([_only_sources(rule)]).find_match(facts) is not None for rule in policy.rules)
        return "" if admitted else "this policy allows none of them, whoever the client was"
    for rule in policy.rules:
        if _names_sources(rule):
            hit = PreparedRules([_only_sources(rule)]).find_match(facts) is not None
            return "this policy denies them, whoever the client was" if hit else "this policy denies none of them, whoever the client was"
    return ""


def _names_sources(rule: Rule) -> bool:
    return any(_source_part(match) != Match() for clause in rule.clauses for match in clause.matches)


def _only_sources(rule: Rule) -> Rule:
    """The rule, as if all else that it asks for were true."""
    clauses = [tuple(_source_part(match) for match in clause.matches) for clause in rule.clauses]
    return Rule(tuple(Clause(matches) for matches in clauses if Match() not in matches))


def _source_part(match: Match) -> Match:
    return replace(
        match,
        destination_ips=(),
        not_destination_ips=(),
        destination_ports=(),
        not_destination_ports=(),
    )
