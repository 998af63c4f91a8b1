"""What the control plane leaves all over a cluster while it runs, beside the objects of an installation: the root certificate in every
namespace, deployed waypoints and their class, its words in the status of users' objects. Found, and taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from mesh.kube.api import USER_AGENT, ApiClient, ApiError
from mesh.kube.gatewayapi.gateway import WAYPOINT_CLASS, WAYPOINT_CONTROLLER
from mesh.kube.ownership import CONTROLLERS, DEPLOYED, LISTS, LISTS_MANAGER, ROOT_MAP, ROOT_MAP_MANAGER, STATUS_MANAGERS
from mesh.kube.resources import CONFIG_MAPS, DAEMON_SETS, DEPLOYMENTS, RESOURCES, Resource
from mesh.model.labels import GATEWAY_MANAGED, GATEWAY_NAME, MESH_CONTROLLER
from meshctl_py.cluster.inventory import Entry
from meshctl_py.cluster.manifests import PART_OF, PROJECT
from meshctl_py.cluster.objects import AGENT, CONTROL_PLANE, SYSTEM_NAMESPACE, KubeStruct, Meta, Named, find_one, list_all

Tell = Callable[[str, str], None]
"""Takes an object and what was done to it."""

_SERVICES: Final = RESOURCES["Service"]
_CLASSES: Final = RESOURCES["GatewayClass"]

_T = TypeVar("_T", bound=KubeStruct)


class _Managed(KubeStruct, frozen=True):
    manager: str = ""
    subresource: str = ""


class _ManagedMeta(Meta, frozen=True):
    managed_fields: tuple[_Managed, ...] = ()


class _Spec(KubeStruct, frozen=True):
    controller_name: str = ""


class _ManagedObject(KubeStruct, frozen=True):
    metadata: _ManagedMeta
    status: dict[str, Any] | None = None

    def managers(self, subresource: str = "") -> set[str]:
        return {field.manager for field in self.metadata.managed_fields if field.subresource == subresource}


class _Class(_ManagedObject, frozen=True):
    spec: _Spec = _Spec()


@dataclass(frozen=True, slots=True)
class StatusTrace:
    """What we say in the status of a user's object, as one field manager. ``kept``: of a list that has one owner for all its items, those
    of other controllers."""

    resource: Resource
    namespace: str
    name: str
    manager: str
    kept: Mapping[str, list[Any]]

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.resource.kind, self.namespace, self.name)

    def __str__(self) -> str:
        return f"{self.resource.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.resource.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Traces:
    """``waypoints``: their Gateways, as ``namespace/name``; ``deployed``: what runs them; ``made_class``: the GatewayClass is ours alone;
    ``root_maps``: the namespaces that have one of ours."""

    waypoints: tuple[str, ...] = ()
    deployed: tuple[Entry, ...] = ()
    statuses: tuple[StatusTrace, ...] = ()
    made_class: bool = False
    root_maps: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.deployed or self.statuses or self.made_class or self.root_maps)


async def find_other_mesh(client: ApiClient) -> str:
    """The control plane or agents of a mesh that is not ours, Istio itself perhaps; empty: there is none. A cluster whose control plane is
    elsewhere has its Service. Raises ApiError, ApiUnavailable."""
    for resource, name in ((DEPLOYMENTS, CONTROL_PLANE), (DAEMON_SETS, AGENT), (_SERVICES, CONTROL_PLANE)):
        named = await find_one(client, resource, Named, SYSTEM_NAMESPACE, name)
        labelled = await list_all(client, resource, Named, labels=f"app={name}")
        for found in ([named] if named is not None else []) + labelled:
            if not is_ours(found):
                return f"{resource.kind} {found.metadata.namespace}/{found.metadata.name}"
    return ""


def is_ours(found: Named) -> bool:
    """Whether it belongs to an installation of ours."""
    return found.metadata.labels.get(PART_OF) == PROJECT


async def find_traces(client: ApiClient) -> Traces:
    """To be asked where no other mesh is: waypoints and statuses have Istio's names. Raises ApiError, ApiUnavailable."""
    deployed: list[Entry] = []
    waypoints: set[str] = set()
    for resource in DEPLOYED:
        for _, found in await _list_served(client, resource, Named, labels=f"{GATEWAY_MANAGED}={MESH_CONTROLLER}"):
            metadata = found.metadata
            deployed.append(Entry(resource.api_version, resource.plural, resource.kind, metadata.name, metadata.namespace))
            waypoints.add(f"{metadata.namespace}/{metadata.labels.get(GATEWAY_NAME, metadata.name)}")
    statuses = [trace for kind in STATUS_MANAGERS for trace in await _find_statuses(client, kind)]
    maps = await list_all(client, CONFIG_MAPS, _ManagedObject, fields=f"metadata.name={ROOT_MAP}")
    root_maps = sorted(found.metadata.namespace for found in maps if ROOT_MAP_MANAGER in found.managers())
    return Traces(tuple(sorted(waypoints)), tuple(deployed), tuple(statuses), await _made_class(client), tuple(root_maps))


