"""An EndpointSlice (discovery.k8s.io/v1): endpoints of a Service that no selector found. Endpoints that are pods are kept by name only,
since the pods themselves say more; most slices of a cluster are made from selectors, and hold nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mesh.kube.fields import Fields
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.kube.pod import PROTOCOLS
from mesh.model.address import InvalidAddress, IpAddress, parse_ip

SERVICE_NAME = "kubernetes.io/service-name"
ADDRESS_TYPES = ("IPv4", "IPv6", "FQDN")


class PodReference(NamedTuple):
    """An endpoint that is a pod. ``uid`` ``""``: any pod of that name."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class SlicePort:
    name: str
    """The Service's name for it."""
    port: int
    """0: none given, which Kubernetes lets mean all ports."""
    protocol: str


@dataclass(frozen=True, slots=True)
class SliceEndpoint:
    """An endpoint that is no pod."""

    addresses: tuple[IpAddress, ...]
    ready: bool
    node: str


@dataclass(frozen=True, slots=True)
class KubeEndpointSlice:
    namespace: str
    name: str
    service: str
    """The Service it belongs to, in the same namespace; ``""``: to none."""
    ports: tuple[SlicePort, ...]
    endpoints: tuple[SliceEndpoint, ...]
    """Empty for slices of hostnames, which nothing uses."""
    pods: tuple[PodReference, ...]


def read_endpoint_slice(obj: KubeObject) -> tuple[KubeEndpointSlice, tuple[SourceProblem, ...]]:
    """The slice and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    kind = fields.string("addressType", required=True, choices=ADDRESS_TYPES)
    endpoints: list[SliceEndpoint] = []
    pods: list[PodReference] = []
    for endpoint in fields.mappings("endpoints"):
        if kind == "FQDN":
            continue
        reference = endpoint.mapping("targetRef")
        if reference is not None and reference.string("kind") == "Pod":
            pods.append(_read_reference(reference, obj.namespace))
        else:
            endpoints.append(_read_endpoint(endpoint, kind))
    found = KubeEndpointSlice(
        namespace=obj.namespace,
        name=obj.name,
        service=obj.labels.get(SERVICE_NAME, ""),
        ports=tuple(_read_port(port) for port in fields.mappings("ports")),
        endpoints=tuple(endpoints),
        pods=tuple(pods),
    )
    return found, tuple(fields.problems)


def _read_reference(reference: Fields, namespace: str) -> PodReference:
    return PodReference(reference.string("namespace", namespace), reference.string("name", required=True), reference.string("uid"))


def _read_endpoint(endpoint: Fields, kind: str) -> SliceEndpoint:
    addresses: dict[IpAddress, None] = {}
    for index, text in enumerate(endpoint.strings("addresses", required=True)):
        try:
            ip = parse_ip(text)
        except InvalidAddress as exc:
            endpoint.complain("addresses", str(exc), index)
            continue
        if kind and kind != f"IPv{ip.version}":
            endpoint.complain("addresses", f"{text} is no {kind} address, as addressType says", index)
        addresses[ip] = None
    if endpoint.is_empty("addresses"):
        endpoint.complain("addresses", "an endpoint needs an address")
    conditions = endpoint.mapping("conditions")
    return SliceEndpoint(tuple(addresses), conditions is None or conditions.boolean("ready", True), endpoint.string("nodeName"))


def _read_port(port: Fields) -> SlicePort:
    return SlicePort(
        name=port.string("name"),
        port=port.integer("port", low=1, high=65535),
        protocol=port.string("protocol", "TCP", choices=PROTOCOLS),
    )
