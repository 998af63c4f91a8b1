"""A WorkloadEntry (a workload that is no pod: a virtual machine, an outside address), and the same thing inside a ServiceEntry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.kube.fields import Fields, Text
from mesh.kube.hostnames import HOSTNAME_PATTERN, MAX_LENGTH, is_hostname
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.model.address import InvalidAddress, IpAddress, parse_ip

_FIELDS = ("address", "ports", "labels", "network", "locality", "weight", "serviceAccount")


@dataclass(frozen=True, slots=True)
class EntryEndpoint:
    """One address outside Kubernetes and what is known of it."""

    address: str
    """An IP, a hostname, or ``""``: known only by name, reached through a network's gateway if at all."""
    ip: IpAddress | None
    ports: Mapping[str, int]
    """Port numbers here, by the service's port name."""
    labels: Mapping[str, str]
    network: str
    """``""``: the cluster's."""
    locality: str
    """``region/zone/subzone``, any tail left out."""
    weight: int
    """0: none given."""
    service_account: str


@dataclass(frozen=True, slots=True)
class KubeWorkloadEntry:
    namespace: str
    name: str
    labels: Mapping[str, str]
    """``spec.labels`` over the object's own."""
    annotations: Mapping[str, str]
    endpoint: EntryEndpoint


def read_workload_entry(obj: KubeObject) -> tuple[KubeWorkloadEntry, tuple[SourceProblem, ...]]:
    """The entry and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    return parse_workload_entry(fields), tuple(fields.problems)


def parse_workload_entry(fields: Fields) -> KubeWorkloadEntry:
    """``fields`` of the whole object."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    endpoint = read_endpoint(spec)
    return KubeWorkloadEntry(obj.namespace, obj.name, {**obj.labels, **endpoint.labels}, obj.annotations, endpoint)


def read_endpoint(fields: Fields) -> EntryEndpoint:
    """The fields that a WorkloadEntry's ``spec`` and an item of a ServiceEntry's ``endpoints`` share."""
    fields.refuse_unknown(*_FIELDS)
    address = fields.string("address", text=_ADDRESS)
    return EntryEndpoint(
        address=address,
        ip=_find_ip(address),
        ports=fields.integer_map("ports", low=1, high=65535),
        labels=fields.string_map("labels"),
        network=fields.string("network"),
        locality=fields.string("locality"),
        weight=fields.integer("weight", low=0, high=2**32 - 1),
        service_account=fields.string("serviceAccount"),
    )


def _find_ip(address: str) -> IpAddress | None:
    try:
        return parse_ip(address)
    except InvalidAddress:
        return None


def _find_mistake(address: str) -> str | None:
    if not address or is_hostname(address) or _find_ip(address) is not None:
        return None
    if address.startswith("unix:"):
        return "a Unix socket is out of a node proxy's reach: give an IP address or a hostname"
    return f"expected an IP address or a hostname, found '{address}'"


_ADDRESS = Text(
    _find_mistake,
    {"maxLength": MAX_LENGTH, "anyOf": [{"maxLength": 0}, {"format": "ipv4"}, {"format": "ipv6"}, {"pattern": f"^{HOSTNAME_PATTERN}$"}]},
)
