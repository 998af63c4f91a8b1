"""Taking the mesh out of a cluster, so that nothing of ours is left and nobody's pods notice more than they must.

Agents go first, and as long as they live the control plane must too: an agent whose DaemonSet is being deleted releases its node's pods,
and their peers have to hear that they are no longer reached by tunnels. Then the control plane, which would make anew what it has made.
Waypoints are next, since no agent sends to them any more, and what else it wrote all over the cluster.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from mesh.kube.api import ApiClient, ApiError
from mesh.kube.ownership import ROOT_MAP
from mesh.kube.resources import CONFIG_MAPS, DAEMON_SETS, LEASES, RESOURCES, SECRETS, Resource
from mesh.model.labels import DATAPLANE_MODE, REDIRECTION
from meshctl_py.cluster import inventory
from meshctl_py.cluster.discovery import Discovery
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.inventory import Entry, read_installation
from meshctl_py.cluster.manifests import CRD_KIND, Manifests
from meshctl_py.cluster.objects import (
    AGENT,
    CONTROL_PLANE,
    NODES,
    PODS,
    SYSTEM_NAMESPACE,
    Named,
    Pod,
    find_one,
    list_all,
)
from meshctl_py.cluster.traces import Tell, Traces, delete, find_other_mesh, find_traces, is_ours, remove_traces

POLL: Final = 0.5
NAMESPACES: Final = RESOURCES["Namespace"]
_AUTHORITY: Final = (SECRETS, "istio-ca-secret")
"""The key that the control plane makes. A CA that was plugged in (cacerts) is the user's."""
_RUNTIME: Final = ((LEASES, "istiod-py-leader"), (SECRETS, "istiod-py-key-sets"), (CONFIG_MAPS, inventory.NAME))
"""What it makes for itself besides, and what we noted down."""
_SHARED: Final = "waypoints, statuses, the authority's key and its root certificate"
_OF_EVERY_NAMESPACE: Final = frozenset({("ConfigMap", "kube-root-ca.crt"), ("ConfigMap", ROOT_MAP), ("ServiceAccount", "default")})
_PASSING: Final = frozenset({"Event", "Endpoints", "EndpointSlice", "PodMetrics", "Pod", "ReplicaSet", "ControllerRevision", "Lease"})
"""Kinds that follow others and go by themselves."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What would be removed. ``entries`` without CRDs and the namespace; ``namespace``: whether that goes too, unless there is something of
    others in it; ``labels``: ours on it; ``custom``: how many of users' objects go with ``crds``. ``other``: another mesh in the cluster,
    to which all is left that has the same name with it, so that there are no ``traces``."""

    entries: tuple[Entry, ...]
    crds: tuple[Entry, ...]
    namespace: bool
    labels: tuple[str, ...]
    captured: int
    enrolled: tuple[str, ...]
    custom: Mapping[str, int]
    traces: Traces
    other: str

    @property
    def installed(self) -> bool:
        """Whether there is more than what the control plane left all over the cluster."""
        return bool(self.entries or self.namespace or self.labels)


async def plan_removal(client: ApiClient, manifests: Manifests, *, purge: bool) -> Removal | None:
    """None if nothing of ours is there. Raises ApiError, ApiUnavailable."""
    discovery = Discovery(client)
    noted = await read_installation(client)
    wanted = list(noted.entries) if noted is not None else []
    for obj in manifests.objects:
        resource = await discovery.find(obj["apiVersion"], obj["kind"])
        if resource is not None:
            wanted.append(Entry.of(resource, obj))
    ours = [entry for entry in dict.fromkeys(wanted) if await _find_ours(client, entry.resource, entry.namespace, entry.name)]
    crds = tuple(entry for entry in ours if entry.kind == CRD_KIND) if purge else ()
    entries = tuple(entry for entry in ours if entry.kind not in (CRD_KIND, "Namespace"))
    namespace = next((entry for entry in ours if entry.kind == "Namespace"), None)
    other = await find_other_mesh(client)
    traces = await find_traces(client) if not other else Traces()
    if not entries and not crds and noted is None and namespace is None and not traces:
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
        traces=traces,
        other=other,
    )


async def _find_ours(client: ApiClient, resource: Resource, namespace: str, name: str) -> bool:
    found = await find_one(client, resource, Named, namespace, name)
    return found is not None and is_ours(found)


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
    agents = await find_one(client, DAEMON_SETS, Named, SYSTEM_NAMESPACE, AGENT)
    if agents is not None and not is_ours(agents):
        return []  # another mesh's, and so are the pods they have captured
    # Foreground: the DaemonSet stays, marked, until its pods are gone. By the mark agents know that nobody follows them.
    await delete(client, path, propagation="Foreground")
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
    for entry in reversed(removal.entries):
        if entry.kind == "DaemonSet" and entry.name == AGENT:
            tell(str(entry), "deleted")  # by `release_pods`
        elif await delete(client, entry.path):
            tell(str(entry), "deleted")
    if not removal.other:
        await _wait_pods_gone(client, patience)
    for resource, name in _RUNTIME if removal.other else (_AUTHORITY, *_RUNTIME):
        if await delete(client, resource.path(SYSTEM_NAMESPACE, name)):
            tell(f"{resource.kind.lower()}/{name}", "deleted")
    left: list[str] = []
    if removal.other:
        left.append(f"another mesh is here, {removal.other}: {_SHARED} are left to it, since its own have the same names")
    else:
        # Looked for again: until now the control plane may have made more.
        left += await remove_traces(client, await find_traces(client), tell)
    others = await _others_in(client) if removal.namespace else []
    if removal.namespace and not others:
        left += await _remove_namespace(client, patience, tell)
    elif removal.labels:
        await client.merge_patch(NAMESPACES.path("", SYSTEM_NAMESPACE), {"metadata": {"labels": dict.fromkeys(removal.labels)}})
        tell(f"namespace/{SYSTEM_NAMESPACE}", "is yours, and stays without our labels")
    if others:
        shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        left.append(f"namespace {SYSTEM_NAMESPACE} stays, since there is more in it than ours: {shown}")
    for entry in removal.crds:
        if await delete(client, entry.path):
            tell(str(entry), "deleted")
    return left


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


async def _remove_namespace(client: ApiClient, patience: float, tell: Tell) -> list[str]:
    path = NAMESPACES.path("", SYSTEM_NAMESPACE)

    async def gone() -> bool:
        return await client.find(path) is None

    if not await delete(client, path):
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
    traces = removal.traces
    if removal.installed:
        objects = f"{len(removal.entries)} objects" + (f" and the namespace {SYSTEM_NAMESPACE}" if removal.namespace else "")
        yield f"This removes the mesh: {objects}."
    else:
        yield "The mesh itself is not installed. This removes what it left behind."
    if removal.captured:
        yield f"{removal.captured} pods are released: they run on, and what they say to each other from then on is no longer encrypted."
    if traces.waypoints:
        yield f"{len(traces.waypoints)} waypoints go, and nothing enforces their policies any more ({_some(traces.waypoints)})."
    words = len({trace.key for trace in traces.statuses})
    if words:
        yield f"Our words in the status of {words} objects are withdrawn."
    if traces.root_maps:
        yield f"The root certificate goes from {len(traces.root_maps)} namespaces."
    if removal.other:
        yield f"There is another mesh, {removal.other}: {_SHARED} are left to it."
    if removal.enrolled:
        yield f"Labels of namespaces stay as they are ({_some(removal.enrolled)})."
    for name, count in removal.custom.items():
        yield f"--purge deletes {name} and with it {count} objects of yours."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
