"""The living cluster: carries out the difference between what the source describes and what is there, and reports what is there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import trio

from mesh.kube.directory import DirectoryStore, remove_overlay, write_overlay
from mesh.kube.objects import ObjectKey, SourceProblem
from mesh.kube.overlay import overlay_path
from mesh.model import ports
from mesh.model.labels import NETNS, REDIRECTION
from mesh.telemetry.log import get_logger
from meshctl_py.lab import network, programs
from meshctl_py.lab.assign import CONTROL_PLANE, Assignments, NodeAssignment, PodAssignment, assign
from meshctl_py.lab.containers import Place, PodRunner, base_environment, write_etc_files
from meshctl_py.lab.dns import Zone
from meshctl_py.lab.endpoints import VirtualPort, count_endpoints, dns_names, virtual_ports
from meshctl_py.lab.enter import Entry
from meshctl_py.lab.home import LabHome
from meshctl_py.lab.init import LabConfig
from meshctl_py.lab.network import CannotBuild, Wires
from meshctl_py.lab.processes import LabProcess, descendants
from meshctl_py.lab.spec import KINDS, Cluster, PodKey, WaypointKey, read_cluster
from meshctl_py.lab.status import LabStatus, NodeStatus, PodStatus, Problem, ServiceStatus, WaypointStatus
from meshctl_py.lab.vips import apply_services, plan_services
from meshctl_py.lab.web import Unreachable, fetch

log = get_logger("lab")

_BUILT_AT_ONCE: Final = 4
"""Pods wired at a time: the kernel takes a while for each namespace, but only one writer of the routing tables at once."""
_CAPTURE_POLL: Final = 0.05
_READY_POLL: Final = 0.1
_ALIVE_POLL: Final = 1.0
_PROBLEMS_WITHIN: Final = 2.0


class Bell:
    """Wakes everybody who waits for something to have changed: take `rung` first, look, then wait on it, and no ring is missed."""

    def __init__(self) -> None:
        self.rung = trio.Event()

    def ring(self) -> None:
        self.rung.set()
        self.rung = trio.Event()


@dataclass(slots=True)
class _Task:
    """A task of its own that can be ended and waited for."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)

    async def run(self, body: Callable[[], Awaitable[None]]) -> None:
        try:
            with self.scope:
                await body()
        finally:
            self.over.set()

    async def end(self) -> None:
        self.scope.cancel()
        await self.over.wait()


@dataclass(slots=True)
class _Program:
    """A program of the mesh: its process, and whether it says that it is ready."""

    process: LabProcess
    task: _Task
    health: str = "not started"


@dataclass(slots=True)
class _Pod:
    runner: PodRunner
    task: _Task


