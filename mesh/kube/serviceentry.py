"""A ServiceEntry: hosts outside Kubernetes as services of the mesh. Checked as Istio's webhook and CRD rules check it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from mesh.kube.addresses import CIDR
from mesh.kube.fields import Fields, Rule, Text
from mesh.kube.hostnames import HOSTNAME_PATTERN, MAX_LENGTH, is_hostname, is_wildcard
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.workloadentry import EntryEndpoint, read_endpoint
from mesh.model.address import Cidr, InvalidAddress, IpAddress, parse_cidr, parse_ip

LOCATIONS = ("MESH_EXTERNAL", "MESH_INTERNAL")
RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")
PROTOCOLS = ("HTTP", "HTTPS", "HTTP2", "GRPC", "GRPC-WEB", "TCP", "TLS", "UDP", "MONGO", "REDIS", "MYSQL")
MAX_HOSTS = 256
MAX_ADDRESSES = 256
MAX_PORTS = 256
MAX_PORT_NAME = 256
MAX_ENDPOINTS = 4096
"""All as Istio's schema has them."""
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
    return parse_service_entry(fields), tuple(fields.problems)


def parse_service_entry(fields: Fields) -> KubeServiceEntry:
    """``fields`` of the whole object."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown(*_FIELDS)
    entry = KubeServiceEntry(
        namespace=obj.namespace,
        name=obj.name,
        labels=obj.labels,
        annotations=obj.annotations,
        hosts=_read_hosts(spec),
        addresses=_read_addresses(spec),
        ports=tuple(map(_read_port, spec.mappings("ports", most=MAX_PORTS))),
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
    return entry


def _read_hosts(spec: Fields) -> tuple[str, ...]:
    hosts = spec.strings("hosts", required=True, empty="a ServiceEntry needs at least one host", most=MAX_HOSTS, text=_HOST)
    return tuple(dict.fromkeys(hosts))


def _read_addresses(spec: Fields) -> tuple[Cidr, ...]:
    addresses: dict[Cidr, None] = {}
    for text in spec.strings("addresses", most=MAX_ADDRESSES, text=CIDR):
        with suppress(InvalidAddress):  # it was complained of
            addresses[parse_cidr(text)] = None
    return tuple(addresses)


def _read_port(fields: Fields) -> EntryPort:
    fields.refuse_unknown("name", "number", "protocol", "targetPort")
    return EntryPort(
        name=fields.string("name", required=True, text=_PORT_NAME),
        port=fields.integer("number", required=True, low=1, high=65535),
        target=fields.integer("targetPort", low=0, high=65535),
        protocol=fields.string("protocol", text=_PROTOCOL).upper(),
    )


def _read_endpoints(spec: Fields) -> tuple[EntryEndpoint, ...]:
    endpoints: dict[str, EntryEndpoint] = {}
    for fields in spec.mappings("endpoints", most=MAX_ENDPOINTS):
        endpoint = read_endpoint(fields)
        if endpoint.address in endpoints:
            # No rule for API servers: to compare thousands of addresses with each other costs more than they let a rule cost.
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
        with suppress(InvalidAddress):
            found.append((address.string("host"), parse_ip(address.string("value"))))
    return tuple(found)


def _find_host_mistake(host: str) -> str | None:
    return None if is_hostname(host) or is_wildcard(host) else f"expected a hostname or *.hostname, found '{host}'"


def _find_protocol_mistake(protocol: str) -> str | None:
    if not protocol or protocol.upper() in PROTOCOLS:
        return None
    return f"expected one of {', '.join(PROTOCOLS)}, found '{protocol}'"


def _find_name_mistake(name: str) -> str | None:
    return None if len(name) <= MAX_PORT_NAME else f"has {len(name)} characters, of at most {MAX_PORT_NAME}"


_HOST = Text(_find_host_mistake, {"pattern": rf"^(\*\.)?{HOSTNAME_PATTERN}$", "maxLength": MAX_LENGTH + len("*.")})
_PROTOCOL = Text(_find_protocol_mistake, {"pattern": f"^(?i:{'|'.join(PROTOCOLS)})?$"})
_PORT_NAME = Text(_find_name_mistake, {"maxLength": MAX_PORT_NAME})


def _check_together(entry: KubeServiceEntry, spec: Fields) -> None:
    """Fields that are right by themselves but not with each other."""
    ports = entry.ports
    spec.demand(_NUMBERS_DIFFER, [("ports", index, "number") for index in _repeated(port.port for port in ports)])
    spec.demand(_NAMES_DIFFER, [("ports", index, "name") for index in _repeated(port.name for port in ports)])
    spec.demand(_SELECTOR_OR_ENDPOINTS, [("workloadSelector",)] if entry.selector is not None and entry.endpoints else ())
    ranges = entry.resolves_names and any(cidr.num_addresses > 1 for cidr in entry.addresses)
    spec.demand(_NO_RANGES_BY_NAME, [("addresses",)] if ranges else ())
    spec.demand(_NONE_HAS_NO_ENDPOINTS, [("endpoints",)] if entry.resolution == "NONE" and entry.endpoints else ())
    names = [index for index, endpoint in enumerate(entry.endpoints) if endpoint.address and endpoint.ip is None]
    spec.demand(_STATIC_IS_BY_ADDRESS, [("endpoints", index, "address") for index in names] if entry.resolution == "STATIC" else ())
    looked_up = entry.resolution in ("DNS", "DNS_ROUND_ROBIN") and not entry.endpoints and entry.selector is None
    wildcards = [index for index, host in enumerate(entry.hosts) if host.startswith("*")]
    spec.demand(_NO_WILDCARD_LOOK_UP, [("hosts", index) for index in wildcards] if looked_up else ())
    one = entry.resolution == "DNS_ROUND_ROBIN" and len(entry.endpoints) > 1
    spec.demand(_ROUND_ROBIN_HAS_ONE, [("endpoints",)] if one else ())


def _repeated(values: Iterable[int | str]) -> list[int]:
    """The indices of values that were there before."""
    seen: set[int | str] = set()
    found: list[int] = []
    for index, value in enumerate(values):
        if value in seen:
            found.append(index)
        seen.add(value)
    return found


_NUMBERS_DIFFER = Rule(
    "this port is given twice",
    "!has(self.ports) || self.ports.all(a, self.ports.exists_one(b, a.number == b.number))",
    "ports",
)
_NAMES_DIFFER = Rule(
    "two ports have this name", "!has(self.ports) || self.ports.all(a, self.ports.exists_one(b, a.name == b.name))", "ports"
)
_NO_ENDPOINTS: Final = "(!has(self.endpoints) || size(self.endpoints) == 0)"
_SELECTOR_OR_ENDPOINTS = Rule(
    "a ServiceEntry takes a workloadSelector or endpoints, not both",
    f"!has(self.workloadSelector) || {_NO_ENDPOINTS}",
    "workloadSelector",
)
_NO_RANGES_BY_NAME = Rule(
    "address ranges need resolution NONE or STATIC",
    "!has(self.resolution) || self.resolution in ['NONE', 'STATIC'] || !has(self.addresses) || self.addresses.all(a, "
    "!a.contains('/') || a.endsWith('/128') || (a.endsWith('/32') && !a.contains(':')))",
    "addresses",
)
_NONE_HAS_NO_ENDPOINTS = Rule(
    "with resolution NONE connections go where they were going: it takes no endpoints",
    f"(has(self.resolution) && self.resolution != 'NONE') || {_NO_ENDPOINTS}",
    "endpoints",
)
_STATIC_IS_BY_ADDRESS = Rule(
    "with resolution STATIC an address must be an IP address",
    "!has(self.resolution) || self.resolution != 'STATIC' || !has(self.endpoints) || self.endpoints.all(e, "
    r"!has(e.address) || e.address.matches('^$|:|^[0-9]+(\\.[0-9]+){3}$'))",
    "endpoints",
)
_NO_WILDCARD_LOOK_UP = Rule(
    "a wildcard cannot be looked up in DNS: give endpoints for it",
    "!has(self.resolution) || !(self.resolution in ['DNS', 'DNS_ROUND_ROBIN']) || has(self.workloadSelector) || "
    f"!{_NO_ENDPOINTS} || self.hosts.all(h, !h.startsWith('*'))",
    "hosts",
)
_ROUND_ROBIN_HAS_ONE = Rule(
    "with resolution DNS_ROUND_ROBIN there can be only one endpoint",
    "!has(self.resolution) || self.resolution != 'DNS_ROUND_ROBIN' || !has(self.endpoints) || size(self.endpoints) <= 1",
    "endpoints",
)
