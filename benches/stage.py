"""Where subjects stand: two nodes of a lab joined by its router, and for each subject a client pod on one, a server pod on the other.

- *no proxy*: nothing between client and server.
- *ours*: whole agents as they ship: captured pods, a policy evaluated for every connection, access log, metrics. Their CPU is that of
  supervisor, brain and mover of both nodes. *ours, 2 movers* is the same in a lab of its own.
- *envoy*: an Envoy in either pod with one worker each (`benches.envoy`), its connections redirected to it by nftables as ours are.
- *ztunnel*: the same with a Rust ztunnel with one worker (`benches.ztunnel`), where the variable ZTUNNEL_BIN names one.

Every process has a session of its own, as a lab's processes have: the kernel divides CPUs among sessions first (sched(7), autogroup).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from benches import envoy, load, ztunnel
from benches.rows import ENVOY, NO_PROXY, OURS, OURS_TWO, ZTUNNEL
from mesh.model.labels import DATAPLANE_MODE
from mesh.model.ports import DNS, DOMAIN, INBOUND_HBONE, OUTBOUND, PROXY_MARK
from mesh.runtime.build import COMPILED, COMPILED_LIBRARY
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import Config, command, is_listening
from meshctl_py.lab.client import Lab, Popen, UpOptions, start_lab
from meshctl_py.lab.home import LabHome
from meshctl_py.lab.messages import Failed, Ready

ZTUNNEL_BIN: Final = os.environ.get("ZTUNNEL_BIN")
DATA_PATH: Final = (NO_PROXY, OURS, OURS_TWO, ENVOY, *([ZTUNNEL] if ZTUNNEL_BIN else []))
"""The subjects of everything that is about bytes on their way."""
PROXIES: Final = tuple(name for name in DATA_PATH if name not in (NO_PROXY, OURS_TWO))
TUNNEL_EACH: Final = {"POOL_MAX_STREAMS_PER_CONNECTION": "1", "POOL_UNUSED_RELEASE_TIMEOUT": "100ms"}
"""For agents: every connection gets a tunnel of its own, which goes soon after it."""
PORT: Final = 7100
SERVICE: Final = "server.captured.svc.cluster.local"
"""A name that proxies answer for."""
WARM_UP: Final = 200
_TIME_WAITS: Final = 4096
"""A pod remembers so many closed connections. With more than 14 000, Linux looks for a free port for longer than all else takes: whose turn
it is would matter, not who it is."""
_PATIENCE: Final = 60.0
_ESTABLISHED: Final = "01"
_LOAD: Final = str(Path(load.__file__).resolve())
_NAMESPACES: Final = {NO_PROXY: "plain", OURS: "captured", OURS_TWO: "captured", ENVOY: "envoy", ZTUNNEL: "ztunnel"}
_RULES: Final = f"""
table inet bench {{
  chain output {{
    type nat hook output priority -100;
    meta mark != {PROXY_MARK} tcp dport {PORT} redirect to :{OUTBOUND}
    meta mark != {PROXY_MARK} udp dport {DOMAIN} redirect to :{DNS}
  }}
}}
"""
_POLICY: Final = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: captured}
spec:
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/captured/sa/client]}}]}]
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: captured}
spec: {selector: {app: server}, ports: [{port: 80, targetPort: 7100}]}
"""


class Broken(Exception):
    """The bench could not be set up, or traffic did not pass; the text says what was seen."""


Say = Callable[[str], None]


