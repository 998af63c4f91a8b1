"""PeerAuthentication as the DENY policies that node proxies enforce: whoever proves no identity is refused where STRICT holds.

(Reference: Istio's `policies.go`.) Proxies know no mode of mutual TLS; they know principals. STRICT is one static policy that
workloads name; a PeerAuthentication with modes of single ports becomes a policy of its own. Where Istio's conversion and its choice
of what a workload names disagree about inheritance, so that a workload names a policy that was never made, this follows the documented
precedence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from istiod_py.translate.config import Config
from mesh.kube.policies import PeerAuthentication
from mesh.model.policy import Action, Clause, Match, Policy, Presence, Rule, Scope

STATIC_STRICT = "istio_converted_static_strict"
"""``_`` is not allowed in names of Kubernetes, so no policy of a user has this name."""
_CONVERTED = "converted_peer_authentication_"

_NO_IDENTITY = (Presence(),)
_NOT_AUTHENTICATED = Clause((Match(not_principals=_NO_IDENTITY),))


@dataclass(frozen=True, slots=True)
class Selection:
    """What workloads matching ``selector`` name, in order of precedence."""

    selector: Mapping[str, str]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamespaceMtls:
    """The part of all PeerAuthentications that matters to the workloads of one namespace."""

    default: tuple[str, ...] = ()
    """Names for workloads that no selector matches."""
    selections: tuple[Selection, ...] = ()
    """The first that matches decides."""
    forced: tuple[Selection, ...] = ()
    """From policies with mistakes: names in addition, for all that match."""

    def names_for(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        names = next((s.names for s in self.selections if s.selector.items() <= labels.items()), self.default)
        further = tuple(name for s in self.forced if s.selector.items() <= labels.items() for name in s.names)
        return tuple(dict.fromkeys((*names, *further)))


@dataclass(frozen=True, slots=True)
class MeshMtls:
    """All PeerAuthentications, resolved. ``policies`` go to the proxies."""

    policies: Mapping[str, Policy]
    _by_namespace: Mapping[str, NamespaceMtls]
    _elsewhere: NamespaceMtls

    def of(self, namespace: str) -> NamespaceMtls:
        return self._by_namespace.get(namespace, self._elsewhere)


def resolve_mtls(good: Iterable[PeerAuthentication], mistaken: Iterable[PeerAuthentication], config: Config) -> MeshMtls:
    """``good`` oldest first: of several for the same thing the oldest holds. ``mistaken`` had no good version and count as STRICT for
    whatever they may have selected, their ports included."""
    ordered, broken = list(good), list(mistaken)
    static = f"{config.root_namespace}/{STATIC_STRICT}"
    mesh = next((p.mode for p in ordered if p.namespace == config.root_namespace and not p.selector), "UNSET")
    policies: dict[str, Policy] = {}
    if ordered or broken:
        policies[static] = static_strict(config)
    by_namespace: dict[str, NamespaceMtls] = {}
    for namespace in sorted({p.namespace for p in (*ordered, *broken)}):
        inherited = mesh
        selections: list[Selection] = []
        own = [p for p in ordered if p.namespace == namespace]
        if namespace != config.root_namespace:
            inherited = _inherit(next((p.mode for p in own if not p.selector), "UNSET"), mesh)
            for peer in own:
                if peer.selector:
                    converted = convert(peer, inherited)
                    if converted is not None:
                        policies[converted.key] = converted
                    selections.append(Selection(peer.selector, names_of(peer, inherited, static)))
        by_namespace[namespace] = NamespaceMtls(
            default=(static,) if inherited == "STRICT" else (),
            selections=tuple(selections),
            forced=_forced(broken, namespace, static, config),
        )
    elsewhere = NamespaceMtls((static,) if mesh == "STRICT" else (), (), _forced(broken, None, static, config))
    return MeshMtls(policies, by_namespace, elsewhere)


def _forced(broken: Iterable[PeerAuthentication], namespace: str | None, static: str, config: Config) -> tuple[Selection, ...]:
    """A mistaken policy without selector in the root namespace is meant for the mesh; one with a selector would be ignored there."""
    return tuple(
        Selection(p.selector or {}, (static,))
        for p in broken
        if (p.namespace == config.root_namespace and not p.selector) or (p.namespace == namespace and namespace != config.root_namespace)
    )


def static_strict(config: Config) -> Policy:
    return Policy(STATIC_STRICT, config.root_namespace, Scope.WORKLOAD_SELECTOR, Action.DENY, (Rule((_NOT_AUTHENTICATED,)),))


def _inherit(mode: str, above: str) -> str:
    return above if mode == "UNSET" else mode


def _exempt_ports(peer: PeerAuthentication) -> list[int]:
    return sorted(port for port, mode in peer.port_modes.items() if mode in ("PERMISSIVE", "DISABLE"))


def _strict_ports(peer: PeerAuthentication) -> list[int]:
    return sorted(port for port, mode in peer.port_modes.items() if mode == "STRICT")


def convert(peer: PeerAuthentication, inherited: str) -> Policy | None:
    """The policy for a PeerAuthentication with modes of single ports, None where the static one (or none) says the same.

    Rules are OR-ed: STRICT with exempt ports must be one rule, "no identity, and none of these ports".
    """
    if _inherit(peer.mode, inherited) == "STRICT":
        exempt = [Clause((Match(not_destination_ports=(port,)),)) for port in _exempt_ports(peer)]
        if not exempt:
            return None
        own = peer.mode == "STRICT"
        rules: tuple[Rule, ...] = (Rule((_NOT_AUTHENTICATED, *exempt) if own else (*exempt, _NOT_AUTHENTICATED)),)
    else:
        rules = tuple(Rule((Clause((Match(destination_ports=(port,), not_principals=_NO_IDENTITY),)),)) for port in _strict_ports(peer))
        if not rules:
            return None
    return Policy(_CONVERTED + peer.name, peer.namespace, Scope.WORKLOAD_SELECTOR, Action.DENY, rules)


def names_of(peer: PeerAuthentication, inherited: str, static: str) -> tuple[str, ...]:
    """The policies that workloads selected by ``peer`` name."""
    converted = convert(peer, inherited)
    if _inherit(peer.mode, inherited) != "STRICT":
        return (converted.key,) if converted else ()
    # Istio, with the mode inherited, exempts ports only if one of them is PERMISSIVE; DISABLE alone leaves all STRICT.
    if converted is None or (peer.mode == "UNSET" and "PERMISSIVE" not in peer.port_modes.values()):
        return (static,)
    return (converted.key,)
