"""Taking the mesh out of a cluster, so that nothing of ours is left and nobody's pods notice more than they must.

Agents go first, and as long as they live the control plane must too: an agent whose DaemonSet is being deleted releases its node's pods,
and their peers have to hear that they are no longer reached by tunnels. Only then what the agents stood on is removed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from mesh.kube.api import ApiClient, ApiError
from mesh.kube.resources import CONFIG_MAPS, DAEMON_SETS, LEASES, RESOURCES, SECRETS, Resource
from mesh.model.labels import DATAPLANE_MODE, REDIRECTION
from meshctl_py.cluster import inventory
from meshctl_py.cluster.discovery import Discovery
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.inventory import Entry, read_installation
from meshctl_py.cluster.manifests import CRD_KIND, PART_OF, PROJECT, Manifests
from meshctl_py.cluster.objects import (
    AGENT,
    CONTROL_PLANE,
    NODES,
    PODS,
    SYSTEM_NAMESPACE,
    KubeStruct,
    Meta,
    Named,
    Pod,
    find_one,
    list_all,
)

POLL: Final = 0.5
NAMESPACES: Final = RESOURCES["Namespace"]
_RUNTIME: Final = ((SECRETS, "istio-ca-secret"), (LEASES, "istiod-py-leader"), (CONFIG_MAPS, inventory.NAME))
"""What the control plane makes for itself in its namespace, and what we noted down. A CA that was plugged in (cacerts) is the user's."""
_ROOT_MAP: Final = "istio-ca-root-cert"
_ROOT_MANAGER: Final = "istiod-py"
_STATUS_MANAGER: Final = "istio-ambient-ztunnel-policy"
_STATUS_KINDS: Final = ("AuthorizationPolicy",)
_OF_EVERY_NAMESPACE: Final = frozenset({("ConfigMap", "kube-root-ca.crt"), ("ConfigMap", _ROOT_MAP), ("ServiceAccount", "default")})
_PASSING: Final = frozenset({"Event", "Endpoints", "EndpointSlice", "PodMetrics", "Pod", "ReplicaSet", "ControllerRevision", "Lease"})
"""Kinds that follow others and go by themselves."""

Tell = Callable[[str, str], None]


class _Managed(KubeStruct, frozen=True):
    manager: str = ""
    subresource: str = ""


class _ManagedMeta(Meta, frozen=True):
    managed_fields: tuple[_Managed, ...] = ()


class _ManagedObject(KubeStruct, frozen=True):
    metadata: _ManagedMeta


@dataclass(frozen=True, slots=True)
class Removal:
    """What would be removed. ``entries`` without CRDs and the namespace; ``namespace``: whether that goes too, unless there is something of
    others in it; ``labels``: ours on it; ``custom``: how many of users' objects go with ``crds``."""

    entries: tuple[Entry, ...]
    crds: tuple[Entry, ...]
    namespace: bool
    labels: tuple[str, ...]
    captured: int
    enrolled: tuple[str, ...]
    custom: Mapping[str, int]


async def plan_removal(client: ApiClient, manifests: Manifests, *, purge: bool) -> Removal | None:
    """None if nothing of ours is there. Raises ApiError, ApiUnavailable."""
    discovery = Discovery(client)
    noted = await read_installation(client)
    wanted = list(noted.entries) if noted is not None else []
    for obj in manifests.objects:
        resource = await discovery.find(obj["apiVersion"], obj["kind"])
        if resource is not None:
            wanted.append(Entry.of(resource, obj))
    ours = [entry for entry in dict.fromkeys(wanted) if await _is_ours(client, entry)]
    crds = tuple(entry for entry in ours if entry.kind == CRD_KIND) if purge else ()
    entries = tuple(entry for entry in ours if entry.kind not in (CRD_KIND, "Namespace"))
    namespace = next((entry for entry in ours if entry.kind == "Namespace"), None)
    if not entries and not crds and noted is None and namespace is None:
        return None
    labels: Mapping[str, str] = next((obj["metadata"]["labels"] for obj in manifests.objects if obj["kind"] == "Namespace"), {})
    return Removal(
        entries=entries,
        crds=crds,
        namespace=namespace is not None and (noted is None or noted.made_namespace),
        labels=tuple(labels) if namespace is not None else (),
        captured=len(await find_captured(client)),
        enrolled=tuple(
            sorted(found.metadata.name for found in await list_all(client, NAMESPACES, Named, labels=f"{DATAPLANE_MODE}=ambient"))
        ),
        custom={entry.name: count for entry in crds if (count := await _count_custom(client, entry))},
    )