class LoadClient:
    """The load in a client's pod, waiting for work."""

    def __init__(self, process: Popen, where: str) -> None:
        self._process = process
        self._where = where

    def do(self, what: str, **arguments: object) -> dict[str, float]:
        """One piece of work and what was seen of it. Raises Broken."""
        self.begin(what, **arguments)
        return self.finish(what)

    def begin(self, what: str, **arguments: object) -> None:
        """Set about a piece of work. Raises Broken."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise Broken(f"the load in {self._where}: {exc}") from exc

    def finish(self, what: str) -> dict[str, float]:
        """Wait for the work that was begun, and what was seen of it. Raises Broken."""
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
        except OSError as exc:
            raise Broken(f"the load in {self._where}: {exc}") from exc
        if not line:
            raise Broken(f"the load in {self._where} has ended")
        seen: dict[str, Any] = json.loads(line)
        if "error" in seen:
            raise Broken(f"{what} through {self._where}: {seen['error']}")
        return seen

    def net(self, table: str) -> str:
        """A file of /proc/net, as the pod sees it."""
        return Path(f"/proc/{self._process.pid}/net/{table}").read_text()


@dataclass(frozen=True, slots=True)
class Subject:
    """Two proxies in series, or none. ``server`` is reached through the mesh, ``outsider`` is a server beyond it. ``neighbour`` is another
    load in the client's pod."""

    name: str
    client: LoadClient
    server: str
    outsider: str
    pids: tuple[int, ...]
    neighbour: LoadClient | None = field(default=None, kw_only=True)

    def beyond(self) -> Subject:
        """The same with the server that is not in the mesh."""
        return replace(self, server=self.outsider)

    def tunnels(self) -> int:
        """How many HBONE connections the client's pod has."""
        lines = [line.split() for table in ("tcp", "tcp6") for line in self.client.net(table).splitlines()[1:]]
        return sum(int(remote.rpartition(":")[2], 16) == INBOUND_HBONE and state == _ESTABLISHED for _, _, remote, state, *_ in lines)

    def do(self, what: str, **arguments: object) -> dict[str, float]:
        """A piece of work with the server. Raises Broken."""
        return self.client.do(what, host=self.server, port=PORT, **arguments)

    @contextmanager
    def crowded(self, seconds: float) -> Iterator[None]:
        """A neighbour moves bytes to the server for so long, and has another connection that it does not read. Raises Broken."""
        assert self.neighbour is not None
        self.neighbour.begin("crowd", host=self.server, port=PORT, seconds=seconds)
        try:
            yield
        finally:
            self.neighbour.finish("crowd")

    def look_up(self, **arguments: object) -> dict[str, float]:
        """Queries for the address of `SERVICE`, to a server that the proxy goes before. Raises Broken."""
        return self.client.do("look_up", host=self.outsider, port=DOMAIN, name=SERVICE, **arguments)


@contextmanager
def subjects(say: Say, wanted: Collection[str], *, tunnel_each: bool = False) -> Iterator[tuple[Subject, ...]]:
    """Those wanted, warm. ``tunnel_each``: no two connections share a tunnel. Raises Broken."""
    agents = TUNNEL_EACH if tunnel_each else {}
    with ExitStack() as stack:
        made: dict[str, Subject] = {}
        lab = stack.enter_context(_two_nodes(say, [name for name in wanted if name != OURS_TWO], movers=1, agents=agents))
        outsider = pod_ip(lab, _NAMESPACES[NO_PROXY], "server")
        for name in wanted:
            where = lab if name != OURS_TWO else stack.enter_context(_two_nodes(say, [OURS_TWO], movers=2, agents=agents))
            pids: tuple[int, ...] = ()
            if name in (OURS, OURS_TWO):
                pids = tuple(pid for node in ("n1", "n2") for pid in agent_of(where.home, node))
                _check_data_path(pids)
            elif name == ENVOY:
                pids = stack.enter_context(_envoys(where, tunnel_each=tunnel_each))
            elif name == ZTUNNEL:
                pids = stack.enter_context(_ztunnels(where, tunnel_each=tunnel_each))
            there = outsider if where is lab else pod_ip(where, _NAMESPACES[NO_PROXY], "server")
            server = pod_ip(where, _NAMESPACES[name], "server")
            client, neighbour = (stack.enter_context(load_client(where, _NAMESPACES[name])) for _ in range(2))
            made[name] = subject = Subject(name, client, server, there, pids, neighbour=neighbour)
            _warm(subject)
        yield tuple(made[name] for name in wanted)


def _check_data_path(pids: Collection[int]) -> None:
    """Raises Broken when the agents run another data path than the bench itself, which says in its report which one was measured."""
    mapped = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    if (COMPILED_LIBRARY in mapped) != COMPILED:
        raise Broken(f"the agents' data path is {'not ' if COMPILED else ''}compiled, and this bench's is{'' if COMPILED else ' not'}")


