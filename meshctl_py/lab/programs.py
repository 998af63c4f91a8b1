"""The command lines and environments of the mesh's own programs in a lab: one control plane, one agent a node, waypoints. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from mesh.model import ports
from mesh.model.labels import GATEWAY_MANAGED, MESH_CONTROLLER
from meshctl_py.lab.assign import CONTROL_PLANE
from meshctl_py.lab.containers import etc_binds
from meshctl_py.lab.enter import Entry
from meshctl_py.lab.home import LabHome
from meshctl_py.lab.network import Wires
from meshctl_py.lab.spec import Cluster, Container, EnvVar, PodSpec

MONITORING: Final = 15014
ISTIOD: Final = "istiod"
ISTIOD_HOST: Final = "istiod.istio-system.svc"
WAYPOINT: Final = "waypoint-py"
"""The command of a waypoint's container, as it is deployed everywhere."""
GRACE: Final = 5.0
"""Seconds a program of the mesh has to end by itself when the lab goes."""
WAYPOINT_GRACE: Final = 10
"""The same for waypoints. Theirs is longer because for a fifth of it they still take connections, until agents know that they are going."""


def istiod(home: LabHome, wires: Wires, source: Path, further: Sequence[str]) -> Entry:
    """The control plane, in a namespace of its own, where it resolves names as a pod does: key sets may be in the cluster.

    It reads what the lab and all agents report, also those of nodes yet to come. ``further``: more of its command line.
    """
    command = ("--source", str(source), "--overlay", str(home.status), "--state-dir", str(home.istiod))
    where = ("--listen", f"{CONTROL_PLANE[0]}:{ports.XDS_AND_CA}", "--monitoring", f":{MONITORING}")
    deploys = ("--deploy-dir", str(home.deployed), "--status-dir", str(home.status_of("istiod")))
    argv = (sys.executable, "-m", "istiod_py", *command, *where, *deploys, "--token-dir", str(home.tokens), *further)
    return Entry(argv, (str(wires.control_plane),), str(home.netns), etc_binds(home.files / ISTIOD), hostname=ISTIOD)


def ztunnel(home: LabHome, wires: Wires, node: str) -> Entry:
    """The agent of one node, in the node's namespace."""
    return Entry((sys.executable, "-m", "ztunnel_py", "proxy"), (str(wires.node(node)),), hostname=node[:63])


def spare_mover(home: LabHome, wires: Wires, node: str) -> Entry:
    """The mover that runs beside the agent, with the same environment: in a cluster it has a container of its own."""
    return Entry((sys.executable, "-m", "ztunnel_py", "mover", "spare"), (str(wires.node(node)),), hostname=node[:63])


def has_spare_mover(movers: int | None) -> bool:
    """Whether one of so many movers (None: the agent's own choice) can run beside the agent."""
    return movers != 1


def ztunnel_environment(home: LabHome, source: Path, node: str, node_ip: str, movers: int | None) -> dict[str, str]:
    """What the agent of one node is told. It reads the user's files, the lab's status and its own."""
    sources = (source, home.status_of("lab"), home.status_of(node))
    environment = {
        "NODE_NAME": node,
        "INSTANCE_IP": node_ip,
        **control_plane(home),
        "AUTH_TOKEN": str(home.tokens / f"{node}.token"),
        "MESH_SOURCE": ":".join(map(str, sources)),
        "MESH_STATUS_DIR": str(home.status_of(node)),
        "RUN_DIR": str(home.run_of(node)),
        "SPARE_MOVER": str(has_spare_mover(movers)).lower(),
    }
    return environment | ({} if movers is None else {"MOVERS": str(movers)})


def control_plane(home: LabHome) -> dict[str, str]:
    """Where it is, and what it must prove."""
    address = f"https://{CONTROL_PLANE[0]}:{ports.XDS_AND_CA}"
    root = str(home.istiod / "root-cert.pem")
    return {
        "XDS_ADDRESS": address,
        "CA_ADDRESS": address,
        "XDS_ROOT_CA": root,
        "CA_ROOT_CA": root,
        "ALT_XDS_HOSTNAME": ISTIOD_HOST,
        "ALT_CA_HOSTNAME": ISTIOD_HOST,
    }


def equip_waypoints(cluster: Cluster, home: LabHome, directory: str) -> Cluster:
    """What the control plane deployed as waypoints, able to run here: our own program instead of the one in an image, and paths instead of
    what a kubelet mounts. ``directory`` is where they run: not among the user's files, where Python would look for modules first."""
    pods = {key: _equip(pod, home, directory) if _is_waypoint(pod) else pod for key, pod in cluster.pods.items()}
    return replace(cluster, pods=pods)


def _is_waypoint(pod: PodSpec) -> bool:
    return pod.labels.get(GATEWAY_MANAGED) == MESH_CONTROLLER


def _equip(pod: PodSpec, home: LabHome, directory: str) -> PodSpec:
    told = {
        **control_plane(home),
        "AUTH_TOKEN": str(home.tokens / f"pod_{pod.key.namespace}_{pod.key.name}.token"),
        "TERMINATION_DRAIN_DURATION_SECONDS": str(WAYPOINT_GRACE - 1),
    }

    def equip(container: Container) -> Container:
        kept = tuple(variable for variable in container.environment if variable.name not in told)
        # Kubernetes may take a minute to notice; here somebody is watching.
        probe = replace(container.readiness, period=1, failure_threshold=3) if container.readiness is not None else None
        environment = kept + tuple(EnvVar(name, value) for name, value in told.items())
        told_all = replace(container, environment=environment, readiness=probe)
        if container.argv != (WAYPOINT,):
            return told_all  # somebody's own, by an overlay
        return replace(told_all, argv=(sys.executable, "-m", "waypoint_py"), directory=directory)

    return replace(pod, containers=tuple(map(equip, pod.containers)), grace=WAYPOINT_GRACE)


def make_agent_directories(home: LabHome, node: str) -> None:
    """What an agent finds made: its status and socket directories."""
    home.status_of(node).mkdir(parents=True, exist_ok=True)
    home.run_of(node).mkdir(parents=True, exist_ok=True, mode=0o700)
