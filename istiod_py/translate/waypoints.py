"""Which waypoint stands before a service or a workload, and why none does (reference: Istio's `waypoints.go`).

Every Gateway that has an address is a waypoint, whoever made it work and whatever its class. The object's own label is obeyed before its
namespace's, and what it names is never replaced by what the namespace names. A waypoint that can't be used is left out and traffic goes
directly, as in Istio; unless the annotation ``ambient.mesh/waypoint-required`` is ``true`` or ``strict``: then the name stays in place of
an address, and connections are refused with it, by any node proxy. Where it is ``strict``, the agents of a service's pods are given a
policy besides, which refuses whoever is not the waypoint (`find_guard`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from istiod_py.translate.config import Condition, Config
from mesh.kube.fields import did_you_mean
from mesh.kube.gatewayapi.gateway import (
    WAYPOINT_CLASS,
    WAYPOINT_CONTROLLER,
    AllowedNamespaces,
    KubeGateway,
    KubeGatewayClass,
    Listener,
)
from mesh.kube.gatewayapi.gateway import GatewayAddress as KubeGatewayAddress
from mesh.kube.objects import FieldPath, KubeObject
from mesh.kube.ownership import BOUND
from mesh.model.address import GatewayAddress, NamespacedHostname, NetworkAddress, parse_ip
from mesh.model.labels import (
    CANARY_WEIGHT,
    EAST_WEST_CONTROLLER,
    GATEWAY_MANAGED,
    GATEWAY_NAME,
    GATEWAY_NAME_OVERRIDE,
    GATEWAY_SERVICE_ACCOUNT,
    INBOUND_BINDING,
    INCLUDE_CLIENT_IDENTITY,
    INGRESS_USE_WAYPOINT,
    MESH_CONTROLLER,
    TRAFFIC_TYPES,
    USE_WAYPOINT,
    USE_WAYPOINT_CANARY,
    USE_WAYPOINT_CANARY_NAMESPACE,
    USE_WAYPOINT_NAMESPACE,
    WAYPOINT_FOR,
    WAYPOINT_REQUIRED,
)
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Rule, Scope
from mesh.model.ports import INBOUND_HBONE
from mesh.model.service import WeightedWaypoint
from mesh.model.workload import ApplicationTunnel, TunnelApplicationProtocol

_NONE: Final = "none"
STRICT: Final = "strict"
_GUARD: Final = "waypoint_required_by_"
"""How the policy of a service that requires its waypoint strictly is called; ``_`` is in no name of a user's."""
_MANAGED: Final = (MESH_CONTROLLER, EAST_WEST_CONTROLLER)
"""What is deployed by these has no waypoint: its traffic would come back to it."""
_PROXY_LISTENER: Final = "istio.io/PROXY"
"""Protocol of a listener that is handed connections with a PROXY header by a node proxy."""


@dataclass(frozen=True, slots=True)
class Waypoint:
    """A Gateway as whoever uses it sees it. ``address`` None: it is not ready, and never was."""

    namespace: str
    name: str
    address: GatewayAddress | None
    hostname: str
    """Of its service, as it is deployed."""
    traffic: str
    """``service``, ``workload``, ``all`` or ``none``; what is none of these takes nothing."""
    allowed: AllowedNamespaces
    tunnel: ApplicationTunnel | None
    """How its own pods are handed what a node proxy has terminated for them."""
    include_client_identity: bool = False
    class_name: str = ""
    account: str = ""
    """The service account that its pods run as."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


Waypoints = Mapping[str, Waypoint]
"""By ``namespace/name``, those that are not ready too."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Of one object. ``keys``: the waypoints that get its traffic, or will once they are ready, and therefore must know it."""

    address: GatewayAddress | None = None
    weighted: tuple[WeightedWaypoint, ...] = ()
    keys: tuple[str, ...] = ()
    condition: Condition | None = None
    """None: the object asks for no waypoint."""
    canary: Condition | None = None
    """What keeps the canary that it asks for from getting any of its traffic."""


UNBOUND: Final = Binding()


