"""Gateway and GatewayClass: what a waypoint is asked for with, and whether it is there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.model.address import InvalidAddress, parse_ip

GROUP: Final = "gateway.networking.k8s.io"
WAYPOINT_CLASS: Final = "istio-waypoint"
"""The GatewayClass of waypoints, and who looks after its Gateways."""
WAYPOINT_CONTROLLER: Final = "istio.io/mesh-controller"
MAX_LISTENERS: Final = 64
MAX_ADDRESSES: Final = 16
"""Both as the Gateway API's own schema has them."""
_FROM: Final = ("All", "Same", "Selector", "None")
_OPERATORS: Final = ("In", "NotIn", "Exists", "DoesNotExist")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One of a label selector's ``matchExpressions``."""

    key: str
    operator: str
    values: tuple[str, ...]

    def holds(self, labels: Mapping[str, str]) -> bool:
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case "DoesNotExist":
                return self.key not in labels
        return False


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """All of it must hold; an empty one selects everything."""

    labels: tuple[tuple[str, str], ...] = ()
    requirements: tuple[Requirement, ...] = ()

    def selects(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(key) == value for key, value in self.labels) and all(each.holds(labels) for each in self.requirements)


@dataclass(frozen=True, slots=True)
class AllowedNamespaces:
    """Of a listener's ``allowedRoutes``: from which namespaces something may attach. ``selector`` None with ``Selector``: from none."""

    source: str = "Same"
    selector: LabelSelector | None = None

    def admits(self, own: str, namespace: str, labels: Mapping[str, str]) -> bool:
        """``own``: the Gateway's namespace; ``labels`` those of ``namespace``."""
        match self.source:
            case "All":
                return True
            case "Same":
                return namespace == own
            case "Selector":
                return self.selector is not None and self.selector.selects(labels)
        return False


@dataclass(frozen=True, slots=True)
class Listener:
    name: str
    port: int
    protocol: str
    allowed: AllowedNamespaces


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """``type`` is ``IPAddress`` or ``Hostname``, or somebody's own."""

    type: str
    value: str


@dataclass(frozen=True, slots=True)
class ParametersRef:
    group: str
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Infrastructure:
    """What whatever is deployed shall have."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    parameters: ParametersRef | None


@dataclass(frozen=True, slots=True)
class KubeGateway:
    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    class_name: str
    listeners: tuple[Listener, ...]
    addresses: tuple[GatewayAddress, ...]
    """Those that are asked for."""
    infrastructure: Infrastructure | None
    assigned: tuple[GatewayAddress, ...]
    """``status.addresses``: where it is reached. None: nobody has made it work yet."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class KubeGatewayClass:
    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    controller: str


def read_gateway(obj: KubeObject) -> tuple[KubeGateway, tuple[SourceProblem, ...]]:
    """The Gateway and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    return parse_gateway(fields), tuple(fields.problems)


def parse_gateway(fields: Fields) -> KubeGateway:
    """``fields`` of the whole object. What the Gateway API knows beyond this (TLS, hostnames ...) is for other classes, and passed over."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    return KubeGateway(
        namespace=obj.namespace,
        name=obj.name,
        uid=obj.uid,
        labels=obj.labels,
        annotations=obj.annotations,
        class_name=spec.string("gatewayClassName", required=True),
        listeners=tuple(map(_read_listener, spec.mappings("listeners", most=MAX_LISTENERS))),
        addresses=tuple(map(_read_address, spec.mappings("addresses", most=MAX_ADDRESSES))),
        infrastructure=_read_infrastructure(spec.mapping("infrastructure")),
        assigned=_read_assigned(obj),
    )


def read_gateway_class(obj: KubeObject) -> tuple[KubeGatewayClass, tuple[SourceProblem, ...]]:
    """The class and every mistake in it."""
    fields = Fields(obj)
    return parse_gateway_class(fields), tuple(fields.problems)


def parse_gateway_class(fields: Fields) -> KubeGatewayClass:
    """``fields`` of the whole object."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    return KubeGatewayClass(obj.name, obj.labels, obj.annotations, spec.string("controllerName", required=True))


def parse_label_selector(fields: Fields | None) -> LabelSelector | None:
    """Kubernetes' LabelSelector; None where there is none."""
    if fields is None:
        return None
    requirements = tuple(
        Requirement(each.string("key", required=True), each.string("operator", required=True, choices=_OPERATORS), each.strings("values"))
        for each in fields.mappings("matchExpressions")
    )
    return LabelSelector(tuple(sorted(fields.string_map("matchLabels").items())), requirements)


def _read_listener(fields: Fields) -> Listener:
    return Listener(
        name=fields.string("name", required=True),
        port=fields.integer("port", required=True, low=1, high=65535),
        protocol=fields.string("protocol", required=True),
        allowed=_read_allowed(fields.mapping("allowedRoutes")),
    )


def _read_allowed(routes: Fields | None) -> AllowedNamespaces:
    namespaces = routes.mapping("namespaces") if routes else None
    if namespaces is None:
        return AllowedNamespaces()
    return AllowedNamespaces(namespaces.string("from", "Same", choices=_FROM), parse_label_selector(namespaces.mapping("selector")))


def _read_address(fields: Fields) -> GatewayAddress:
    return GatewayAddress(fields.string("type", "IPAddress"), fields.string("value"))


def _read_infrastructure(fields: Fields | None) -> Infrastructure | None:
    if fields is None:
        return None
    labels, annotations = fields.string_map("labels"), fields.string_map("annotations")
    reference = fields.mapping("parametersRef")
    if reference is None:
        return Infrastructure(labels, annotations, None)
    names = (reference.string("group"), reference.string("kind", required=True), reference.string("name", required=True))
    return Infrastructure(labels, annotations, ParametersRef(*names))


def _read_assigned(obj: KubeObject) -> tuple[GatewayAddress, ...]:
    """Status is not the user's: what cannot be read there is passed over."""
    found: list[GatewayAddress] = []
    for address in Fields(obj, ("status",), obj.status, []).mappings("addresses"):
        read = _read_address(address)
        if read.type == "IPAddress":
            with suppress(InvalidAddress):
                parse_ip(read.value)
                found.append(read)
        elif read.value:
            found.append(read)
    return tuple(found)
