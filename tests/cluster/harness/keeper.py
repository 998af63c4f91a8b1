"""The cluster's own process: wires it, starts its programs in their order, keeps them running, and carries out what its users order."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import trio
from ruamel.yaml import YAML

from mesh.telemetry.log import configure, get_logger
from meshctl_py.lab.enter import Entry
from meshctl_py.lab.processes import LabProcess, descendants
from meshctl_py.logs import tail
from tests.cluster.harness import cgroups, credentials, network, programs
from tests.cluster.harness.api import Api, ApiRefused, Object, condition
from tests.cluster.harness.assign import API_PORT, API_SERVICE, CONTROL_PLANE, DOMAIN, SERVICE_RANGES, NodeAssignment, assign_nodes
from tests.cluster.harness.home import ClusterHome
from tests.cluster.harness.images import plant
from tests.cluster.harness.rootfs import Machine
from tests.cluster.harness.settings import (
    CONTROL_PLANE_PROGRAMS,
    NODE_PROGRAMS,
    Answer,
    Event,
    Failed,
    Order,
    ProgramStatus,
    Ready,
    Settings,
    Telling,
)

log = get_logger("cluster")

_GRACE: Final = 5.0
"""Seconds a program has to end by itself; an API server would wait for its watches much longer."""
_LOOK_AGAIN: Final = 0.05
_REBOOT: Final = 0.5
"""Seconds from a node's unexpected end to its next start."""
_MOUNTED_WITHIN: Final = 10.0
"""Seconds a machine may take to mount everything."""
_TAIL: Final = 8
_MANIFESTS: Final = Path(__file__).resolve().parents[1] / "manifests"
_NAMESPACES: Final = ("cgroup", "ipc", "uts", "net", "pid", "mnt")
"""In the order in which they are joined: with the last one, the paths of the others are gone."""
_BLOCK: Final = 65536


class NotReady(Exception):
    """Something did not come up; the text says what."""