async def _is_ours(client: ApiClient, entry: Entry) -> bool:
    found = await client.find(entry.path)
    metadata: Any = found.get("metadata", {}) if found is not None else {}
    return bool((metadata.get("labels") or {}).get(PART_OF) == PROJECT)


async def _count_custom(client: ApiClient, crd: Entry) -> int:
    """How many objects there are of the kind that a CustomResourceDefinition defines."""
    found: Any = await client.get(crd.path)
    spec = found["spec"]
    version = next((entry["name"] for entry in spec["versions"] if entry.get("storage")), "")
    resource = Resource(spec["group"], version, spec["names"]["plural"], spec["names"]["kind"])
    return len(await list_all(client, resource, Named))


async def find_captured(client: ApiClient) -> list[Pod]:
    """The pods that say they are captured. Raises ApiError, ApiUnavailable."""
    return [pod for pod in await list_all(client, PODS, Pod) if pod.metadata.annotations.get(REDIRECTION) == "enabled"]


async def release_pods(client: ApiClient, patience: float, show: Callable[[Sequence[tuple[str, str]]], None]) -> list[str]:
    """Delete the DaemonSet and wait until its agents have released their pods and are gone. Returns what could not be released, one
    sentence each. Raises ClusterProblem when agents do not go within ``patience`` seconds; ApiError, ApiUnavailable."""
    path = DAEMON_SETS.path(SYSTEM_NAMESPACE, AGENT)
    try:
        # Foreground: the DaemonSet stays, marked, until its pods are gone. By the mark agents know that nobody follows them.
        await client.delete(path, propagation="Foreground")
    except ApiError as exc:
        if exc.status != 404:
            raise
    left: list[Pod] = []
    with trio.move_on_after(patience):
        while True:
            left = await list_all(client, PODS, Pod, namespace=SYSTEM_NAMESPACE, labels=f"app={AGENT}")
            if not left and await client.find(path) is None:
                return [await _why_captured(client, pod) for pod in await find_captured(client)]
            show([(f"agent of {pod.spec.node_name}", "releases its pods") for pod in left])
            await trio.sleep(POLL)
    names = ", ".join(sorted(f"{pod.metadata.name} on {pod.spec.node_name}" for pod in left)) or "the DaemonSet"
    raise ClusterProblem(
        f"agents do not end within {patience:g} s: {names}. The control plane is left as it is, so that pods keep their connections. "
        "Is a node gone? 'kubectl get nodes'; then delete it or its agent's pod (kubectl delete pod --force), and uninstall again"
    )


async def _why_captured(client: ApiClient, pod: Pod) -> str:
    node = await find_one(client, NODES, Named, "", pod.spec.node_name)
    where = f"its node {pod.spec.node_name} " + ("is gone" if node is None else "had no agent that could release it")
    return f"pod {pod.metadata.namespace}/{pod.metadata.name} still says that it is captured: {where}; restart the pod"


async def remove_rest(client: ApiClient, removal: Removal, patience: float, tell: Tell) -> list[str]:
    """All but the agents, which must be gone. Returns what was left alone and why. Raises ClusterProblem, ApiError, ApiUnavailable."""
    await _withdraw_statuses(client)
    for entry in reversed(removal.entries):
        if entry.kind == "DaemonSet" and entry.name == AGENT:
            tell(str(entry), "deleted")  # by `release_pods`
        elif await _delete(client, entry.path):
            tell(str(entry), "deleted")
    await _wait_pods_gone(client, patience)
    for resource, name in _RUNTIME:
        if await _delete(client, resource.path(SYSTEM_NAMESPACE, name)):
            tell(f"{resource.kind.lower()}/{name}", "deleted")
    count = await _delete_root_maps(client)
    if count:
        tell(f"configmap/{_ROOT_MAP}", f"deleted in {count} namespaces")
    others = await _others_in(client) if removal.namespace else []
    left: list[str] = []
    if removal.namespace and not others:
        left += await _remove_namespace(client, patience, tell)
    elif removal.labels:
        await client.merge_patch(NAMESPACES.path("", SYSTEM_NAMESPACE), {"metadata": {"labels": dict.fromkeys(removal.labels)}})
        tell(f"namespace/{SYSTEM_NAMESPACE}", "is yours, and stays without our labels")
    if others:
        shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        left.append(f"namespace {SYSTEM_NAMESPACE} stays, since there is more in it than ours: {shown}")
    for entry in removal.crds:
        if await _delete(client, entry.path):
            tell(str(entry), "deleted")
    return left