@contextmanager
def lab_of(
    say: Say, files: Mapping[str, str], *, name: str, movers: int = 1, agents: Mapping[str, str] | None = None
) -> Iterator[tuple[Lab, Path]]:
    """A lab of YAML files, tied to this process, and the directory it follows. Raises Broken."""
    with tempfile.TemporaryDirectory(prefix="ambient-mesh-bench-") as directory:
        for file, text in files.items():
            Path(directory, file).write_text(text)
        say(f"starting a lab: {name}")
        options = UpOptions(movers=movers, tied=True, agents=agents or {}, patience=2 * _PATIENCE)
        with start_lab(Path(directory), f"bench-{os.getpid()}-{name}", options) as starting:
            for event in starting:
                if isinstance(event, Failed):
                    raise Broken(f"{event.because}: {event.pending}")
                if isinstance(event, Ready):
                    break
            yield Lab(starting.home), Path(directory)


def node(name: str) -> str:
    """YAML of a node."""
    return f"---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n"


def namespace(name: str, *, captured: bool = False) -> str:
    """YAML of a namespace, of the mesh or not."""
    return f"---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {json.dumps(_labels(captured))}}}\n"


def pod(namespace: str, name: str, on: str, run: list[str], *, port: int | None = None, captured: bool = False) -> str:
    """YAML of a pod that runs a command under a service account of its own name; ready when it listens on ``port``. ``captured``: the
    pod itself asks for it."""
    container: dict[str, object] = {"name": "main", "command": run}
    if port is not None:
        container["readinessProbe"] = {"tcpSocket": {"port": port}}
    spec = {"nodeName": on, "serviceAccountName": name, "containers": [container]}
    metadata = {"name": name, "namespace": namespace, "labels": {"app": name, **_labels(captured)}}
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    return f"---\n{json.dumps(whole)}\n"


def _labels(captured: bool) -> dict[str, str]:
    return {DATAPLANE_MODE: "ambient"} if captured else {}


def agent_of(home: LabHome, node: str) -> list[int]:
    """The processes of a node's agent: those that its environment was given to. Raises Broken."""
    found = _given("RUN_DIR", home.run_of(node))
    if len(found) < 3:
        raise Broken(f"the agent of {node} has only the processes {found}")
    return found


def waypoint_of(home: LabHome, namespace: str, name: str) -> int:
    """The process of a waypoint's only pod. Raises Broken."""
    found = _given("AUTH_TOKEN", home.tokens / f"pod_{namespace}_{name}-0.token")
    if len(found) != 1:
        raise Broken(f"waypoint {namespace}/{name} is the processes {found}, and not one")
    return found[0]