class Service:
    """Something that can be started and stopped by name."""

    def __init__(self, run: Callable[[], Awaitable[None]]) -> None:
        self._run = run
        self._scope: trio.CancelScope | None = None
        self._ended = trio.Event()

    def start(self, nursery: trio.Nursery) -> bool:
        """False if it runs already."""
        if self._scope is not None:
            return False
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        nursery.start_soon(self._live, self._scope, self._ended)
        return True

    async def stop(self) -> bool:
        """Until it has ended. False if it does not run."""
        if self._scope is None:
            return False
        self._scope.cancel()
        await self._ended.wait()
        return True

    async def _live(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            with scope:
                await self._run()
        finally:
            self._scope = None
            ended.set()


class Cluster:
    """All of the cluster's programs under their names, and the way up."""

    def __init__(self, settings: Settings, tell: Callable[[Event], Awaitable[None]]) -> None:
        self.settings = settings
        self.home = ClusterHome(settings.name, Path(settings.path))
        self.nodes = assign_nodes(settings.nodes, dual_stack=settings.dual_stack)
        self.processes: dict[str, LabProcess] = {}
        self.services: dict[str, Service] = {}
        self._tell = tell
        self._programs = Path(settings.programs)
        self._authority = credentials.Authority()
        self._api_ready = trio.Event()
        self._machines: dict[str, int] = {}
        own = {
            "etcd": programs.etcd(Path(settings.tree, "usr/bin/etcd"), self.home),
            "kube-apiserver": programs.api_server(self._programs, self.home, dual_stack=settings.dual_stack),
            "kube-controller-manager": programs.controller_manager(self._programs, self.home),
            "kube-scheduler": programs.scheduler(self._programs, self.home),
        }
        for name in CONTROL_PLANE_PROGRAMS:
            self._add_program(name, partial(Entry, own[name]))
        for node in self.nodes:
            self._add_node(node)

    def _add_program(self, name: str, entry: Callable[[], Entry]) -> None:
        process = LabProcess(name, self.home.logs / f"{name.replace('/', '-')}.log", lambda: None)

        async def run() -> None:
            await process.run_for_ever(entry(), _environment(), grace=_GRACE)

        self.processes[name] = process
        self.services[name] = Service(run)

    def _add_node(self, node: NodeAssignment) -> None:
        self.processes[node.name] = LabProcess(node.name, self.home.logs / f"{node.name}.log", lambda: None)
        self.services[node.name] = Service(lambda: self._run_node(node))
        for name, argv in zip(NODE_PROGRAMS, (programs.containerd(), programs.kube_proxy(), programs.kubelet(node)), strict=True):
            self._add_program(f"{node.name}/{name}", partial(self._inside, node, argv))

    async def bring_up(self, nursery: trio.Nursery) -> None:
        """From nothing to ready. Raises NotReady, and whatever the kernel refuses."""
        await trio.to_thread.run_sync(self._write_credentials)
        await self._tell(Telling("control plane"))
        network.build_router()
        self.services["etcd"].start(nursery)
        for node in self.nodes:
            nursery.start_soon(self._prepare_node, node, nursery)
        await _until(_listening("127.0.0.1", 2379), "etcd listens")
        self.services["kube-apiserver"].start(nursery)
        nursery.start_soon(self._relay)
        api = Api.of(self.home.kubeconfig, f"https://{CONTROL_PLANE[0]}:{API_PORT}")
        await _until(_answering(api), "the API server is ready")
        self._api_ready.set()
        for name in ("kube-controller-manager", "kube-scheduler"):
            self.services[name].start(nursery)
        await self._tell(Telling("nodes and DNS"))
        await trio.to_thread.run_sync(_apply_manifests, api)
        await _until(lambda: all_ready(api, len(self.nodes)), "nodes and DNS are ready")

    async def _prepare_node(self, node: NodeAssignment, nursery: trio.Nursery) -> None:
        await trio.to_thread.run_sync(self._lay_out, node)
        self.services[node.name].start(nursery)

    def _lay_out(self, node: NodeAssignment) -> None:
        own = self.home.node(node.name)
        programs.lay_out_node(self.home, node, Path(self.settings.tree))
        plant(Path(self.settings.seed), own.containerd)
        own.kubelet.mkdir()

    async def _run_node(self, node: NodeAssignment) -> None:
        """Run a node, and boot it again whenever it ends, until cancelled."""
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_machine, node, nursery.cancel_scope)
                self._machines[node.name] = await self._wait_machine(node)
                await trio.to_thread.run_sync(network.wire_node, node, self._machines[node.name])
                self.services[f"{node.name}/containerd"].start(nursery)
                await self._api_ready.wait()
                for name in ("kube-proxy", "kubelet"):
                    self.services[f"{node.name}/{name}"].start(nursery)
            log.warning("node.ended", node=node.name)
            await trio.sleep(_REBOOT)

    async def _run_machine(self, node: NodeAssignment, scope: trio.CancelScope) -> None:
        own = self.home.node(node.name)
        cgroups.make_group(self.settings.name, node.name)
        cgroups.empty_group(self.settings.name, node.name)
        state = ((str(own.containerd), "/var/lib/containerd"), (str(own.kubelet), "/var/lib/kubelet"))
        machine = Machine(
            tree=self.settings.tree,
            upper=str(own.upper),
            work=str(own.work),
            root=str(own.root),
            argv=(f"{programs.PROGRAMS}/pause",),
            binds=(*state, (str(self._programs), programs.PROGRAMS)),
            hostname=node.name,
            members=cgroups.members_files(self.settings.name, node.name, first=True),
        )
        try:
            await self.processes[node.name].run_once(Entry(tuple(machine.command())), os.environ, grace=_GRACE)
        finally:
            network.unwire_node(node)
        scope.cancel()

    async def _wait_machine(self, node: NodeAssignment) -> int:
        """The process that holds a node's namespaces, once they are complete: it is `pause` then, no longer what made them."""
        with trio.fail_after(_MOUNTED_WITHIN):
            while True:
                outer = self.processes[node.name].status.pid
                for pid, argv in descendants(outer).items() if outer is not None else ():
                    if argv[:1] == [f"{programs.PROGRAMS}/pause"]:
                        return pid
                await trio.sleep(_LOOK_AGAIN)

    def _inside(self, node: NodeAssignment, argv: tuple[str, ...]) -> Entry:
        pid = self._machines[node.name]
        return Entry(
            argv,
            join=tuple(f"/proc/{pid}/ns/{kind}" for kind in _NAMESPACES),
            as_child=True,
            cgroups=cgroups.members_files(self.settings.name, node.name),
        )

    def _write_credentials(self) -> None:
        own, issue = self.home.credentials, self._authority.issue
        own.mkdir(mode=0o700)
        authority = self._authority.pair
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{DOMAIN}", "localhost")
        served = (*names, "127.0.0.1", *CONTROL_PLANE, API_SERVICE, SERVICE_RANGES[1].replace("/112", "1"))
        credentials.write_pair(own, "ca", authority)
        credentials.write_pair(own, "apiserver", issue("kube-apiserver", hosts=served))
        credentials.write_pair(own, "kubelet-client", issue("kube-apiserver-kubelet-client", groups=("system:masters",)))
        credentials.write_pair(own, "service-accounts", credentials.service_account_keys())
        inside = f"https://{CONTROL_PLANE[0]}:{API_PORT}"
        outside = f"https://127.0.0.1:{socket.fromfd(self.settings.listener, socket.AF_INET, socket.SOCK_STREAM).getsockname()[1]}"
        configs = {
            own / "controller-manager.kubeconfig": (inside, issue("system:kube-controller-manager")),
            own / "scheduler.kubeconfig": (inside, issue("system:kube-scheduler")),
            own / "proxy.kubeconfig": (inside, issue("system:kube-proxy")),
            self.home.kubeconfig: (outside, issue("admin", groups=("system:masters",))),
        }
        for node in self.nodes:
            pair = issue(f"system:node:{node.name}", groups=("system:nodes",), hosts=(node.name, *node.addresses))
            credentials.write_pair(own, f"{node.name}-kubelet", pair)
            configs[own / f"{node.name}-kubelet.kubeconfig"] = (inside, pair)
        for path, (server, pair) in configs.items():
            text = credentials.kubeconfig(server, authority.certificate, pair, cluster=self.settings.name)
            credentials.write_secret(path, text.encode())

    async def _relay(self) -> None:
        """Pass connections from the host's loopback interface, where the listener is, to the API server, where this process is."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(self.settings.listener))))
        await trio.serve_listeners(_relay_connection, [listener])

    async def obey(self, order: Order, nursery: trio.Nursery) -> Answer:
        """Carry out an order but `down`."""
        if order.verb == "status":
            found = [process.status for process in self.processes.values()]
            return Answer(programs=tuple(ProgramStatus(s.name, s.state, s.pid, s.starts, s.last_exit) for s in found))
        service = self.services.get(order.name)
        if service is None:
            return Answer(f"there is no {order.name} here, but {', '.join(self.services)}")
        if order.verb == "stop":
            return Answer("" if await service.stop() else f"{order.name} does not run")
        if order.verb == "start":
            return Answer("" if service.start(nursery) else f"{order.name} runs already")
        if order.verb == "signal":
            return Answer("" if self._signal(order.name, order.number) else f"{order.name} does not run")
        return Answer(f"no such order: {order.verb}")

    def _signal(self, name: str, number: int) -> bool:
        """To the program itself: in a node it is the child of the process that entered."""
        pid = self.processes[name].status.pid
        if pid is None:
            return False
        for child in descendants(pid) if "/" in name else {}:
            os.kill(child, number)
            return True
        return self.processes[name].signal(number)

    def explain(self) -> str:
        """The last words of programs that don't run as they should, or of all."""
        bad = [p for p in self.processes.values() if p.status.state != "running" or p.status.starts > 1] or list(self.processes.values())
        lines = [f"{p.name} is {p.status.state} {p.status.last_exit}:\n    " + "\n    ".join(tail(p.log, _TAIL)) for p in bad]
        return "\n".join(lines)