@dataclass(frozen=True, slots=True)
class Asking:
    """What an object, or a namespace, says about waypoints: its labels and annotations."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def says_something(self) -> bool:
        """Whether anything here is about waypoints; what says nothing is bound as all such objects of its namespace are."""
        return not (_LABELS.isdisjoint(self.labels) and _ANNOTATIONS.isdisjoint(self.annotations))


_LABELS: Final = frozenset({USE_WAYPOINT, USE_WAYPOINT_CANARY, INGRESS_USE_WAYPOINT, GATEWAY_MANAGED, GATEWAY_NAME})
_ANNOTATIONS: Final = frozenset({CANARY_WEIGHT, WAYPOINT_REQUIRED})


# What there is


def find_waypoints(gateways: Iterable[KubeGateway], classes: Mapping[str, KubeGatewayClass], network: str, config: Config) -> Waypoints:
    """Of all Gateways. ``network``: the mesh's own, in which their IP addresses are."""
    return {gateway.key: _as_waypoint(gateway, classes.get(gateway.class_name), network, config) for gateway in gateways}


def deployed_name(gateway: KubeGateway) -> str:
    """Of the Deployment and the Service that a controller makes for a waypoint."""
    return gateway.annotations.get(GATEWAY_NAME_OVERRIDE) or gateway.name


def account_name(gateway: KubeGateway | KubeObject) -> str:
    """The service account that its pods run as."""
    return gateway.annotations.get(GATEWAY_SERVICE_ACCOUNT) or gateway.name


def hostname_of(gateway: KubeGateway, config: Config) -> str:
    return f"{deployed_name(gateway)}.{gateway.namespace}.svc.{config.domain_suffix}"


def _as_waypoint(gateway: KubeGateway, kind: KubeGatewayClass | None, network: str, config: Config) -> Waypoint:
    traffic = gateway.labels.get(WAYPOINT_FOR) or (kind.labels.get(WAYPOINT_FOR) if kind else None) or "service"
    annotation = gateway.annotations.get(INBOUND_BINDING, kind.annotations.get(INBOUND_BINDING) if kind else None)
    tunnel = _parse_binding(annotation) if annotation is not None else None
    return Waypoint(
        namespace=gateway.namespace,
        name=gateway.name,
        address=_choose_address(gateway, network),
        hostname=hostname_of(gateway, config),
        traffic=traffic,
        allowed=_allowed_by(gateway.listeners, tunnel),
        tunnel=tunnel,
        include_client_identity=gateway.annotations.get(INCLUDE_CLIENT_IDENTITY) == "true",
        class_name=gateway.class_name,
        account=account_name(gateway),
    )


def _choose_address(gateway: KubeGateway, network: str) -> GatewayAddress | None:
    """A hostname if there is one: it stays when addresses change, and stands for those of both families."""

    def first(kind: str) -> KubeGatewayAddress | None:
        return next((address for address in gateway.assigned if address.type == kind), None)

    if (named := first("Hostname")) is not None:
        return GatewayAddress(NamespacedHostname(gateway.namespace, named.value), INBOUND_HBONE)
    if (numbered := first("IPAddress")) is not None:
        return GatewayAddress(NetworkAddress(network, parse_ip(numbered.value)), INBOUND_HBONE)
    return None


def _parse_binding(text: str) -> ApplicationTunnel | None:
    """``PROXY`` or ``NONE``, and ``/PORT``. What is neither means nothing, as in Istio."""
    protocol, slash, port = text.partition("/")
    if protocol not in ("PROXY", "NONE"):
        return None
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536 else None
    return None if slash and number is None else ApplicationTunnel(TunnelApplicationProtocol[protocol], number)


def _allowed_by(listeners: Iterable[Listener], tunnel: ApplicationTunnel | None) -> AllowedNamespaces:
    """The listener that traffic really comes to decides who may attach: the one bound to, else the one for HBONE."""
    listeners = tuple(listeners)
    if tunnel is not None:
        for listener in listeners:
            bound = listener.port == tunnel.port if tunnel.port is not None else _takes_proxy(listener, tunnel)
            if bound:
                return listener.allowed
    for listener in listeners:
        if listener.protocol == "HBONE" and listener.port == INBOUND_HBONE:
            return listener.allowed
    return AllowedNamespaces()


def _takes_proxy(listener: Listener, tunnel: ApplicationTunnel) -> bool:
    return tunnel.protocol is TunnelApplicationProtocol.PROXY and listener.protocol == _PROXY_LISTENER


# Who has which


