"""A ServiceEntry: hosts outside Kubernetes as services of the mesh. Checked as Istio's webhook and CRD rules check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.kube.fields import Fields
from mesh.kube.hostnames import is_hostname, is_wildcard
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.workloadentry import ENDPOINT_FIELDS, EntryEndpoint, read_endpoint
from mesh.model.address import Cidr, InvalidAddress, IpAddress, parse_cidr, parse_ip

LOCATIONS = ("MESH_EXTERNAL", "MESH_INTERNAL")
RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")
PROTOCOLS = ("HTTP", "HTTPS", "HTTP2", "GRPC", "GRPC-WEB", "TCP", "TLS", "UDP", "MONGO", "REDIS", "MYSQL")
_FIELDS = (
    "hosts",
    "addresses",
    "ports",
    "location",
    "resolution",
    "endpoints",
    "workloadSelector",
    "exportTo",
    "subjectAltNames",
)


@dataclass(frozen=True, slots=True)
class EntryPort:
    name: str
    port: int
    target: int
    """0: none given."""
    protocol: str
    """Upper case; ``""`` where none is given."""


@dataclass(frozen=True, slots=True)
class KubeServiceEntry:
    namespace: str
    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    hosts: tuple[str, ...]
    addresses: tuple[Cidr, ...]
    """A single address is a range of one."""
    ports: tuple[EntryPort, ...]
    location: str
    resolution: str
    endpoints: tuple[EntryEndpoint, ...]
    selector: Mapping[str, str] | None
    """Of ``workloadSelector``; an empty one selects nothing."""
    export_to: tuple[str, ...]
    subject_alt_names: tuple[str, ...]
    allocated: tuple[tuple[str, IpAddress], ...]
    """(host, address) from ``status.addresses``: what an allocator that keeps its choices there has chosen before."""

    def selects(self, labels: Mapping[str, str]) -> bool:
        """Whether workloads of the namespace with these labels are endpoints."""
        return bool(self.selector and self.selector.items() <= labels.items())

    @property
    def resolves_names(self) -> bool:
        return self.resolution in ("DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")


def read_service_entry(obj: KubeObject) -> tuple[KubeServiceEntry, tuple[SourceProblem, ...]]:
    """The entry and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown(*_FIELDS)
    entry = KubeServiceEntry(
        namespace=obj.namespace,
        name=obj.name,
        labels=obj.labels,
        annotations=obj.annotations,
        hosts=_read_hosts(spec),
        addresses=_read_addresses(spec),
        ports=_read_ports(spec),
        location=spec.string("location", LOCATIONS[0], choices=LOCATIONS),
        resolution=spec.string("resolution", RESOLUTIONS[0], choices=RESOLUTIONS),
        endpoints=_read_endpoints(spec),
        selector=_read_selector(spec),
        export_to=spec.strings("exportTo"),
        subject_alt_names=spec.strings("subjectAltNames"),
        allocated=_read_allocated(fields),
    )
    if not fields.problems:
        _check_together(entry, spec)
    return entry, tuple(fields.problems)


def _read_hosts(spec: Fields) -> tuple[str, ...]:
    hosts = spec.strings("hosts", required=True)
    if spec.is_empty("hosts"):
        spec.complain("hosts", "a ServiceEntry needs at least one host")
    for index, host in enumerate(hosts):
        if not (is_hostname(host) or is_wildcard(host)):
            spec.complain("hosts", f"expected a hostname or *.hostname, found '{host}'", index)
    return tuple(dict.fromkeys(hosts))


def _read_addresses(spec: Fields) -> tuple[Cidr, ...]:
    addresses: dict[Cidr, None] = {}
    for index, text in enumerate(spec.strings("addresses")):
        try:
            addresses[parse_cidr(text)] = None
        except InvalidAddress as exc:
            spec.complain("addresses", str(exc), index)
    return tuple(addresses)


def _read_ports(spec: Fields) -> tuple[EntryPort, ...]:
    ports: list[EntryPort] = []
    numbers: set[int] = set()
    names: set[str] = set()
    for fields in spec.mappings("ports"):
        fields.refuse_unknown("name", "number", "protocol", "targetPort")
        port = EntryPort(
            name=fields.string("name", required=True),
            port=fields.integer("number", required=True, low=1, high=65535),
            target=fields.integer("targetPort", low=0, high=65535),
            protocol=fields.string("protocol").upper(),
        )
        if port.protocol and port.protocol not in PROTOCOLS:
            fields.complain("protocol", f"expected one of {', '.join(PROTOCOLS)}, found '{port.protocol}'")
        if port.port and port.port in numbers:
            fields.complain("number", f"port {port.port} is given twice")
        if port.name and port.name in names:
            fields.complain("name", f"two ports are named '{port.name}'")
        numbers.add(port.port)
        names.add(port.name)
        ports.append(port)
    return tuple(ports)


def _read_endpoints(spec: Fields) -> tuple[EntryEndpoint, ...]:
    endpoints: dict[str, EntryEndpoint] = {}
    for fields in spec.mappings("endpoints"):
        fields.refuse_unknown(*ENDPOINT_FIELDS)
        endpoint = read_endpoint(fields)
        if endpoint.address in endpoints:
            fields.complain("address" if endpoint.address else None, "endpoints are told apart by address, and this one is given twice")
        endpoints[endpoint.address] = endpoint
    return tuple(endpoints.values())


def _read_selector(spec: Fields) -> Mapping[str, str] | None:
    selector = spec.mapping("workloadSelector")
    if selector is None:
        return None
    selector.refuse_unknown("labels")
    return selector.string_map("labels")


def _read_allocated(fields: Fields) -> tuple[tuple[str, IpAddress], ...]:
    """Status is not the user's: what cannot be read there is passed over, and chosen anew."""
    status = fields.mapping("status")
    found: list[tuple[str, IpAddress]] = []
    for address in status.mappings("addresses") if status else ():
        try:
            found.append((address.string("host"), parse_ip(address.string("value"))))
        except InvalidAddress:
            continue
    return tuple(found)


def _check_together(entry: KubeServiceEntry, spec: Fields) -> None:
    """Fields that are right by themselves but not with each other."""
    if entry.selector is not None and entry.endpoints:
        spec.complain("workloadSelector", "a ServiceEntry takes a workloadSelector or endpoints, not both")
    if entry.resolves_names and any(cidr.num_addresses > 1 for cidr in entry.addresses):
        spec.complain("addresses", "address ranges need resolution NONE or STATIC")
    match entry.resolution:
        case "NONE" if entry.endpoints:
            spec.complain("endpoints", "with resolution NONE connections go where they were going: it takes no endpoints")
        case "STATIC":
            for index, endpoint in enumerate(entry.endpoints):
                if endpoint.address and endpoint.ip is None:
                    spec.complain("endpoints", "with resolution STATIC an address must be an IP address", index, "address")
        case "DNS" | "DNS_ROUND_ROBIN" if not entry.endpoints and entry.selector is None:
            for index, host in enumerate(entry.hosts):
                if host.startswith("*"):
                    spec.complain("hosts", f"a wildcard cannot be looked up in DNS: give endpoints for '{host}'", index)
    if entry.resolution == "DNS_ROUND_ROBIN" and len(entry.endpoints) > 1:
        spec.complain("endpoints", "with resolution DNS_ROUND_ROBIN there can be only one endpoint")
