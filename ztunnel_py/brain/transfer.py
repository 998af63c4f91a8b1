"""The whole state as the messages that a joining mover takes: what xDS would send to a client that holds nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mesh.state.store import MeshState
from mesh.xds.encode import Resource, policy_resource, service_resource, workload_resource
from mesh.xds.names import ADDRESS, AUTHORIZATION
from mesh.xds.proto import discovery_pb2 as discovery
from ztunnel_py import messages


def transfer_state(state: MeshState, unreadable: Mapping[str, bytes]) -> Iterator[messages.Resources]:
    """Policies first, so that no workload is known before those it names. ``unreadable`` are policies as they came, by key: a mover must
    find them as unreadable as we did."""
    readable = (policy_resource(policy) for policy in state.policies() if policy.unreadable is None)
    broken = (Resource(key, "", body) for key, body in unreadable.items())
    yield messages.Resources(True, _response(AUTHORIZATION, (*readable, *broken)))
    workloads = (workload_resource(workload) for workload in state.workloads())
    services = (service_resource(service) for service in state.services())
    yield messages.Resources(True, _response(ADDRESS, (*workloads, *services)))


def unreadable_bodies(raw: bytes, names: Iterable[str]) -> dict[str, bytes]:
    """From a response: the bodies of these resources."""
    wanted = set(names)
    response = discovery.DeltaDiscoveryResponse.FromString(raw)
    return {resource.name: resource.resource.value for resource in response.resources if resource.name in wanted}


def _response(type_url: str, resources: Iterable[Resource]) -> bytes:
    response = discovery.DeltaDiscoveryResponse(type_url=type_url)
    for resource in resources:
        added = response.resources.add(name=resource.name, version=resource.version)
        added.resource.type_url = type_url
        added.resource.value = resource.body
    return response.SerializeToString()
