"""Whether the mesh's own programs run as they should, and why not: the controllers' figures, the pods' reasons, the programs' own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.resources import DAEMON_SETS, DEPLOYMENTS, Resource
from mesh.runtime.inspection import StatusPage
from meshctl_py.cluster.agents import forwarded_agent
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.objects import (
    AGENT,
    CONTROL_PLANE,
    PODS,
    SYSTEM_NAMESPACE,
    Controller,
    KubeStruct,
    Meta,
    Pod,
    find_one,
    list_all,
)

POLL: Final = 0.5
_ASK_SECONDS: Final = 3.0
_LOG_LINES: Final = 8
_MOST_LOGS: Final = 3
_EVENTS: Final = Resource("", "v1", "events", "Event")
_QUIET: Final = 10.0
"""Seconds an API server may be away while we wait: it may be restarting, and that is not the end of the installation."""


class Event(KubeStruct, frozen=True):
    metadata: Meta
    reason: str = ""
    message: str = ""
    type: str = ""


@dataclass(frozen=True, slots=True)
class Unready:
    """``name`` of a program, or of one of its pods (then ``pod``)."""

    name: str
    because: str
    pod: Pod | None = None


def judge_deployment(found: Controller) -> str:
    """Why a Deployment is not rolled out; empty when it is."""
    status, wanted = found.status, found.spec.replicas
    if status.observed_generation != found.metadata.generation:
        return "not seen by the controller yet"
    if status.updated_replicas < wanted:
        return f"{status.updated_replicas} of {wanted} replicas are of this version"
    if status.replicas > wanted:
        return f"{status.replicas - wanted} replicas of the version before are still there"
    return "" if status.available_replicas >= wanted else f"{status.available_replicas} of {wanted} replicas are ready"


def judge_daemon_set(found: Controller) -> str:
    """Why a DaemonSet is not rolled out; empty when it is."""
    status = found.status
    wanted = status.desired_number_scheduled
    if status.observed_generation != found.metadata.generation:
        return "not seen by the controller yet"
    if wanted == 0:
        return "no node can run it: see its nodeSelector and affinity"
    if status.updated_number_scheduled < wanted:
        return f"{status.updated_number_scheduled} of {wanted} nodes have this version"
    return "" if status.number_available >= wanted else f"{status.number_available} of {wanted} nodes are ready"


JUDGES: Final[Sequence[tuple[Resource, str, Callable[[Controller], str]]]] = (
    (DEPLOYMENTS, CONTROL_PLANE, judge_deployment),
    (DAEMON_SETS, AGENT, judge_daemon_set),
)


async def find_unready(client: ApiClient) -> list[Unready]:
    """All that is not as it should be, controllers before their pods. Raises ApiError, ApiUnavailable."""
    found: list[Unready] = []
    for resource, name, judge in JUDGES:
        controller = await find_one(client, resource, Controller, SYSTEM_NAMESPACE, name)
        because = judge(controller) if controller is not None else f"there is no {resource.kind} {name}"
        if not because:
            continue
        pods = await list_all(client, PODS, Pod, namespace=SYSTEM_NAMESPACE, labels=f"app={name}")
        unready = [pod for pod in pods if not pod.ready]
        if not unready:
            because += await _last_complaint(client, resource.kind, name)
        found.append(Unready(name, because))
        found += (Unready(_pod_name(pod), pod.why_not_ready(), pod) for pod in unready)
    return found


def _pod_name(pod: Pod) -> str:
    where = f" on {pod.spec.node_name}" if pod.spec.node_name else ""
    return f"{pod.metadata.name}{where}"


async def _last_complaint(client: ApiClient, kind: str, name: str) -> str:
    """What keeps a controller from making pods: quotas and admission say it in events only."""
    owners = (name,) if kind == "DaemonSet" else ()
    fields = ",".join(["type=Warning", "reason=FailedCreate", *(f"involvedObject.name={owner}" for owner in owners)])
    try:
        events = await list_all(client, _EVENTS, Event, namespace=SYSTEM_NAMESPACE, fields=fields)
    except ApiError:
        return ""
    ours = [event for event in events if event.metadata.name.startswith(name)]
    return f": {ours[-1].message}" if ours else ""


async def wait_ready(client: ApiClient, patience: float, show: Callable[[list[Unready]], None]) -> None:
    """Until all is rolled out; ``show`` is told, again and again, what is not. Raises ClusterProblem with every reason when it takes longer
    than ``patience`` seconds; ApiError, ApiUnavailable."""
    unready: list[Unready] = []
    last_answer = trio.current_time()
    with trio.move_on_after(patience):
        while True:
            try:
                unready = await find_unready(client)
                last_answer = trio.current_time()
            except ApiUnavailable:
                if trio.current_time() - last_answer > _QUIET:
                    raise
                await trio.sleep(POLL)
                continue
            show(unready)
            if not unready:
                return
            await trio.sleep(POLL)
    raise ClusterProblem(await _explain(client, unready, patience))


async def _explain(client: ApiClient, unready: Sequence[Unready], patience: float) -> str:
    lines = [f"not ready after {patience:g} s:"]
    told = 0
    for item in unready:
        lines.append(f"  {item.name}: {item.because}")
        if item.pod is not None and told < _MOST_LOGS:
            told += 1
            lines += (f"      {line}" for line in await own_words(client, item.pod))
    lines.append(f"What is there goes on starting: 'meshctl status' shows it, 'kubectl describe pods -n {SYSTEM_NAMESPACE}' says more.")
    if any("ImagePull" in item.because or "ErrImage" in item.because for item in unready):
        lines.append("The nodes can't get the image: give one that they reach, 'meshctl install --image REGISTRY/ambient-mesh:VERSION'.")
    return "\n".join(lines)


async def own_words(client: ApiClient, pod: Pod) -> list[str]:
    """What an agent says it waits for, or else the last lines of a pod's log; nothing when neither can be had."""
    if pod.metadata.labels.get("app") == AGENT and pod.status.phase == "Running":
        with trio.move_on_after(_ASK_SECONDS):
            try:
                status = await forwarded_agent(client, pod).ask("status", {}, StatusPage)
                return [f"waits for {task.name}" + (f": {task.because}" if task.because else "") for task in status.pending]
            except ClusterProblem:
                pass
    # The container that does the pod's work is called as the pod's app.
    query = {"tailLines": str(_LOG_LINES), "container": pod.metadata.labels.get("app", "")}
    lines = b""
    with trio.move_on_after(_ASK_SECONDS):
        try:
            async for chunk in client.stream(PODS.path(SYSTEM_NAMESPACE, pod.metadata.name, "log"), query):
                lines += chunk
        except (ApiError, ApiUnavailable):
            return []
    return lines.decode("utf-8", "replace").splitlines()[-_LOG_LINES:]
