"""The whole state as the messages that a joining mover takes: what xDS would send to a client that holds nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from mesh.state.store import MeshState
from mesh.xds.encode import Resource, policy_resource, service_resource, workload_resource
from mesh.xds.names import ADDRESS, AUTHORIZATION
from mesh.xds.proto import discovery_pb2 as discovery
from ztunnel_py import messages

M = TypeVar("M")


def transfer_state(state: MeshState, unreadable: Mapping[str, bytes]) -> Iterator[messages.Resources]:
    """Policies first, so that no workload is known before those it names. ``unreadable`` are policies as they came, by key: a mover must
    find them as unreadable as we did."""
    readable = (policy_resource(policy) for policy in state.policies() if policy.unreadable is None)
    broken = (Resource(key, "", body) for key, body in unreadable.items())
    yield messages.Resources(True, _response(AUTHORIZATION, (*readable, *broken)))
    workloads = (workload_resource(workload) for workload in state.workloads())
    services = (service_resource(service) for service in state.services())
    yield messages.Resources(True, _response(ADDRESS, (*workloads, *services)))


class Newcomers(Generic[M]):
    """Which movers need the whole state. One that joins while the first configuration arrives has missed a part of it, and would wait for
    that for ever: it is told all once all is there."""

    def __init__(self) -> None:
        self._begun = False
        self._synced = False
        self._lacking: list[M] = []

    def came(self) -> None:
        """An update was passed on to the movers there are."""
        self._begun = True

    def joined(self, mover: M) -> bool:
        """Whether it must be given the whole state now."""
        if self._begun and not self._synced:
            self._lacking.append(mover)
        return self._synced

    def left(self, mover: M) -> None:
        if mover in self._lacking:
            self._lacking.remove(mover)

    def synced(self) -> list[M]:
        """The first configuration is complete; who must be given it whole."""
        self._synced = True
        lacking, self._lacking = self._lacking, []
        return lacking


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
