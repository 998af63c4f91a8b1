"""Where requests and connections are sent: names to services and their ports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from istiod_py.translate.l7.known import KnownServices, L7Service
from istiod_py.translate.l7.sources import Note, RouteDefaults, backend_host
from mesh.kube.gatewayapi.references import BackendRef
from mesh.kube.objects import FieldPath, ObjectKey
from mesh.kube.routeactions import Target
from mesh.model.l7.routing import Destination, HeaderChanges, WeightedDestination

NO_SUCH: Final = 503
"""The answer of a VirtualService whose destination is not there, as Envoy's for a cluster that is missing."""
BROKEN: Final = 500
"""The Gateway API's for a backend that can't be used."""
ISTIO_GROUP: Final = "networking.istio.io"
_SERVICE_IMPORT: Final = ("multicluster.x-k8s.io", "ServiceImport")


@dataclass(frozen=True, slots=True)
class Broken:
    """A backend that can't be used: ``reason`` as a condition has it."""

    reason: str
    message: str


def resolve_target(target: Target, namespace: str, known: KnownServices) -> WeightedDestination:
    """A VirtualService's destination, its host in full, with weight 1. Of a service with several ports, none of which it names, the port
    stays open. ``namespace``: the waypoint's."""
    service = known.find(target.host, namespace)
    if service is None:
        destination = Destination("", target.host, target.port, target.subset)
        return WeightedDestination(destination, fails_with=NO_SUCH, because=f"no service has the hostname {target.host}")
    chosen = target.port or (service.ports[0].number if len(service.ports) == 1 else 0)
    destination = Destination(service.namespace, service.hostname, chosen, target.subset)
    if chosen and not service.has_port(chosen):
        return WeightedDestination(destination, fails_with=NO_SUCH, because=lacks_port(service, chosen))
    return WeightedDestination(destination)


def note_subset(key: ObjectKey, path: FieldPath, destination: Destination, effect: str) -> Note:
    """For a VirtualService that names a subset: which there are is known only when everything that is routed is."""
    message = f"no DestinationRule defines subset {destination.subset} of {destination.hostname}: {effect}"
    return Note(key, path, message, destination)


def resolve_backend(ref: BackendRef, namespace: str, known: KnownServices, defaults: RouteDefaults) -> Destination | Broken:
    """A Gateway API backend of a route in ``namespace``. In a mesh, other namespaces need no ReferenceGrant."""
    if (ref.group, ref.kind) not in (("", "Service"), _SERVICE_IMPORT, (ISTIO_GROUP, "Hostname")):
        return Broken("InvalidKind", f"backends of kind {ref.kind} (group '{ref.group}') are not supported")
    if ref.kind == "Hostname" and ref.namespace:
        return Broken("UnsupportedValue", f"backend {ref.name}: a Hostname has no namespace")
    if not ref.port:
        return Broken("UnsupportedValue", f"backend {ref.name}: a port is required")
    host = backend_host(ref, namespace, defaults)
    service = known.find(host, namespace)
    if service is None:
        return Broken("BackendNotFound", f"backend({host}) not found")
    if not service.has_port(ref.port):
        return Broken("BackendNotFound", lacks_port(service, ref.port))
    return Destination(service.namespace, service.hostname, ref.port)


def weigh_backend(ref: BackendRef, namespace: str, known: KnownServices, defaults: RouteDefaults) -> WeightedDestination:
    """With its weight; one that can't be used keeps its share, and fails that."""
    found = resolve_backend(ref, namespace, known, defaults)
    if isinstance(found, Broken):
        return failing(backend_host(ref, namespace, defaults), ref.port, ref.weight, found.message)
    return WeightedDestination(found, ref.weight)


def failing(host: str, port: int, weight: int, because: str) -> WeightedDestination:
    return WeightedDestination(Destination("", host, port), weight, fails_with=BROKEN, because=because)


def combine(first: HeaderChanges, then: HeaderChanges) -> HeaderChanges:
    """One after the other, as one: Envoy removes before all else, and what is replaced later was added in vain before."""
    replaced = {name for name, _ in then.set}
    return HeaderChanges(
        set=(*(pair for pair in first.set if pair[0] not in replaced), *then.set),
        add=(*(pair for pair in first.add if pair[0] not in replaced), *then.add),
        remove=tuple(dict.fromkeys((*first.remove, *then.remove))),
    )


def lacks_port(service: L7Service, port: int) -> str:
    return f"{service.kind} {service.namespace}/{service.name} has no port {port}"