def _given(variable: str, path: Path) -> list[int]:
    """Processes whose environment has it so."""
    mark, found = f"{variable}={path}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool], what: str, patience: float = _PATIENCE) -> None:
    """Raises Broken when patience ends."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"not within {patience:g} s: {what}")
        time.sleep(0.02)


# --- subjects


@contextmanager
def _two_nodes(say: Say, wanted: Collection[str], *, movers: int, agents: Mapping[str, str]) -> Iterator[Lab]:
    namespaces = dict.fromkeys([*(_NAMESPACES[name] for name in wanted), _NAMESPACES[NO_PROXY]])
    wait, serve = _forgetful(["sleep", "infinity"]), _forgetful([sys.executable, _LOAD, "serve", str(PORT)])
    pods = [pod(name, "client", "n1", wait) + pod(name, "server", "n2", serve, port=PORT) for name in namespaces]
    made = [namespace(name, captured=name == _NAMESPACES[OURS]) for name in namespaces]
    objects = "".join([node("n1"), node("n2"), *made, _POLICY, *pods])
    with lab_of(say, {"cluster.yaml": objects}, name=f"{movers}-movers", movers=movers, agents=agents) as (lab, _):
        yield lab


def _forgetful(run: list[str]) -> list[str]:
    """The command of a pod that remembers few closed connections."""
    return ["sh", "-c", f'echo {_TIME_WAITS} > /proc/sys/net/ipv4/tcp_max_tw_buckets && exec "$@"', "sh", *run]


@contextmanager
def load_client(lab: Lab, namespace: str, run: Sequence[str] = (sys.executable, _LOAD)) -> Iterator[LoadClient]:
    """The load in the pod ``client`` of a namespace. ``run``: how it is started."""
    started = lab.open_command("client", [*run, "work"], namespace=namespace)
    with _ended(started.start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)) as process:
        yield LoadClient(process, namespace)


@contextmanager
def _envoys(lab: Lab, *, tunnel_each: bool) -> Iterator[tuple[int, ...]]:
    namespace = _NAMESPACES[ENVOY]
    client, server = envoy.pair(FakeCa(), namespace, pod_ip(lab, namespace, "server"), SERVICE, lab.home.logs, tunnel_each=tunnel_each)

    def write(name: str, config: Config) -> list[str]:
        path = lab.home.path / f"envoy-{name}.json"
        path.write_text(json.dumps(config))
        return command(path)

    with _proxies(lab, namespace, {"server": write("server", server), "client": write("client", client)}) as pids:
        yield pids


@contextmanager
def _ztunnels(lab: Lab, *, tunnel_each: bool) -> Iterator[tuple[int, ...]]:
    assert ZTUNNEL_BIN is not None
    namespace = _NAMESPACES[ZTUNNEL]
    mesh = ztunnel.local_mesh(namespace, pod_ip(lab, namespace, "client"), pod_ip(lab, namespace, "server"))

    def argv(name: str, node: str) -> list[str]:
        told = ztunnel.environment(namespace, name, node, mesh, tunnel_each=tunnel_each)
        return ["env", *(f"{key}={value}" for key, value in told.items()), str(Path(ZTUNNEL_BIN or "").resolve())]

    with _proxies(lab, namespace, {"server": argv("server", "n2"), "client": argv("client", "n1")}) as pids:
        yield pids


@contextmanager
def _proxies(lab: Lab, namespace: str, commands: Mapping[str, list[str]]) -> Iterator[tuple[int, ...]]:
    """A foreign proxy in the server's and the client's pod, and rules that lead the client's connections to it."""
    with ExitStack() as stack:
        pids = []
        for name, argv in commands.items():
            log = stack.enter_context((lab.home.logs / f"{namespace}-{name}.log").open("wb"))
            starting = lab.open_command(name, argv, namespace=namespace)
            process = stack.enter_context(_ended(starting.start(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)))
            port = INBOUND_HBONE if name == "server" else OUTBOUND

            pids.append(_wait_for_port(process, port, Path(log.name)))
        rules = lab.open_command("client", ["nft", "-f", "-"], namespace=namespace).start(stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        _, complaint = rules.communicate(_RULES)
        if rules.returncode != 0:
            raise Broken(f"nft in {namespace}: {complaint}")
        yield tuple(pids)


def _wait_for_port(process: Popen, port: int, log: Path) -> int:
    """The command's own process, once it listens. Raises Broken."""
    found: list[int] = []

    def listens() -> bool:
        if process.poll() is not None:
            raise Broken(f"it has ended: {log.read_text(errors='replace')[-2000:]}")
        # Not asked of the process that we started: it may not have entered the pod yet, and outside somebody else may listen on the port.
        found[:] = _children(process.pid)[:1]
        return bool(found) and is_listening(found[0], port)

    wait_until(listens, f"somebody listens on port {port}; {log.name}: {log.read_text(errors='replace')[-2000:]}")
    return found[0]


def _warm(subject: Subject) -> None:
    """Pods are captured before everybody has heard that they are; until then policy refuses the client, which has no identity yet."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            subject.do("connect", count=1, parallel=1)
            break
        except Broken:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    for way in (subject, subject.beyond()):
        way.do("connect", count=WARM_UP, parallel=4)
        way.do("bulk", connections=2, up=10_000_000, down=10_000_000)


def pod_ip(lab: Lab, namespace: str, name: str) -> str:
    """Its first address."""
    return next(pod.ips[0] for pod in lab.status().pods if (pod.namespace, pod.name) == (namespace, name))


def _children(pid: int) -> list[int]:
    """The command's own process: the one we started waits for it outside the pod's PID namespace."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@contextmanager
def _ended(process: Popen) -> Iterator[Popen]:
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
