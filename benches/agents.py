"""Two of our agents beside two Envoys in one topology: a client and a server on two nodes of a lab, HBONE over mutual TLS 1.3 between.

Ours are whole agents as they ship: captured pods, original destinations, a policy evaluated for every connection, access log and metrics;
their CPU is that of supervisor, brain and mover. The Envoys are a TCP listener in the client's pod and an HBONE server in the server's,
with nothing else switched on. Subjects take turns, so that a noisy machine is as noisy to one as to the other. CPU is user and system time
of both ends together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benches.cpu import Turns, measured
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.ports import INBOUND_HBONE
from mesh.testing import traffic
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import client_config, command, is_listening, server_config
from meshctl_py.lab.client import Lab, Popen, UpOptions, start_lab
from meshctl_py.lab.home import LabHome
from meshctl_py.lab.messages import Failed, Ready

WARM_UP: Final = 50
PORT: Final = 7100
ENTRY: Final = 9000
_PATIENCE: Final = 60.0
_TRAFFIC: Final = str(Path(traffic.__file__))

_NODES: Final = """
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
---
apiVersion: v1
kind: Namespace
metadata: {name: captured, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: captured}
spec:
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/captured/sa/client]}}]}]
"""


class Broken(Exception):
    """The bench could not be set up, or traffic did not pass; the text says what was seen."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Two proxies in series: from which pod traffic enters them and where, and the processes whose CPU counts."""

    name: str
    namespace: str
    entry: tuple[str, int]
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work: what `mesh.testing.traffic` does."""

    title: str
    client: str
    amount: int


def run(say: Callable[[str], None], *, gigabytes: float = 2.0, connections: int = 500, trips: int = 2000, rounds: int = 3) -> Turns:
    """Measure. Raises Broken."""
    blocks = int(gigabytes * 1e9) // traffic.BLOCK
    tasks = (
        Task(f"{gigabytes:g} GB to the server", "upload", blocks),
        Task(f"{gigabytes:g} GB to the client", "download", blocks),
        Task(f"{connections} short connections", "short", connections),
        Task(f"{trips} round trips of 100 B", "trips", trips),
    )
    turns = Turns([task.title for task in tasks])
    with two_nodes(say) as lab, tempfile.TemporaryDirectory() as directory, envoys(lab, Path(directory)) as theirs:
        subjects = (ours(lab), theirs)
        for subject in subjects:
            # Pods are captured before everybody has heard that they are; until then policy refuses the client, which has no identity yet.
            _wait_until(lambda subject=subject: _passes(lab, subject), f"traffic passes through {subject.name}")  # type: ignore[misc]
            _traffic(lab, subject, Task("", "short", WARM_UP))
        for number in range(rounds):
            for task in tasks:
                for subject in subjects:
                    cpu, _ = measured(subject.pids, lambda subject=subject, task=task: _traffic(lab, subject, task))  # type: ignore[misc]
                    turns.add(task.title, subject.name, cpu)
                    say(f"round {number + 1}/{rounds}  {task.title:28} {subject.name:6} {cpu:7.3f} s of CPU")
    return turns


# --- the stage


@contextmanager
def two_nodes(say: Callable[[str], None]) -> Iterator[Lab]:
    """A lab with a captured and a plain pair of client and server, tied to this process."""
    with tempfile.TemporaryDirectory(prefix="ambient-mesh-bench-") as directory:
        pods = [_pod(namespace, name, node) for namespace in ("captured", "plain") for name, node in (("client", "n1"), ("server", "n2"))]
        Path(directory, "cluster.yaml").write_text(_NODES + "".join(f"---\n{json.dumps(pod)}\n" for pod in pods))
        say("starting a lab of two nodes")
        with start_lab(Path(directory), f"bench-{os.getpid()}", UpOptions(movers=1, tied=True)) as starting:
            for event in starting:
                if isinstance(event, Failed):
                    raise Broken(f"{event.because}: {event.pending}")
                if isinstance(event, Ready):
                    break
            yield Lab(starting.home)


def ours(lab: Lab) -> Subject:
    """The agents of both nodes."""
    pids = tuple(pid for node in ("n1", "n2") for pid in _agent(lab.home, node))
    return Subject("ours", "captured", (_ip(lab, "captured", "server"), PORT), pids)


@contextmanager
def envoys(lab: Lab, directory: Path) -> Iterator[Subject]:
    """An Envoy in each of the plain pods."""
    ca = FakeCa()
    server = _ip(lab, "plain", "server")
    server_identity = SpiffeId("cluster.local", "plain", "server")
    tunnels = SocketAddress(parse_ip(server), INBOUND_HBONE)
    entry = SocketAddress(parse_ip("127.0.0.1"), ENTRY)
    client_bundle = ca.issue(SpiffeId("cluster.local", "plain", "client"))
    configs = {
        "server": (server_config([tunnels], ca.issue(server_identity), callers="spiffe://cluster.local/"), INBOUND_HBONE),
        "client": (client_config(entry, client_bundle, tunnels, f"{server}:{PORT}", expected=server_identity), ENTRY),
    }
    with ExitStack() as stack:
        pids = []
        for pod, (config, port) in configs.items():
            path = directory / f"{pod}.json"
            path.write_text(json.dumps(config))
            process = stack.enter_context(_ended(lab.open_command(pod, command(path), namespace="plain").start(stdin=subprocess.DEVNULL)))
            _wait_until(lambda process=process, port=port: is_listening(process.pid, port), f"Envoy in {pod} listens")  # type: ignore[misc]
            pids.append(_child(process.pid))
        yield Subject("envoy", "plain", (str(entry.ip), ENTRY), tuple(pids))


def _pod(namespace: str, name: str, node: str) -> dict[str, object]:
    run = [sys.executable, _TRAFFIC, "serve", str(PORT)] if name == "server" else ["sleep", "infinity"]
    container: dict[str, object] = {"name": "main", "command": run}
    if name == "server":
        container["readinessProbe"] = {"tcpSocket": {"port": PORT}}
    spec = {"nodeName": node, "serviceAccountName": name, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def _passes(lab: Lab, subject: Subject) -> bool:
    try:
        _traffic(lab, subject, Task("", "short", 1))
    except Broken:
        return False
    return True


def _traffic(lab: Lab, subject: Subject, task: Task) -> dict[str, float]:
    host, port = subject.entry
    argv = [sys.executable, _TRAFFIC, task.client, host, str(port), str(task.amount)]
    process = lab.open_command("client", argv, namespace=subject.namespace).start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, complaint = process.communicate(timeout=_PATIENCE)
    if process.returncode != 0:
        raise Broken(f"{task.client} through {subject.name}: {complaint}")
    found: dict[str, float] = json.loads(output)
    return found


def _ip(lab: Lab, namespace: str, name: str) -> str:
    return next(pod.ips[0] for pod in lab.status().pods if (pod.namespace, pod.name) == (namespace, name))


def _agent(home: LabHome, node: str) -> list[int]:
    """The processes of a node's agent: those that its environment was given to."""
    mark = f"RUN_DIR={home.run_of(node)}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    if len(found) < 3:
        raise Broken(f"the agent of {node} has only the processes {found}")
    return found


def _child(pid: int) -> int:
    """The command's own process: the one we started waits for it outside the pod's PID namespace."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


@contextmanager
def _ended(process: Popen) -> Iterator[Popen]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"not within {_PATIENCE:g} s: {what}")
        time.sleep(0.05)
