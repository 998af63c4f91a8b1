"""A WorkloadEntry (a workload that is no pod: a virtual machine, an outside address), and the same thing inside a ServiceEntry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.kube.fields import Fields
from mesh.kube.hostnames import is_hostname
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.model.address import InvalidAddress, IpAddress, parse_ip

ENDPOINT_FIELDS = ("address", "ports", "labels", "network", "locality", "weight", "serviceAccount")


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
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown(*ENDPOINT_FIELDS)
    endpoint = read_endpoint(spec)
    labels = {**obj.labels, **endpoint.labels}
    return KubeWorkloadEntry(obj.namespace, obj.name, labels, obj.annotations, endpoint), tuple(fields.problems)


def read_endpoint(fields: Fields) -> EntryEndpoint:
    """The fields that a WorkloadEntry's ``spec`` and an item of a ServiceEntry's ``endpoints`` share."""
    address, ip = _read_address(fields)
    ports = fields.mapping("ports")
    return EntryEndpoint(
        address=address,
        ip=ip,
        ports={name: ports.integer(name, low=1, high=65535) for name in ports} if ports else {},
        labels=fields.string_map("labels"),
        network=fields.string("network"),
        locality=fields.string("locality"),
        weight=fields.integer("weight", low=0, high=2**32 - 1),
        service_account=fields.string("serviceAccount"),
    )


def _read_address(fields: Fields) -> tuple[str, IpAddress | None]:
    address = fields.string("address")
    try:
        return address, parse_ip(address)
    except InvalidAddress:
        pass
    if address.startswith("unix:"):
        fields.complain("address", "a Unix socket is out of a node proxy's reach: give an IP address or a hostname")
    elif address and not is_hostname(address):
        fields.complain("address", f"expected an IP address or a hostname, found '{address}'")
    return address, None