async def _find_statuses(client: ApiClient, kind: str) -> list[StatusTrace]:
    traces: list[StatusTrace] = []
    for resource, found in await _list_served(client, RESOURCES[kind], _ManagedObject):
        place = (resource, found.metadata.namespace, found.metadata.name)
        managers = found.managers("status") & STATUS_MANAGERS[kind]
        name = LISTS.get(kind)
        if name is None:
            traces += (StatusTrace(*place, manager, {}) for manager in sorted(managers))
            continue
        listed = (found.status or {}).get(name) or []
        kept = [item for item in listed if item.get("controllerName") not in CONTROLLERS]
        if len(kept) < len(listed) or (managers and not kept):
            traces.append(StatusTrace(*place, LISTS_MANAGER, {name: kept} if kept else {}))
    return traces


async def _made_class(client: ApiClient) -> bool:
    """Whether we made the class of waypoints and nobody has changed it: Istio, or a user, would stand among the managers."""
    for _, found in await _list_served(client, _CLASSES, _Class, fields=f"metadata.name={WAYPOINT_CLASS}"):
        return found.spec.controller_name == WAYPOINT_CONTROLLER and found.managers() == {USER_AGENT}
    return False


async def _list_served(
    client: ApiClient, resource: Resource, kind: type[_T], *, labels: str = "", fields: str = ""
) -> list[tuple[Resource, _T]]:
    """All of a kind that the API server may not serve, or in an older version, which comes with each."""
    for version in (resource.version, *resource.older):
        at = resource.at(version)
        try:
            return [(at, found) for found in await list_all(client, at, kind, labels=labels, fields=fields)]
        except ApiError as exc:
            if exc.status != 404:
                raise
    return []


async def remove_traces(client: ApiClient, traces: Traces, tell: Tell) -> list[str]:
    """While no control plane runs that would make them anew. The root maps go last: they are what tells our leavings from another's when
    this is interrupted. Returns what is left, a sentence each. Raises ApiError, ApiUnavailable."""
    left: list[str] = []
    withdrawn: set[tuple[str, str, str]] = set()
    for trace in traces.statuses:
        try:
            await _withdraw(client, trace)
            withdrawn.add(trace.key)
        except ApiError as exc:
            if exc.status != 404:
                left.append(f"the status of {trace} still has our words: {exc.message}")
    if withdrawn:
        tell("our words", f"withdrawn from the status of {len(withdrawn)} objects")
    for entry in traces.deployed:
        if await delete(client, entry.path):
            tell(str(entry), f"deleted in namespace {entry.namespace}")
    if traces.made_class and await delete(client, _CLASSES.path("", WAYPOINT_CLASS)):
        tell(f"{_CLASSES.kind.lower()}.{_CLASSES.group}/{WAYPOINT_CLASS}", "deleted")
    count = sum([await delete(client, CONFIG_MAPS.path(namespace, ROOT_MAP)) for namespace in traces.root_maps])
    if count:
        tell(f"configmap/{ROOT_MAP}", f"deleted in {count} namespaces")
    return left


async def _withdraw(client: ApiClient, trace: StatusTrace) -> None:
    """An application without the fields it owned removes them."""
    resource = trace.resource
    names = {"name": trace.name, **({"namespace": trace.namespace} if resource.namespaced else {})}
    body: dict[str, Any] = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": names}
    if trace.kept:
        body["status"] = trace.kept
    await client.apply(resource.path(trace.namespace, trace.name, "status"), body, manager=trace.manager)


async def delete(client: ApiClient, path: str, *, propagation: str = "Background") -> bool:
    """Whether it was there. Raises ApiError, ApiUnavailable."""
    try:
        await client.delete(path, propagation=propagation)
    except ApiError as exc:
        if exc.status == 404:
            return False
        raise
    return True