def main() -> None:
    """``python -m tests.cluster.harness.keeper SETTINGS``, started by process 1 of the cluster."""
    configure()
    trio.run(_run, msgspec.json.decode(sys.argv[1], type=Settings))


async def _run(settings: Settings) -> None:
    """Nothing of a cluster outlives this process, so nothing needs a gentle end."""
    events = trio.socket.from_stdlib_socket(socket.socket(fileno=settings.events))

    async def tell(event: Event) -> None:
        try:
            await trio.SocketStream(events).send_all(msgspec.json.encode(event) + b"\n")
        except trio.BrokenResourceError:
            return  # it is gone; `_end_with_starter` acts on that

    cluster = Cluster(settings, tell)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_on_signal)
        starting = trio.CancelScope()
        nursery.start_soon(_end_with_starter, events, starting)
        nursery.start_soon(_serve_orders, cluster, nursery)
        try:
            with trio.fail_after(settings.patience):
                await cluster.bring_up(nursery)
        except Exception as exc:  # whatever it was, whoever waits must hear of it
            log.exception("cluster.failed")
            await tell(Failed(f"{_because(exc, settings)}\n{cluster.explain()}"))
            os._exit(1)
        if not settings.tied:
            starting.cancel()
        await tell(Ready())
        if not settings.tied:
            events.close()


