"""The user's side of a cluster: start one, find one that runs, use it from tests, end it. Synchronous."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from meshctl_py.lab.enter import Entry
from meshctl_py.logs import tail
from tests.cluster.harness import cgroups
from tests.cluster.harness.api import Api, Object, condition, path_of
from tests.cluster.harness.assign import MAX_NODES, assign_nodes
from tests.cluster.harness.build import Parts, build_parts
from tests.cluster.harness.home import ClusterError, ClusterHome, claim_cluster, clear, find_clusters
from tests.cluster.harness.images import Seed, build_project_image, prepare_images
from tests.cluster.harness.init import bury
from tests.cluster.harness.settings import Answer, Event, Failed, Order, ProgramStatus, Ready, Settings, Telling

T = TypeVar("T")

PATIENCE: Final = 90.0
"""Seconds a condition may take on a busy machine before a test fails."""
_BRING_UP: Final = 180.0
_DOWN_WITHIN: Final = 20.0
_ANSWER_WITHIN: Final = 30.0
_REPOSITORY: Final = Path(__file__).resolve().parents[3]
_BLOCK: Final = 1 << 20


def wait_until(condition: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
    """The first true value of ``condition``. Raises AssertionError naming ``what`` when patience ends."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience:g} s: {what} (last: {value!r})")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Options:
    """See `settings.Settings`. ``project`` False leaves the project's image out, which spares building it."""

    nodes: int = 2
    dual_stack: bool = True
    tied: bool = False
    project: bool = True
    patience: float = _BRING_UP


def prepare(*, project: bool = True) -> tuple[Parts, Seed]:
    """Everything that is built before a cluster can start: minutes the first time, nothing later. Raises ClusterError."""
    parts = build_parts()
    return parts, prepare_images(parts, project=project)


def start_cluster(name: str, options: Options, tell: Callable[[str], None]) -> Cluster:
    """Bring a cluster up and wait until it is ready. Raises ClusterError; nothing of the cluster is left then, but its logs."""
    if not 1 <= options.nodes <= MAX_NODES:
        raise ClusterError(f"a cluster has 1 to {MAX_NODES} nodes, not {options.nodes}")
    bury_the_dead()
    parts, seed = prepare(project=options.project)
    home, lock = claim_cluster(name)
    clear(home)
    home.logs.mkdir()
    ours, theirs = socket.socketpair()
    with theirs, socket.create_server(("127.0.0.1", 0)) as listener:
        settings = Settings(
            name=name,
            path=str(home.path),
            programs=str(parts.programs),
            tree=str(parts.node),
            seed=str(seed.path),
            nodes=options.nodes,
            dual_stack=options.dual_stack,
            patience=options.patience,
            tied=options.tied,
            lock=lock,
            events=theirs.fileno(),
            listener=listener.fileno(),
        )
        text = msgspec.json.encode(settings)
        home.config.write_bytes(text)
        with (home.logs / "keeper.log").open("ab") as log:
            undertaker = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.harness.init", text.decode()],
                cwd=_REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock, theirs.fileno(), listener.fileno()),
                start_new_session=True,  # the terminal's Ctrl-C is ours to act on
            )
    os.close(lock)
    cluster = Cluster(home, undertaker, ours)
    try:
        for event in _events(ours, home):
            if isinstance(event, Telling):
                tell(event.text)
            elif isinstance(event, Failed):
                raise ClusterError(f"cluster {name} did not come up: {event.because}\n(logs: {home.logs})")
    except BaseException:
        cluster.end()
        raise
    return cluster


@contextmanager
def running_cluster(name: str, options: Options, tell: Callable[[str], None]) -> Iterator[Cluster]:
    """A cluster for as long as the block runs, and not longer whatever ends it. Raises ClusterError."""
    cluster = start_cluster(name, replace(options, tied=True), tell)
    try:
        yield cluster
    finally:
        cluster.end()


def find_cluster(name: str) -> Cluster:
    """A cluster that runs. Raises ClusterError."""
    for home in find_clusters():
        if home.name == name and home.alive:
            return Cluster(home)
    running = ", ".join(home.name for home in find_clusters() if home.alive)
    raise ClusterError(f"no cluster named {name} is running" + (f", but {running}" if running else ": 'make cluster' starts one"))


def bury_the_dead() -> None:
    """Remove what killed clusters left; see `init.bury`."""
    for home in find_clusters():
        if not home.alive:
            with suppress(ClusterError):  # somebody else starts it at this moment
                _, lock = claim_cluster(home.name)
                bury(home)
                os.close(lock)


