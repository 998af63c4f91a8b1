"""A Service as the mesh reads it: virtual addresses, ports, selector and how to choose among its endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.kube.fields import Fields
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.pod import PROTOCOLS
from mesh.model.address import InvalidAddress, IpAddress, parse_ip

TRAFFIC_DISTRIBUTIONS = ("PreferClose", "PreferSameZone", "PreferSameNode")


@dataclass(frozen=True, slots=True)
class KubeServicePort:
    name: str
    protocol: str
    port: int
    target: int | str
    """A port number, or the name of a port that each pod's containers give a number."""
    app_protocol: str


@dataclass(frozen=True, slots=True)
class KubeService:
    namespace: str
    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    type: str
    selector: Mapping[str, str]
    cluster_ips: tuple[IpAddress, ...]
    headless: bool
    """``clusterIP: None``: no virtual address by intent. A service that has none *yet* is not headless."""
    ip_families: tuple[str, ...]
    ports: tuple[KubeServicePort, ...]
    publish_not_ready: bool
    internal_traffic_local: bool
    traffic_distribution: str
    external_name: str

    def selects(self, labels: Mapping[str, str]) -> bool:
        """Whether pods with these labels are endpoints; an empty selector selects none."""
        return bool(self.selector) and self.selector.items() <= labels.items()


def read_service(obj: KubeObject) -> tuple[KubeService, tuple[SourceProblem, ...]]:
    """The service and every mistake in it; with a mistake the service is not for use."""
    fields = Fields(obj)
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    kind = spec.string("type", "ClusterIP", choices=("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"))
    addresses = _read_addresses(spec)
    headless = any(text == "None" for _, _, text in addresses)
    service = KubeService(
        namespace=obj.namespace,
        name=obj.name,
        labels=obj.labels,
        annotations=obj.annotations,
        type=kind,
        selector=spec.string_map("selector"),
        cluster_ips=() if headless else _parse_addresses(spec, addresses),
        headless=headless,
        ip_families=_read_families(spec) or _families_of(addresses),
        ports=tuple(_read_port(port) for port in spec.mappings("ports")),
        publish_not_ready=spec.boolean("publishNotReadyAddresses"),
        internal_traffic_local=spec.string("internalTrafficPolicy", "Cluster", choices=("Cluster", "Local")) == "Local",
        traffic_distribution=spec.string("trafficDistribution", choices=TRAFFIC_DISTRIBUTIONS),
        external_name=spec.string("externalName"),
    )
    return service, tuple(fields.problems)


def _read_addresses(spec: Fields) -> tuple[tuple[str, int | None, str], ...]:
    """(field, index, text) of every cluster IP: ``clusterIPs`` is the whole list, ``clusterIP`` its first element."""
    several = spec.strings("clusterIPs")
    if several:
        return tuple(("clusterIPs", index, text) for index, text in enumerate(several) if text)
    one = spec.string("clusterIP")
    return (("clusterIP", None, one),) if one else ()


def _parse_addresses(spec: Fields, addresses: tuple[tuple[str, int | None, str], ...]) -> tuple[IpAddress, ...]:
    ips: dict[IpAddress, None] = {}
    for key, index, text in addresses:
        try:
            ips[parse_ip(text)] = None
        except InvalidAddress as exc:
            spec.complain(key, str(exc), *(() if index is None else (index,)))
    return tuple(ips)


def _read_families(spec: Fields) -> tuple[str, ...]:
    families = spec.strings("ipFamilies")
    for index, family in enumerate(families):
        if family not in ("IPv4", "IPv6"):
            spec.complain("ipFamilies", f"expected IPv4 or IPv6, found '{family}'", index)
    return families


def _families_of(addresses: tuple[tuple[str, int | None, str], ...]) -> tuple[str, ...]:
    """What an API server fills in where ``ipFamilies`` is not given: the families of the addresses. Empty where there are none."""
    return tuple(dict.fromkeys("IPv6" if ":" in text else "IPv4" for _, _, text in addresses if text != "None"))


def _read_port(port: Fields) -> KubeServicePort:
    number = port.integer("port", required=True, low=1, high=65535)
    target = port.number_or_string("targetPort")
    if isinstance(target, int) and target != 0 and not 0 < target < 65536:
        port.complain("targetPort", f"expected a number from 1 to 65535, found {target}")
    return KubeServicePort(
        name=port.string("name"),
        protocol=port.string("protocol", "TCP", choices=PROTOCOLS),
        port=number,
        target=target or number,
        app_protocol=port.string("appProtocol"),
    )