def _because(exc: Exception, settings: Settings) -> str:
    return f"not ready within {settings.patience:g} s" if isinstance(exc, trio.TooSlowError) else f"{type(exc).__name__}: {exc}"


async def _end_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            os._exit(0)


async def _end_with_starter(events: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    with scope:
        try:
            await events.recv(1)
        except OSError:
            pass  # gone, like one that closes
        log.warning("cluster.starter_gone")
        os._exit(0)


async def _serve_orders(cluster: Cluster, nursery: trio.Nursery) -> None:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        await listening.bind(str(cluster.home.control))
        cluster.home.control.chmod(0o600)
        listening.listen(16)
        while True:
            connection, _ = await listening.accept()
            nursery.start_soon(_serve_order, cluster, nursery, trio.SocketStream(connection))


async def _serve_order(cluster: Cluster, nursery: trio.Nursery, stream: trio.SocketStream) -> None:
    async with stream:
        try:
            order = msgspec.json.decode(await stream.receive_some(_BLOCK), type=Order)
            if order.verb == "down":
                os._exit(0)
            await stream.send_all(msgspec.json.encode(await cluster.obey(order, nursery)))
        except (msgspec.MsgspecError, trio.BrokenResourceError) as exc:
            log.warning("order.broken", error=str(exc))


async def _relay_connection(client: trio.SocketStream) -> None:
    try:
        server = await trio.open_tcp_stream(CONTROL_PLANE[0], API_PORT)
    except OSError:
        return  # the API server is away; the client sees its connection end
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(_pass_on, client, server, nursery.cancel_scope)
        nursery.start_soon(_pass_on, server, client, nursery.cancel_scope)


async def _pass_on(source: trio.SocketStream, target: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        async for data in source:
            await target.send_all(data)
        await target.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        scope.cancel()


def _environment() -> Mapping[str, str]:
    """Little of the starter's: proxies, credentials and tuning of its shell are not the cluster's."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


async def _until(condition: Callable[[], bool], what: str) -> None:
    """Ask in a thread until it is true."""
    began = time.monotonic()
    while True:
        if await trio.to_thread.run_sync(condition, abandon_on_cancel=True):
            break
        await trio.sleep(_LOOK_AGAIN)
    log.info("cluster.progress", what=what, seconds=round(time.monotonic() - began, 2))


def _listening(host: str, port: int) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            return False
        return True

    return ask


def _answering(api: Api) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            api.get("/readyz")
        except (OSError, ApiRefused):
            return False
        return True

    return ask


def _apply_manifests(api: Api) -> None:
    for path in sorted(_MANIFESTS.glob("*.yaml")):
        for item in YAML(typ="safe", pure=True).load_all(path.read_text()):
            api.apply(item)


def all_ready(api: Api, nodes: int) -> bool:
    """Whether so many nodes are ready, and the DNS. False too while the API server is away."""
    try:
        ready = [node for node in api.list("Node") if condition(node, "Ready")]
        dns: Object | None = api.find("Deployment", "coredns", "kube-system")
    except (OSError, ApiRefused):
        return False
    return len(ready) >= nodes and dns is not None and dns.get("status", {}).get("readyReplicas", 0) > 0


if __name__ == "__main__":
    main()