async def _delete(client: ApiClient, path: str) -> bool:
    try:
        await client.delete(path, propagation="Background")
    except ApiError as exc:
        if exc.status == 404:
            return False
        raise
    return True


async def _wait_until(holds: Callable[[], Awaitable[bool]], patience: float) -> bool:
    """Whether it came to hold within so many seconds; what has to go is looked for now and then, since it is few and seldom."""
    with trio.move_on_after(patience):
        while not await holds():  # noqa: ASYNC110  the API server is asked again
            await trio.sleep(POLL)
        return True
    return False


async def _wait_pods_gone(client: ApiClient, patience: float) -> None:
    async def gone() -> bool:
        return not await list_all(client, PODS, Pod, namespace=SYSTEM_NAMESPACE, labels=f"app={CONTROL_PLANE}")

    if not await _wait_until(gone, patience):
        raise ClusterProblem(f"the control plane's pods do not end within {patience:g} s: kubectl get pods -n {SYSTEM_NAMESPACE}")


async def _delete_root_maps(client: ApiClient) -> int:
    """Those that our control plane wrote; Istio's have the same name."""
    maps = await list_all(client, CONFIG_MAPS, _ManagedObject, fields=f"metadata.name={_ROOT_MAP}")
    ours = [found for found in maps if any(field.manager == _ROOT_MANAGER for field in found.metadata.managed_fields)]
    for found in ours:
        await _delete(client, CONFIG_MAPS.path(found.metadata.namespace, _ROOT_MAP))
    return len(ours)


async def _withdraw_statuses(client: ApiClient) -> None:
    """Take our conditions off the users' objects: nobody keeps them true any more."""
    for kind in _STATUS_KINDS:
        resource = RESOURCES[kind]
        try:
            objects = await list_all(client, resource, _ManagedObject)
        except ApiError as exc:
            if exc.status == 404:
                continue  # the kind is not served
            raise
        for found in objects:
            metadata = found.metadata
            if any(field.manager == _STATUS_MANAGER and field.subresource == "status" for field in metadata.managed_fields):
                names = {"name": metadata.name, "namespace": metadata.namespace}
                # An application without the fields it owned removes them.
                body = {"apiVersion": resource.api_version, "kind": kind, "metadata": names}
                try:
                    await client.apply(resource.path(metadata.namespace, metadata.name, "status"), body, manager=_STATUS_MANAGER)
                except ApiError as exc:
                    if exc.status != 404:
                        raise


async def _remove_namespace(client: ApiClient, patience: float, tell: Tell) -> list[str]:
    path = NAMESPACES.path("", SYSTEM_NAMESPACE)

    async def gone() -> bool:
        return await client.find(path) is None

    if not await _delete(client, path):
        return []
    if not await _wait_until(gone, patience):
        return [
            f"namespace {SYSTEM_NAMESPACE} is still being deleted: 'kubectl describe namespace {SYSTEM_NAMESPACE}' says what it waits for"
        ]
    tell(f"namespace/{SYSTEM_NAMESPACE}", "deleted")
    return []


async def _others_in(client: ApiClient) -> list[str]:
    """What somebody has put of their own into our namespace."""
    found: list[str] = []
    for resource in await Discovery(client).list_namespaced():
        if resource.kind in _PASSING:
            continue
        try:
            objects = await list_all(client, resource, Named, namespace=SYSTEM_NAMESPACE)
        except ApiError as exc:
            if exc.status in (403, 404, 405):
                continue
            raise
        found += (
            f"{resource.kind} {item.metadata.name}"
            for item in objects
            if item.metadata.deletion_timestamp is None and (resource.kind, item.metadata.name) not in _OF_EVERY_NAMESPACE
        )
    return sorted(set(found))


def describe(removal: Removal) -> Iterable[str]:
    """What an uninstallation would do, for the question before it."""
    yield f"This removes the mesh: {len(removal.entries)} objects" + (
        f" and the namespace {SYSTEM_NAMESPACE}." if removal.namespace else "."
    )
    if removal.captured:
        yield f"{removal.captured} pods are released: they run on, and what they say to each other from then on is no longer encrypted."
    if removal.enrolled:
        shown = ", ".join(removal.enrolled[:10]) + (" ..." if len(removal.enrolled) > 10 else "")
        yield f"Labels of namespaces stay as they are ({shown})."
    for name, count in removal.custom.items():
        yield f"--purge deletes {name} and with it {count} objects of yours."
