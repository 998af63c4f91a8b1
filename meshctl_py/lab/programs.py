"""The command lines and environments of the mesh's own programs in a lab: one control plane, one agent a node. Pure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from mesh.model import ports
from meshctl_py.lab.assign import CONTROL_PLANE
from meshctl_py.lab.enter import Entry
from meshctl_py.lab.home import LabHome
from meshctl_py.lab.network import Wires

MONITORING: Final = 15014
ISTIOD_HOST: Final = "istiod.istio-system.svc"
GRACE: Final = 5.0
"""Seconds a program of the mesh has to end by itself when the lab goes."""


def istiod(home: LabHome, wires: Wires, source: Path) -> Entry:
    """The control plane, in a namespace of its own. It reads what the lab and all agents report, also those of nodes yet to come."""
    command = ("--source", str(source), "--overlay", str(home.status), "--state-dir", str(home.istiod))
    where = ("--listen", f"{CONTROL_PLANE[0]}:{ports.XDS_AND_CA}", "--monitoring", f":{MONITORING}")
    argv = (sys.executable, "-m", "istiod_py", *command, *where, "--token-dir", str(home.tokens))
    return Entry(argv, (str(wires.control_plane),), hostname="istiod")


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
    address = f"https://{CONTROL_PLANE[0]}:{ports.XDS_AND_CA}"
    root = str(home.istiod / "root-cert.pem")
    sources = (source, home.status_of("lab"), home.status_of(node))
    environment = {
        "NODE_NAME": node,
        "INSTANCE_IP": node_ip,
        "XDS_ADDRESS": address,
        "CA_ADDRESS": address,
        "XDS_ROOT_CA": root,
        "CA_ROOT_CA": root,
        "ALT_XDS_HOSTNAME": ISTIOD_HOST,
        "ALT_CA_HOSTNAME": ISTIOD_HOST,
        "AUTH_TOKEN": str(home.tokens / f"{node}.token"),
        "MESH_SOURCE": ":".join(map(str, sources)),
        "MESH_STATUS_DIR": str(home.status_of(node)),
        "RUN_DIR": str(home.run_of(node)),
        "SPARE_MOVER": str(has_spare_mover(movers)).lower(),
    }
    return environment | ({} if movers is None else {"MOVERS": str(movers)})


def make_agent_directories(home: LabHome, node: str) -> None:
    """What an agent finds made: its status and socket directories."""
    home.status_of(node).mkdir(parents=True, exist_ok=True)
    home.run_of(node).mkdir(parents=True, exist_ok=True, mode=0o700)