class World:
    """`open` builds what every lab has, `reconcile` the rest, as often as the source changes. One task calls both."""

    def __init__(self, config: LabConfig) -> None:
        self.home = home = LabHome(config.name, Path(config.state))
        self.source = Path(config.source)
        self.user_namespace = config.user_namespace
        self.wires = Wires(home.netns)
        self.store = DirectoryStore([self.source, home.deployed], bases=2)
        self.bell = Bell()
        self.zone: Zone = {}
        self._with_mesh = config.with_mesh
        self._movers = config.movers
        self._agents_environment = config.agents
        self._istiod_options = config.istiod
        self._cluster = Cluster()
        self._assignments = Assignments()
        self._pods: dict[PodKey, _Pod] = {}
        self._agents: dict[str, _Program] = {}
        self._spares: dict[str, _Program] = {}
        """The movers that run beside the agents, by node."""
        self._istiod: _Program | None = None
        self._published: dict[ObjectKey, Mapping[str, object]] = {}
        self._rules: dict[Path, tuple[VirtualPort, ...]] = {}
        """What was applied, by network namespace."""
        self._built: dict[str, NodeAssignment] = {}
        """Nodes whose namespaces are there."""
        self._broken: dict[str, str] = {}
        """Why pods and nodes could not be built, by name."""
        self._nursery: trio.Nursery | None = None

    async def open(self, nursery: trio.Nursery) -> None:
        """Router and control plane. Tasks run in ``nursery``."""
        self._nursery = nursery
        await trio.to_thread.run_sync(network.build_router)
        if self._with_mesh:
            await trio.to_thread.run_sync(network.add_control_plane, self.wires)
            health = (self.wires.control_plane, str(CONTROL_PLANE[0]), programs.MONITORING, "/ready")
            write_etc_files(self.home.files / programs.ISTIOD, programs.ISTIOD, tuple(map(str, CONTROL_PLANE)), "default")
            entry = programs.istiod(self.home, self.wires, self.source, self._istiod_options)
            self._istiod = self._start_program(programs.ISTIOD, entry, base_environment(), health)
        nursery.start_soon(self._publish_for_ever)

    async def reconcile(self) -> None:
        """Bring everything in step with what the store holds now: first what goes, then what comes."""
        cluster = programs.equip_waypoints(read_cluster(self.store.objects(*KINDS)), self.home, str(Path.cwd()))
        before, after = self._assignments, assign(cluster, self._assignments, lambda: str(uuid.uuid4()))
        self._cluster, self._assignments = cluster, after  # at once: other tasks look at both
        async with trio.open_nursery() as nursery:
            for key, pod in before.pods.items():
                if key not in after.pods or after.pods[key].uid != pod.uid:
                    nursery.start_soon(self._tolerate, str(key), self._remove_pod(pod, before.nodes[pod.node]))
        for name in before.nodes.keys() - after.nodes.keys():
            await self._tolerate(name, self._remove_node(name))
        for name, node in after.nodes.items():
            if name not in before.nodes:
                await self._tolerate(node.name, self._add_node(node))
        async with trio.open_nursery() as nursery:
            limit = trio.CapacityLimiter(_BUILT_AT_ONCE)
            for key, pod in after.pods.items():
                if key in self._pods:
                    self._pods[key].runner.adopt(pod)
                else:
                    nursery.start_soon(self._build_pod, limit, pod, after.nodes[pod.node])
        self.bell.ring()

    async def status(self) -> LabStatus:
        """Everything as it is now, the control plane's opinion of the source included."""
        return replace(self.snapshot(), problems=await self._problems())

    def snapshot(self) -> LabStatus:
        """Everything as it is now, but for problems."""
        nodes = tuple(self._node_status(node) for node in self._assignments.nodes.values())
        pods = tuple(self._pod_status(key, spec) for key, spec in self._assignments.pods.items())
        endpoints = count_endpoints(self._cluster, self._assignments, self._ready_pods())
        services = tuple(
            ServiceStatus(
                *key,
                tuple(map(str, self._assignments.vips.get(key, ()))) or (("None",) if service.headless else ()),
                tuple(f"{port.port}/{port.protocol}" for port in service.ports),
                endpoints[key],
            )
            for key, service in self._cluster.services.items()
        )
        processes = tuple(replace(process.status, name=name) for name, process in self.processes().items())
        control_plane = "off" if self._istiod is None else self._istiod.health
        place = (self.home.name, str(self.source), str(self.home.logs))
        waypoints = tuple(map(self._waypoint_status, self._cluster.waypoints)) if self._with_mesh else ()
        return LabStatus(*place, control_plane, nodes, pods, services, waypoints, processes)

    def processes(self) -> Mapping[str, LabProcess]:
        """All processes by the names users call them: ``istiod``, ``ztunnel-NODE``, ``ztunnel-NODE-spare``, ``NAMESPACE/POD/CONTAINER``."""
        every = (self._istiod, *self._agents.values(), *self._spares.values())
        programs_of_mesh = {program.process.name: program.process for program in every if program}
        pods = {key: self._pods[key] for key in self._assignments.pods if key in self._pods}
        containers = {f"{key}/{name}": process for key, pod in pods.items() for name, process in pod.runner.processes.items()}
        return programs_of_mesh | containers

    def find_entry(self, target: str, namespace: str | None, container: str | None, argv: tuple[str, ...]) -> Entry | str:
        """How to run a command there, or why not. ``join`` is one path: the network namespace."""
        kind, _, name = target.rpartition("/")
        if kind not in ("", "node", "pod") and namespace is None:
            kind, namespace = "pod", kind  # NAMESPACE/POD, as everything the lab shows names a pod
        nodes = [node for node in self._assignments.nodes if node == name and kind in ("", "node") and namespace is None]
        pods = [key for key in self._pods if key.name == name and kind in ("", "pod") and namespace in (None, key.namespace)]
        if len(nodes) + len(pods) > 1:
            choices = [f"node/{name}" for name in nodes] + [f"pod/{key.name} -n {key.namespace}" for key in pods]
            return f"{target} may be {' or '.join(choices)}"
        if pods:
            return self._pod_entry(pods[0], container, argv)
        if nodes:
            return self._infrastructure_entry(self.wires.node(name), name, argv)
        if target == "router":
            return self._infrastructure_entry(Path("/proc/self/ns/net"), "router", argv)
        if target == "istiod" and self._istiod is not None:
            return self._infrastructure_entry(self.wires.control_plane, programs.ISTIOD, argv)
        known = ", ".join(["router", *self._assignments.nodes, *map(str, self._assignments.pods)])
        where = "" if namespace is None else f" in namespace {namespace}"
        return f"there is no pod or node {name}{where} (there are: {known})"

    def find_process(self, name: str) -> LabProcess | str:
        """A process by its name, or by its pod's where that runs one alone; or why there is none."""
        known = self.processes()
        of_pod = [process for each, process in known.items() if each.startswith(f"{name}/") and "/" in name]
        if name in known or len(of_pod) == 1:
            return known.get(name) or of_pod[0]
        return f"there is no process {name} (there are: {', '.join(known)})"

    def find_processes(self, name: str, part: str | None) -> list[int] | str:
        """PIDs, as this PID namespace counts, of a process or the descendants of it that carry a word; or why there are none."""
        process = self.find_process(name)
        if isinstance(process, str):
            return process
        if process.status.pid is None:
            return f"{name} is not running: {process.status.state} {process.status.because}".rstrip()
        if part is None:
            return [process.status.pid]
        found = [pid for pid, command in descendants(process.status.pid).items() if part in command]
        return found or f"{name} has no part {part}"

    # --- pods and nodes come and go

    async def _tolerate(self, name: str, work: Awaitable[None]) -> None:
        """One pod or node that can't be built must not take the others with it; its status says why."""
        self._broken.pop(name, None)
        try:
            await work
        except CannotBuild as exc:
            log.error("lab.cannot_build", object=name, error=str(exc))
            self._broken[name] = str(exc)

    async def _add_node(self, node: NodeAssignment) -> None:
        await trio.to_thread.run_sync(network.add_node, self.wires, node)
        self._built[node.name] = node
        write_etc_files(self.home.files / node.name, node.name, tuple(map(str, node.ips)), "default")
        if self._with_mesh:
            programs.make_agent_directories(self.home, node.name)
            told = programs.ztunnel_environment(self.home, self.source, node.name, str(node.ips[0]), self._movers)
            environment = {**base_environment(), **told, **self._agents_environment}
            health = (self.wires.node(node.name), "127.0.0.1", ports.READINESS, "/healthz/ready")
            entry = programs.ztunnel(self.home, self.wires, node.name)
            self._agents[node.name] = self._start_program(f"ztunnel-{node.name}", entry, environment, health)
            if programs.has_spare_mover(self._movers):
                self._spares[node.name] = self._start_spare(node.name, environment)

    async def _remove_node(self, name: str) -> None:
        self._built.pop(name, None)
        for started in (self._agents, self._spares):
            if name in started:
                await started.pop(name).task.end()
        await trio.to_thread.run_sync(network.remove_node, self.wires, name)
        self._rules.pop(self.wires.node(name), None)
        self._published.pop(ObjectKey("Node", "", name), None)
        remove_overlay(self.home.status_of("lab"), "Node", "", name)

    async def _build_pod(self, limit: trio.CapacityLimiter, pod: PodAssignment, node: NodeAssignment) -> None:
        async with limit:
            await self._tolerate(str(pod.spec.key), self._add_pod(pod, node))

    async def _add_pod(self, pod: PodAssignment, node: NodeAssignment) -> None:
        key = pod.spec.key
        await trio.to_thread.run_sync(network.add_pod, self.wires, pod, node)
        files = self.home.files / f"{key.namespace}_{key.name}"
        write_etc_files(files, pod.spec.hostname, tuple(map(str, pod.ips)), key.namespace)
        place = Place(self.wires.pod(pod), files, self.home.netns, self.source, self.home.logs, str(node.ips[0]))
        runner = PodRunner(pod, place, self._wait_captured, self.bell.ring)
        living = self._pods[key] = _Pod(runner, _Task())
        self._publish_pod(key)
        self._spawn(living.task, runner.run)

    async def _remove_pod(self, pod: PodAssignment, node: NodeAssignment) -> None:
        key = pod.spec.key
        living = self._pods.pop(key, None)
        if living is not None:
            await living.task.end()
        for writer in ("lab", pod.node):
            # The agent withdraws its own word too; but a pod that comes back under this name must not find it.
            remove_overlay(self.home.status_of(writer), "Pod", *key)
        self._published.pop(ObjectKey("Pod", *key), None)
        await trio.to_thread.run_sync(network.remove_pod, self.wires, pod, node)

    async def _wait_captured(self, pod: PodAssignment) -> None:
        """Return once the agent has captured the pod, or nobody wants it captured. No container runs before: nothing leaves unprotected."""
        while self._wants_capture(pod) and self._redirection(pod) != "enabled":  # noqa: ASYNC110 - another process writes the file
            await trio.sleep(_CAPTURE_POLL)

    def _wants_capture(self, pod: PodAssignment) -> bool:
        current = self._cluster.pods.get(pod.spec.key, pod.spec)
        return self._with_mesh and bool(self._cluster.enrolment_of(current))

    def _redirection(self, pod: PodAssignment) -> str:
        """What the agent of the pod's node last wrote: ``enabled``, ``pending`` or nothing."""
        path = overlay_path(self.home.status_of(pod.node), ObjectKey("Pod", *pod.spec.key))
        try:
            return str(json.loads(path.read_text())["metadata"]["annotations"][REDIRECTION])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _spawn(self, task: _Task, body: Callable[[], Awaitable[None]]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(task.run, body)

    # --- programs of the mesh

    def _start_program(self, name: str, entry: Entry, environment: Mapping[str, str], health: tuple[Path, str, int, str]) -> _Program:
        program = _Program(LabProcess(name, self.home.logs / f"{name}.log", self.bell.ring), _Task())

        async def run() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_health, program, health)
                await program.process.run_for_ever(entry, environment, grace=programs.GRACE)

        self._spawn(program.task, run)
        return program

    def _start_spare(self, node: str, environment: Mapping[str, str]) -> _Program:
        """It writes into the agent's log: for who reads, it is one of its movers."""
        program = _Program(LabProcess(f"ztunnel-{node}-spare", self.home.logs / f"ztunnel-{node}.log", self.bell.ring), _Task())
        entry = programs.spare_mover(self.home, self.wires, node)
        self._spawn(program.task, lambda: program.process.run_for_ever(entry, environment, grace=programs.GRACE))
        return program

    async def _watch_health(self, program: _Program, health: tuple[Path, str, int, str]) -> None:
        netns, ip, port, path = health
        while True:
            before, status = program.health, program.process.status
            if status.state != "running":
                program.health = status.because or status.state
            else:
                try:
                    answer = await fetch(netns, ip, port, path, within=1.0)
                    text = answer.body.decode(errors="replace").strip()[:500]
                    program.health = "ready" if answer.status == 200 else text or f"HTTP status {answer.status}"
                except Unreachable as exc:
                    program.health = f"does not answer yet: {exc}"
            if program.health != before:
                self.bell.ring()
            await trio.sleep(_ALIVE_POLL if program.health == "ready" else _READY_POLL)

    # --- what others learn of it: overlays, DNS, VIPs

    async def _publish_for_ever(self) -> None:
        while True:
            rung = self.bell.rung
            self.zone = dns_names(self._cluster, self._assignments, self._ready_pods())
            for name in self._assignments.nodes:
                self._publish_node(name)
            for key in list(self._pods):
                self._publish_pod(key)
            for service in self._cluster.services.values():
                self._publish_service(ObjectKey("Service", *service.key), self._assignments.vips.get(service.key, ()))
            await self._apply_services()
            await rung.wait()

    def _ready_pods(self) -> Collection[PodKey]:
        return {key for key, pod in self._pods.items() if pod.runner.ready}

    def _virtual_ports(self) -> tuple[VirtualPort, ...]:
        return virtual_ports(self._cluster, self._assignments, self._ready_pods())

    async def _apply_services(self) -> None:
        table = self._virtual_ports()
        places = {self.wires.node(name): node.ips for name, node in self._built.items()}
        if self._istiod is not None:
            places[self.wires.control_plane] = CONTROL_PLANE
        for place, ips in places.items():
            if self._rules.get(place) == table:
                continue
            try:
                await trio.to_thread.run_sync(apply_services, place, plan_services(table, ips))
                self._rules[place] = table
            except CannotBuild as exc:
                log.error("services.failed", place=place.name, error=str(exc))

    def _publish(self, key: ObjectKey, patch: Mapping[str, object]) -> None:
        if self._published.get(key) != patch:
            write_overlay(self.home.status_of("lab"), *key, patch)
            self._published[key] = patch

    def _publish_node(self, name: str) -> None:
        node = self._assignments.nodes[name]
        ready = not self._with_mesh or (name in self._agents and self._agents[name].health == "ready")
        addresses = [{"type": "InternalIP", "address": str(ip)} for ip in node.ips] + [{"type": "Hostname", "address": name}]
        spec = {"podCIDR": str(node.pod_ranges[0]), "podCIDRs": list(map(str, node.pod_ranges))}
        self._publish(ObjectKey("Node", "", name), {"spec": spec, "status": {"addresses": addresses, "conditions": _condition(ready, "")}})

    def _publish_pod(self, key: PodKey) -> None:
        runner = self._pods[key].runner
        pod, node = runner.pod, self._assignments.nodes.get(runner.pod.node)
        if node is None:
            return
        status: dict[str, object] = {
            "phase": runner.phase,
            "hostIP": str(node.ips[0]),
            "hostIPs": [{"ip": str(ip)} for ip in node.ips],
            "podIP": str(pod.ips[0]),
            "podIPs": [{"ip": str(ip)} for ip in pod.ips],
            "conditions": _condition(runner.ready, runner.because),
        }
        metadata: dict[str, object] = {"uid": pod.uid}
        if not pod.spec.host_network:
            metadata["annotations"] = {NETNS: str(self.wires.pod(pod))}
        self._publish(ObjectKey("Pod", *key), {"metadata": metadata, "spec": {"nodeName": pod.node}, "status": status})

    def _publish_service(self, key: ObjectKey, vips: Collection[object]) -> None:
        if vips:
            texts = list(map(str, vips))
            self._publish(key, {"spec": {"clusterIP": texts[0], "clusterIPs": texts}})

    # --- status

    def _node_status(self, node: NodeAssignment) -> NodeStatus:
        agent = self._agents[node.name].health if node.name in self._agents else self._broken.get(node.name, "off")
        return NodeStatus(
            node.name, tuple(map(str, node.ips)), agent, sum(pod.node == node.name for pod in self._assignments.pods.values())
        )

    def _pod_status(self, key: PodKey, pod: PodAssignment) -> PodStatus:
        enrolment = self._cluster.enrolment_of(pod.spec)
        redirection = self._redirection(pod) if self._with_mesh else ""
        if enrolment and self._with_mesh:
            mesh = "captured" if redirection == "enabled" else "pending"
        else:
            mesh = "leaving" if redirection else "outside"
        living = self._pods.get(key)
        phase, ready, because, restarts = "Pending", False, self._broken.get(str(key), "being built"), 0
        if living is not None:
            runner = living.runner
            phase, ready, because = runner.phase, runner.ready, runner.because
            restarts = sum(max(0, status.starts - 1) for status in runner.statuses)
        ips = tuple(map(str, pod.ips))
        return PodStatus(*key, pod.uid, pod.node, ips, phase, ready, because, mesh, enrolment.because, restarts)

    def _waypoint_status(self, key: WaypointKey) -> WaypointStatus:
        """As the control plane last wrote it."""
        path = overlay_path(self.home.status_of("istiod"), ObjectKey("Gateway", *key))
        try:
            conditions = {item["type"]: item for item in json.loads(path.read_text())["status"]["conditions"]}
            programmed = conditions["Programmed"]
            refused = conditions["Accepted"] if conditions["Accepted"]["status"] != "True" else programmed
            because = "" if programmed["status"] == "True" else str(refused["message"])
        except (OSError, ValueError, KeyError, TypeError):
            because = "the control plane has not deployed it yet"
        return WaypointStatus(*key, because)

    async def _problems(self) -> tuple[Problem, ...]:
        own = [_as_problem(problem) for problem in (*self.store.problems, *self._cluster.problems)]
        for unplaced in self._assignments.unplaced:
            obj = self.store.find(unplaced.kind, unplaced.namespace, unplaced.name)
            path = unplaced.path or ("metadata", "name")
            where = obj.problem(path, unplaced.because) if obj else SourceProblem("", 0, "", unplaced.because)
            field = where.field if unplaced.path else f"{unplaced.kind} {unplaced.name}"
            own.append(Problem(where.file, where.line, field, where.message))
        return tuple(sorted({*own, *await self._istiod_problems()}, key=_place_of))

    async def _istiod_problems(self) -> list[Problem]:
        if self._istiod is None or self._istiod.health != "ready":
            return []
        try:
            answer = await fetch(
                self.wires.control_plane, str(CONTROL_PLANE[0]), programs.MONITORING, "/debug/problems", within=_PROBLEMS_WITHIN
            )
            return [Problem(item["file"], item["line"], item["field"], item["message"]) for item in json.loads(answer.body)]
        except (Unreachable, ValueError, KeyError, TypeError) as exc:
            return [Problem("", 0, "", f"istiod cannot be asked for problems: {exc}")]

    def _pod_entry(self, key: PodKey, container: str | None, argv: tuple[str, ...]) -> Entry | str:
        runner = self._pods[key].runner
        entry = runner.entry_for(container, argv)
        return entry if entry is not None else f"pod {key} has no container {container} (it has: {', '.join(runner.processes)})"

    def _infrastructure_entry(self, netns: Path, name: str, argv: tuple[str, ...]) -> Entry:
        files = self.home.files / name
        if not files.exists():
            write_etc_files(files, name, (), "default")
        return Place(netns, files, self.home.netns, self.source, self.home.logs, "").entry(argv, name[:63])


def _condition(ready: bool, because: str) -> list[dict[str, str]]:
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    return [condition | ({"message": because} if because else {})]


def _place_of(problem: Problem) -> tuple[str, int, str, str]:
    return problem.file, problem.line, problem.field, problem.message


def _as_problem(problem: SourceProblem) -> Problem:
    return Problem(problem.file, problem.line, problem.field, problem.message)