def bind_service(
    namespace: str, own: Asking, around: Asking, waypoints: Waypoints, config: Config, *, namespace_only: bool = False
) -> Binding:
    """Of a Service or ServiceEntry; ``around``: its Namespace. ``namespace_only``: it is seen in its own namespace alone."""
    if own.labels.get(GATEWAY_MANAGED) in _MANAGED:
        return UNBOUND
    named = _named(own, around, namespace)
    if named is None:
        return UNBOUND
    waypoint = _judge(waypoints.get(named), named, namespace, around, "service", namespace_only=namespace_only)
    if isinstance(waypoint, Condition):
        refused = _refuse(waypoint, named, waypoints, config) if _is_required(own, around) else Binding(condition=waypoint)
        awaited = waypoints.get(named) if waypoint.reason == "WaypointIsNotReady" else None
        will_do = awaited is not None and _find_mistake(awaited, namespace, around, "service", namespace_only=namespace_only) is None
        return replace(refused, keys=(named,)) if will_do else refused
    message = f"Successfully attached to waypoint {named}{_ingress_message(own, around)}"
    canary, weight = _find_canary(namespace, own, around, named, waypoints, namespace_only=namespace_only)
    if isinstance(canary, Condition):
        condition = Condition(BOUND, True, "WaypointAccepted", f"{message}. Canary waypoint not attached: {canary.message}")
        return Binding(waypoint.address, (), (named,), condition, canary)
    condition = Condition(BOUND, True, "WaypointAccepted", message)
    if canary is None:
        return Binding(waypoint.address, (), (named,), condition)
    weighted = (WeightedWaypoint(waypoint.address, 100 - weight), WeightedWaypoint(canary.address, weight))
    return Binding(waypoint.address, weighted, (named, canary.key), condition)


def bind_workload(namespace: str, own: Asking, around: Asking, waypoints: Waypoints, config: Config) -> Binding:
    """Of a pod, a WorkloadEntry or a ServiceEntry's endpoint; ``around``: its Namespace."""
    if own.labels.get(GATEWAY_MANAGED) in _MANAGED or find_own(namespace, own, waypoints) is not None:
        return UNBOUND
    named = _named(own, around, namespace)
    if named is None:
        return UNBOUND
    waypoint = _judge(waypoints.get(named), named, namespace, around, "workload")
    if isinstance(waypoint, Ready):
        condition = Condition(BOUND, True, "WaypointAccepted", f"Successfully attached to waypoint {named}")
        return Binding(waypoint.address, (), (named,), condition)
    for_services_alone = USE_WAYPOINT not in own.labels and not _takes(waypoints.get(named), "workload")
    if for_services_alone and waypoint.reason == "UnsupportedTrafficType":
        return UNBOUND  # no mistake: a namespace's waypoint is rarely for workloads
    if for_services_alone or not _is_required(own, around):
        return Binding(condition=waypoint)
    return _refuse(waypoint, named, waypoints, config)


def find_guard(namespace: str, service: str, own: Asking, around: Asking, waypoints: Waypoints, config: Config) -> Policy | None:
    """For the pods of a Service that requires its waypoint strictly: whoever does not prove to be that waypoint, or its canary, is refused.
    None: it does not."""
    if own.labels.get(GATEWAY_MANAGED) in _MANAGED or _requirement(own, around) != STRICT:
        return None
    named = _named(own, around, namespace)
    if named is None:
        return None
    names = dict.fromkeys((named, _canary_name(own, around, namespace) or named))
    trusted = tuple(Exact(_principal(name, waypoints.get(name), config)) for name in names)
    rule = Rule((Clause((Match(not_principals=trusted),)),))
    return Policy(_GUARD + service, namespace, Scope.WORKLOAD_SELECTOR, Action.DENY, (rule,))


def _principal(named: str, waypoint: Waypoint | None, config: Config) -> str:
    namespace, _, name = named.partition("/")
    return f"{config.trust_domain}/ns/{namespace}/sa/{waypoint.account if waypoint is not None else name}"


def find_label_mistake(namespace: str, asking: Asking, binding: Binding, waypoints: Waypoints) -> str:
    """What is wrong with the label ``istio.io/use-waypoint`` of ``asking``, which was bound so; empty: nothing, or nothing but that the
    waypoint is not ready yet, which its Gateway tells."""
    condition, named = binding.condition, _named(asking, Asking(), namespace)
    if condition is None or condition.status or named is None:
        return ""
    if condition.reason != "WaypointIsNotReady":
        return f"no effect: {condition.message}"
    if named in waypoints:
        return ""
    place, _, name = named.partition("/")
    effect = "traffic is refused" if binding.address is not None else "traffic goes directly"
    elsewhere = sorted(each.namespace for each in waypoints.values() if each.name == name)
    if elsewhere and USE_WAYPOINT_NAMESPACE not in asking.labels:
        hint = f"; there is one in namespace {', '.join(elsewhere)}, which the label {USE_WAYPOINT_NAMESPACE} would name"
    else:
        hint = did_you_mean(name, [each.name for each in waypoints.values() if each.namespace == place])
    return f"there is no Gateway {named}, and {effect}{hint}"


