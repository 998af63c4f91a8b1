"""What a lab says of itself: one value, shown as tables or JSON, and asked whether everything is ready."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """``state``: waiting (``because`` says for what), running, ending (told to end), pausing (before another start), ended."""

    name: str
    state: str = "waiting"
    pid: int | None = None
    starts: int = 0
    last_exit: str = ""
    because: str = ""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """``agent``: ready, or why not; ``off`` in a lab without a mesh."""

    name: str
    ips: tuple[str, ...]
    agent: str
    pods: int


@dataclass(frozen=True, slots=True)
class PodStatus:
    """``mesh``: ``captured``, ``pending``, ``leaving`` (no longer enrolled, the agent has not let go yet) or ``outside``.

    ``enrolment`` says which label decided.
    """

    namespace: str
    name: str
    uid: str
    node: str
    ips: tuple[str, ...]
    phase: str
    ready: bool
    because: str
    mesh: str
    enrolment: str
    restarts: int

    @property
    def settled(self) -> bool:
        """Nothing more is going to happen by itself."""
        return (self.ready or self.phase == "Succeeded") and self.mesh in ("captured", "outside")


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    namespace: str
    name: str
    ips: tuple[str, ...]
    ports: tuple[str, ...]
    endpoints: int


@dataclass(frozen=True, slots=True)
class WaypointStatus:
    """``because``: why it is not programmed; empty if it is."""

    namespace: str
    name: str
    because: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake in the source. ``line`` 0: the file, or no file at all (``file`` empty)."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(filter(None, (where, self.field, self.message)))


@dataclass(frozen=True, slots=True)
class LabStatus:
    name: str
    source: str
    logs: str
    control_plane: str
    """ready, or why not; ``off`` in a lab without a mesh."""
    nodes: tuple[NodeStatus, ...] = ()
    pods: tuple[PodStatus, ...] = ()
    services: tuple[ServiceStatus, ...] = ()
    waypoints: tuple[WaypointStatus, ...] = ()
    processes: tuple[ProcessStatus, ...] = ()
    problems: tuple[Problem, ...] = ()
    """In order of file and line."""

    def pending(self) -> tuple[tuple[str, str, str], ...]:
        """What is not ready: a name, why, and the log to look at."""
        found: list[tuple[str, str, str]] = []
        if self.control_plane not in ("ready", "off"):
            found.append(("istiod", self.control_plane, "istiod"))
        found += [
            (f"agent of {node.name}", node.agent, f"ztunnel-{node.name}") for node in self.nodes if node.agent not in ("ready", "off")
        ]
        found += [(f"waypoint {each.namespace}/{each.name}", each.because, "istiod") for each in self.waypoints if each.because]
        for pod in self.pods:
            if not pod.settled:
                because = pod.because or f"{pod.mesh}: {pod.enrolment}"
                found.append((f"pod {pod.namespace}/{pod.name}", because, f"{pod.namespace}_{pod.name}_"))
        return tuple(found)
