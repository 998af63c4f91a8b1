"""The mesh of a cluster in short: control plane, agents, pods that can't be captured, certificates that end soon."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Final

import msgspec
import trio

from mesh.kube.api import ApiClient
from mesh.kube.resources import DEPLOYMENTS
from mesh.runtime.inspection import ControlPlanePage, PodPage, StatusPage
from meshctl_py.cluster.agents import Agent, forwarded_agent, forwarded_pod, list_agents
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.objects import CONTROL_PLANE, NODES, PODS, SYSTEM_NAMESPACE, Controller, Named, Pod, find_one, list_all
from meshctl_py.cluster.rollout import JUDGES

MONITORING: Final = 15014
_AT_ONCE: Final = 16
"""Port-forwards at a time: each costs the API server and a kubelet a connection."""
_ASK_SECONDS: Final = 10.0
SOON: Final = 3600.0
"""Seconds before its end at which a workload's certificate, renewed at half of its life, should have been renewed long ago."""
AUTHORITY_SOON: Final = 30 * 24 * 3600.0


class Replica(msgspec.Struct, frozen=True, rename="camel"):
    """One pod of the control plane."""

    pod: str
    node: str
    ready: bool
    version: str = ""
    agents: int = 0
    problems: int = 0
    mistakes: list[str] = []
    authority_expires: float | None = None
    because: str = ""


class AgentReport(msgspec.Struct, frozen=True, rename="camel"):
    """A node's agent. ``configuration`` is ``in sync``, or why not."""

    node: str
    pod: str
    ready: bool
    version: str = ""
    captured: int = 0
    pending: int = 0
    configuration: str = ""
    certificates: int = 0
    next_expiry: float | None = None
    because: str = ""
    troubled: list[PodPage] = []


class Report(msgspec.Struct, frozen=True, rename="camel"):
    """``wrong``: what needs attention, one sentence each; empty when all is well."""

    client: str
    installed: bool
    desired_replicas: int = 0
    control_plane: list[Replica] = []
    agents: list[AgentReport] = []
    wrong: list[str] = []


async def gather(client: ApiClient) -> Report:
    """Raises ApiError, ApiUnavailable; who does not answer is in the report."""
    deployment = await find_one(client, DEPLOYMENTS, Controller, SYSTEM_NAMESPACE, CONTROL_PLANE)
    controls = await list_all(client, PODS, Pod, namespace=SYSTEM_NAMESPACE, labels=f"app={CONTROL_PLANE}")
    agents = await list_agents(client)
    if deployment is None and not agents:
        return Report(version("ambient-mesh"), installed=False)
    pages: dict[str, ControlPlanePage | StatusPage | str] = {}
    limiter = trio.CapacityLimiter(_AT_ONCE)

    async def ask(pod: Pod, agent: Agent, kind: type[ControlPlanePage] | type[StatusPage]) -> None:
        async with limiter:
            with trio.move_on_after(_ASK_SECONDS):
                try:
                    pages[pod.metadata.name] = await agent.ask("status", {}, kind)
                except ClusterProblem as exc:
                    pages[pod.metadata.name] = str(exc)

    async with trio.open_nursery() as nursery:
        for pod in controls:
            if pod.status.phase == "Running":
                nursery.start_soon(ask, pod, forwarded_pod(client, pod, MONITORING), ControlPlanePage)
        for pod in agents:
            if pod.status.phase == "Running":
                nursery.start_soon(ask, pod, forwarded_agent(client, pod), StatusPage)
    replicas = [_replica(pod, pages.get(pod.metadata.name)) for pod in controls]
    stale = _stale(pages)
    reports = [_agent(pod, pages.get(pod.metadata.name), stale.get(pod.metadata.name, "")) for pod in agents]
    reports.sort(key=lambda report: (report.node, report.pod))
    wrong = [*await _controllers(client), *_find_wrong(replicas, reports)]
    with_agent = {report.node for report in reports}
    nodes = await list_all(client, NODES, Named)
    without = sorted(node.metadata.name for node in nodes if node.metadata.name not in with_agent)
    if without:
        wrong.append(f"no agent runs on {', '.join(without[:10])}{' ...' if len(without) > 10 else ''}: pods there can't be captured")
    desired = deployment.spec.replicas if deployment is not None else 0
    return Report(version("ambient-mesh"), True, desired, replicas, reports, wrong)