def _events(connection: socket.socket, home: ClusterHome) -> Iterator[Event]:
    buffer = b""
    while data := connection.recv(_BLOCK):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            event = msgspec.json.decode(line, type=Event)
            yield event
            if isinstance(event, Ready):
                return
    last = "\n    ".join(tail(home.logs / "keeper.log", 20))
    yield Failed(f"it ended unexpectedly; its last words:\n    {last}")


class Node:
    """One node of a running cluster."""

    def __init__(self, cluster: str, name: str) -> None:
        self.cluster = cluster
        self.name = name

    @property
    def pid(self) -> int:
        """Its first process, as the host counts. Raises AssertionError when the node is down."""
        for pid in cgroups.processes_of(self.cluster, self.name):
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    # The same process in the host's, the cluster's and the node's PID namespace.
                    if line.startswith("NSpid:") and len(line.split()) == 4 and line.split()[-1] == "1":
                        return pid
        raise AssertionError(f"node {self.name} of {self.cluster} is down")

    def command(self, *argv: str) -> list[str]:
        """The command line that runs a program on the node as root there: its files, its network, its processes."""
        kinds = ("cgroup", "ipc", "uts", "net", "pid", "mnt")
        pid, members = self.pid, cgroups.members_files(self.cluster, self.name)
        return Entry(argv, join=tuple(f"/proc/{pid}/ns/{kind}" for kind in kinds), as_child=True, cgroups=members).command()

    def run(self, *argv: str, check: bool = True, timeout: float = PATIENCE) -> str:
        """Run a program on the node and return what it prints. Raises AssertionError with its complaint if it fails."""
        return _checked(self.command(*argv), f"{' '.join(argv)} on {self.name}", check=check, timeout=timeout)

    def pod_processes(self, uid: str) -> list[int]:
        """The processes of a pod, as the host counts; the first is `pause`."""
        return cgroups.processes_of(self.cluster, self.name, pod=uid)