def find_canary_mistake(asking: Asking, binding: Binding) -> tuple[FieldPath, str] | None:
    """The field of ``asking``, which was bound so, that keeps its canary from getting anything, and why."""
    if binding.canary is None:
        return None
    if binding.canary.reason == "CanaryInvalidWeight" and CANARY_WEIGHT in asking.annotations:
        return ("metadata", "annotations", CANARY_WEIGHT), f"no effect: {binding.canary.message}"
    if USE_WAYPOINT_CANARY in asking.labels:
        return ("metadata", "labels", USE_WAYPOINT_CANARY), f"no effect: {binding.canary.message}"
    return None


def find_required_mistake(annotations: Mapping[str, str]) -> str:
    """What is wrong with the annotation ``ambient.mesh/waypoint-required``; empty: nothing."""
    said = annotations.get(WAYPOINT_REQUIRED, "false")
    return "" if said in ("true", STRICT, "false") else f"expected 'true', '{STRICT}' or 'false', found '{said[:80]}': it counts as 'true'"


def find_gateway_mistakes(gateway: KubeGateway, classes: Mapping[str, KubeGatewayClass]) -> Iterator[tuple[FieldPath, str]]:
    """Fields of a Gateway that would be a waypoint and, as it stands, is none, and why. ``classes``: by name."""
    known = {*classes, WAYPOINT_CLASS}
    if gateway.class_name not in known:
        message = f"there is no GatewayClass {gateway.class_name}: nobody makes anything of this Gateway"
        yield ("spec", "gatewayClassName"), message + did_you_mean(gateway.class_name, known)
    kind = classes.get(gateway.class_name)
    ours = kind.controller == WAYPOINT_CONTROLLER if kind is not None else gateway.class_name == WAYPOINT_CLASS
    traffic = gateway.labels.get(WAYPOINT_FOR)
    if ours and traffic and traffic not in TRAFFIC_TYPES:
        message = f"'{traffic}' is no type of traffic: the waypoint gets none"
        yield ("metadata", "labels", WAYPOINT_FOR), message + did_you_mean(traffic, TRAFFIC_TYPES)


def find_own(namespace: str, own: Asking, waypoints: Waypoints) -> Waypoint | None:
    """The waypoint that a workload is itself an instance of."""
    name = own.labels.get(GATEWAY_NAME)
    found = waypoints.get(f"{namespace}/{name}") if name else None
    return found if found is not None and found.address is not None else None


def _named(own: Asking, around: Asking, namespace: str) -> str | None:
    """``namespace/name``; None: none is asked for. Without a namespace of its own the label means that of the object."""
    for asking in (own, around):
        name = asking.labels.get(USE_WAYPOINT)
        if name == _NONE:
            return None
        if name:
            return f"{asking.labels.get(USE_WAYPOINT_NAMESPACE) or namespace}/{name}"
    return None


def _takes(waypoint: Waypoint | None, traffic: str) -> bool:
    """One that is not there yet would be made for services, if nothing more is said."""
    return (waypoint.traffic if waypoint is not None else "service") in (traffic, "all")


@dataclass(frozen=True, slots=True)
class Ready:
    """A waypoint that may be used, and its address."""

    key: str
    address: GatewayAddress


def _judge(
    waypoint: Waypoint | None, named: str, namespace: str, around: Asking, traffic: str, *, namespace_only: bool = False
) -> Ready | Condition:
    """The waypoint, or why it can't be used."""
    if waypoint is None or waypoint.address is None:
        return Condition(BOUND, False, "WaypointIsNotReady", f'waypoint "{named}" is not ready')
    return _find_mistake(waypoint, namespace, around, traffic, namespace_only=namespace_only) or Ready(named, waypoint.address)


def _find_mistake(waypoint: Waypoint, namespace: str, around: Asking, traffic: str, *, namespace_only: bool) -> Condition | None:
    """Why it may not be used, ready or not."""
    named = waypoint.key
    if not waypoint.allowed.admits(waypoint.namespace, namespace, around.labels):
        message = f'we are not permitted to attach to waypoint "{named}" (missing allowedRoutes?)'
        return Condition(BOUND, False, "AttachmentDenied", message)
    if not _takes(waypoint, traffic):
        message = f'attempting to bind to traffic type "{traffic}" which the waypoint "{named}" does not support'
        return Condition(BOUND, False, "UnsupportedTrafficType", message)
    if namespace_only and waypoint.namespace != namespace:
        message = (
            f'cannot bind to waypoint "{named}" in another namespace: cross-namespace waypoint binding is not permitted for a '
            "ServiceEntry with NAMESPACE visibility"
        )
        return Condition(BOUND, False, "CrossNamespaceWaypointForbidden", message)
    return None


def _find_canary(
    namespace: str, own: Asking, around: Asking, primary: str, waypoints: Waypoints, *, namespace_only: bool
) -> tuple[Ready | Condition | None, int]:
    """The canary and its percentage, or what is wrong with it. The namespace's counts only where its waypoint does."""
    inherited = USE_WAYPOINT not in own.labels
    named = _canary_name(own, around, namespace)
    if named is None:
        return None, 0
    if named == primary:
        message = f'canary waypoint "{named}" must differ from the primary waypoint'
        return Condition(BOUND, False, "CanarySameAsPrimary", message), 0
    weight = _parse_weight(own.annotations.get(CANARY_WEIGHT, around.annotations.get(CANARY_WEIGHT, "0") if inherited else "0"))
    if weight is None:
        message = f'canary waypoint "{named}" has an invalid weight; must be an integer in [0,100]'
        return Condition(BOUND, False, "CanaryInvalidWeight", message), 0
    return _judge(waypoints.get(named), named, namespace, around, "service", namespace_only=namespace_only), weight


def _canary_name(own: Asking, around: Asking, namespace: str) -> str | None:
    """``namespace/name``; None: none is asked for."""
    asking = around if USE_WAYPOINT not in own.labels and USE_WAYPOINT_CANARY not in own.labels else own
    name = asking.labels.get(USE_WAYPOINT_CANARY)
    if not name or name == _NONE:
        return None
    return f"{asking.labels.get(USE_WAYPOINT_CANARY_NAMESPACE) or namespace}/{name}"


def _parse_weight(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 3):
        return None
    return int(text) if int(text) <= 100 else None


def _requirement(own: Asking, around: Asking) -> str:
    return own.annotations.get(WAYPOINT_REQUIRED, around.annotations.get(WAYPOINT_REQUIRED, "false"))


def _is_required(own: Asking, around: Asking) -> bool:
    """What is no value of the annotation requires too (`find_required_mistake`): it was written to close something."""
    return _requirement(own, around) != "false"


def _refuse(mistake: Condition, named: str, waypoints: Waypoints, config: Config) -> Binding:
    """An address that leads nowhere. One that is not ready is waited for under its own name; where it may never be used the name says
    why, and can't become that of a service (RFC 2606)."""
    namespace, _, name = named.partition("/")
    if mistake.reason in _FOR_EVER:
        hostname = f"{_FOR_EVER[mistake.reason]}.{name}.{namespace}.invalid"
    else:
        known = waypoints.get(named)
        hostname = known.hostname if known is not None else f"{name}.{namespace}.svc.{config.domain_suffix}"
    told = Condition(BOUND, False, mistake.reason, f"{mistake.message}. Traffic is refused, as {WAYPOINT_REQUIRED} asks for")
    return Binding(GatewayAddress(NamespacedHostname(namespace, hostname), INBOUND_HBONE), (), (), told)


_FOR_EVER: Final = {
    "AttachmentDenied": "attachment-denied",
    "UnsupportedTrafficType": "unsupported-traffic-type",
    "CrossNamespaceWaypointForbidden": "other-namespace-forbidden",
}


def _ingress_message(own: Asking, around: Asking) -> str:
    wanted = own.labels.get(INGRESS_USE_WAYPOINT, around.labels.get(INGRESS_USE_WAYPOINT))
    if wanted is None:
        return ""
    if wanted.lower() == "true":
        return ". Ingress traffic will traverse the waypoint"
    return ". Ingress traffic is not using the waypoint, set the istio.io/ingress-use-waypoint label to true if desired."