def _stale(pages: dict[str, ControlPlanePage | StatusPage | str]) -> dict[str, str]:
    """What agents have not taken of what they were sent, by pod, as the control plane sees it."""
    found: dict[str, str] = {}
    for page in pages.values():
        if isinstance(page, ControlPlanePage):
            found |= {agent.pod: "; ".join(f"{kind} {why}" for kind, why in agent.stale.items()) for agent in page.agents if agent.stale}
    return found


def _replica(pod: Pod, page: object) -> Replica:
    base = Replica(pod.metadata.name, pod.spec.node_name, pod.ready, because="" if pod.ready else pod.why_not_ready())
    if not isinstance(page, ControlPlanePage):
        return base if not isinstance(page, str) or base.because else msgspec.structs.replace(base, because=page)
    because = base.because or (f"waits for {', '.join(page.pending)}" if page.pending else "")
    return msgspec.structs.replace(
        base,
        version=page.version,
        agents=len(page.agents),
        problems=page.problems,
        mistakes=page.mistakes,
        authority_expires=page.authority_expires,
        because=because,
    )


def _agent(pod: Pod, page: object, stale: str) -> AgentReport:
    base = AgentReport(pod.spec.node_name, pod.metadata.name, pod.ready, because="" if pod.ready else pod.why_not_ready())
    if not isinstance(page, StatusPage):
        words = page if isinstance(page, str) else "it does not answer" if pod.status.phase == "Running" else ""
        return msgspec.structs.replace(base, configuration="unknown", because=base.because or words)
    waits = "; ".join(task.name + (f": {task.because}" if task.because else "") for task in page.pending)
    return msgspec.structs.replace(
        base,
        version=page.version,
        captured=page.pods.get("captured", 0),
        pending=sum(page.pods.get(phase, 0) for phase in ("pending", "waiting", "capturing")),
        configuration=(stale or "in sync") if page.connected and page.synced else page.configuration,
        certificates=page.certificates - page.unavailable,
        next_expiry=page.next_expiry,
        because=(f"waits for {waits}" if waits else "") or base.because or page.certificate_problem,
        troubled=page.troubled,
    )


async def _controllers(client: ApiClient) -> list[str]:
    found = []
    for resource, name, judge in JUDGES:
        controller = await find_one(client, resource, Controller, SYSTEM_NAMESPACE, name)
        because = judge(controller) if controller is not None else f"there is no {resource.kind}: 'meshctl install'"
        if because:
            found.append(f"{name}: {because}")
    return found


def _find_mistakes(replica: Replica | None) -> list[str]:
    """In the configuration, as the replica that sees most of them has it."""
    if replica is None:
        return []
    found = [f"configuration: {mistake}" for mistake in replica.mistakes]
    left = replica.problems - len(found)
    if left > 0:
        noun = f"{'more ' if found else ''}{'mistake' if left == 1 else 'mistakes'}"
        found.append(f"{left} {noun} in the configuration: the objects' status and the log of {CONTROL_PLANE} tell of all")
    return found


def _find_wrong(replicas: list[Replica], agents: list[AgentReport]) -> list[str]:
    now = time.time()
    wrong = [f"{replica.pod}: {replica.because}" for replica in replicas if replica.because]
    ends = min((replica.authority_expires for replica in replicas if replica.authority_expires is not None), default=None)
    if ends is not None and ends - now < AUTHORITY_SOON:
        wrong.append(f"the certificate authority's root ends in {max(0, int((ends - now) // 86400))} days")
    wrong += _find_mistakes(max(replicas, key=lambda replica: replica.problems, default=None))
    for agent in agents:
        if agent.because:
            wrong.append(f"agent of {agent.node}: {agent.because}")
        if agent.configuration not in ("in sync", "unknown"):
            wrong.append(f"agent of {agent.node}: configuration: {agent.configuration}")
        if agent.next_expiry is not None and agent.next_expiry - now < SOON:
            wrong.append(f"agent of {agent.node}: a certificate ends within the hour: meshctl node {agent.node} certificates")
        wrong += (f"pod {pod.namespace}/{pod.name} on {agent.node} is {pod.phase}: {pod.because}" for pod in agent.troubled)
    versions = sorted({agent.version for agent in agents if agent.version} | {replica.version for replica in replicas if replica.version})
    if len(versions) > 1:
        wrong.append(f"several versions run: {', '.join(versions)}; 'meshctl install' brings all to one")
    return wrong