class Cluster:
    """A running cluster."""

    def __init__(self, home: ClusterHome, undertaker: subprocess.Popen[bytes] | None = None, events: socket.socket | None = None) -> None:
        self.home = home
        self.name = home.name
        self.settings = msgspec.json.decode(home.config.read_bytes(), type=Settings)
        self._undertaker = undertaker
        self._events = events

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, good on the host."""
        return self.home.kubeconfig

    @cached_property
    def api(self) -> Api:
        """The API server, as administrator."""
        return Api.of(self.kubeconfig)

    @property
    def nodes(self) -> tuple[Node, ...]:
        assigned = assign_nodes(self.settings.nodes, dual_stack=self.settings.dual_stack)
        return tuple(Node(self.name, node.name) for node in assigned)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = PATIENCE) -> str:
        """Run kubectl as administrator and return its output. Raises AssertionError with its complaint if it fails."""
        command = self.kubectl_command(*arguments)
        return _checked(command, f"kubectl {' '.join(arguments)}", stdin=stdin, check=check, timeout=timeout)

    def kubectl_command(self, *arguments: str) -> list[str]:
        """The command line of `kubectl`."""
        return [f"{self.settings.programs}/kubectl", f"--kubeconfig={self.kubeconfig}", *arguments]

    def apply(self, manifest: str, namespace: str | None = None) -> None:
        """``kubectl apply`` of YAML text."""
        self.kubectl("apply", "-f", "-", *(["-n", namespace] if namespace else []), stdin=manifest)

    def exec(self, namespace: str, pod: str, *argv: str, check: bool = True, timeout: float = PATIENCE) -> str:
        """Run a program in a pod, through the API server and the kubelet, and return its output."""
        return self.kubectl("exec", "-n", namespace, pod, "--", *argv, check=check, timeout=timeout)

    def logs(self, namespace: str, pod: str, *arguments: str) -> str:
        return self.kubectl("logs", "-n", namespace, pod, *arguments)

    @contextmanager
    def namespace(self, name: str, **labels: str) -> Iterator[str]:
        """A namespace for a test, with its default service account; deletion is begun at the end and not waited for."""
        metadata: Object = {"name": name, "labels": {key.replace("__", "/"): value for key, value in labels.items()}}
        wait_until(lambda: self.api.find("Namespace", name) is None, f"the former namespace {name} is gone")
        self.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        try:
            wait_until(lambda: self.api.find("ServiceAccount", "default", name), f"the service account of {name}")
            yield name
        finally:
            self.api.delete(path_of("Namespace", name))

    def wait_ready(self, namespace: str, *pods: str, patience: float = PATIENCE) -> list[Object]:
        """Wait until these pods, or all of the namespace, are ready; their objects."""

        def ready() -> list[Object]:
            found = [pod for pod in self.api.list("Pod", namespace) if not pods or pod["metadata"]["name"] in pods]
            return found if len(found) >= max(len(pods), 1) and all(condition(pod, "Ready") for pod in found) else []

        try:
            return wait_until(ready, f"pods of {namespace} are ready", patience)
        except AssertionError as exc:
            events = [f"{event['reason']}: {event['message']}" for event in self.api.list("Event", namespace)]
            raise AssertionError("\n    ".join([str(exc), *events[-20:]])) from None

    def node_of(self, pod: Object) -> Node:
        """Where a pod, as the API shows it, runs."""
        return self.node(str(pod["spec"]["nodeName"]))

    def pod_command(self, pod: Object, *argv: str) -> list[str]:
        """The command line that runs one of the host's programs in a pod's network namespace."""
        pids = self.node_of(pod).pod_processes(pod["metadata"]["uid"])
        assert pids, f"pod {pod['metadata']['name']} has no process"
        return ["nsenter", f"--net=/proc/{pids[0]}/ns/net", *argv]

    def in_pod(self, pod: Object, *argv: str, check: bool = True, timeout: float = PATIENCE) -> str:
        """Run one of the host's programs (nft, ip, ss) in a pod's network namespace; the pod need not have it."""
        return _checked(self.pod_command(pod, *argv), f"{argv[0]} in {pod['metadata']['name']}", check=check, timeout=timeout)

    def load_image(self, archive: Path) -> None:
        """Load a docker archive into all nodes."""
        for node in self.nodes:
            own = self.home.node(node.name).kubelet / archive.name  # a directory that the node sees
            shutil.copy(archive, own)
            try:
                node.run("ctr", "--namespace", "k8s.io", "images", "import", f"/var/lib/kubelet/{archive.name}")
            finally:
                own.unlink()

    def load_project(self) -> None:
        """Build the project's image of the code as it is now, and load it. Pods have to be restarted to run it."""
        self.load_image(build_project_image(build_parts()))

    def programs(self) -> dict[str, ProgramStatus]:
        """The cluster's own programs by name: ``etcd``, ``kube-apiserver``, ``n1`` (the node itself), ``n1/kubelet``..."""
        return {status.name: status for status in self._order(Order("status")).programs}

    def stop(self, name: str) -> None:
        """End a program, or a whole node with all its pods. Raises ClusterError when it does not run."""
        self._order(Order("stop", name))

    def start(self, name: str) -> None:
        """Start what was stopped; a node boots with the disk it had, but without pods. Raises ClusterError when it runs."""
        self._order(Order("start", name))

    def signal(self, name: str, number: int) -> None:
        """Signal a program; one that ends is started again. Raises ClusterError when it does not run."""
        self._order(Order("signal", name, number))

    def end(self) -> None:
        """End the cluster and wait until nothing of it is left. Raises ClusterError if something is."""
        if self._events is not None:
            self._events.close()
        with suppress(OSError, ValueError, ProcessLookupError):
            os.kill(int(self.home.undertaker.read_text()), signal.SIGTERM)
        if self._undertaker is not None:
            self._undertaker.wait()
        if not self.home.wait_until_gone(_DOWN_WITHIN):
            raise ClusterError(f"cluster {self.name} does not end: see {self.home.logs}")
        left = bury(self.home)  # the undertaker has done it, unless it was killed
        if left:
            raise ClusterError(f"cluster {self.name} left control groups that can't be removed: {', '.join(map(str, left))}")

    def _order(self, order: Order) -> Answer:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ANSWER_WITHIN)
            connection.connect(str(self.home.control))
            connection.sendall(msgspec.json.encode(order))
            content = b"".join(iter(lambda: connection.recv(_BLOCK), b""))
        answer = msgspec.json.decode(content, type=Answer)
        if answer.refused:
            raise ClusterError(answer.refused)
        return answer


def _checked(command: Sequence[str], what: str, *, stdin: str | None = None, check: bool, timeout: float) -> str:
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=timeout, **given
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{what}: status {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout
