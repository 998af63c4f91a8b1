"""One pod's life: wait to be captured, run init containers in order, then all containers, and watch who is ready."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

import trio

from meshctl_py.lab.assign import CLUSTER_DNS, PodAssignment
from meshctl_py.lab.endpoints import CLUSTER_DOMAIN
from meshctl_py.lab.enter import Entry
from meshctl_py.lab.processes import LabProcess, processes_in_netns
from meshctl_py.lab.spec import Container, EnvVar, ExecCheck, HttpCheck, Probe, TcpCheck
from meshctl_py.lab.status import ProcessStatus
from meshctl_py.lab.web import Unreachable, fetch, open_connection

_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "TERM")
"""All that a container's environment takes from the user's: the lab must not behave differently from shell to shell."""


_FIRST_PROBES: Final = 0.1
"""Seconds between probes of a container that is not ready yet: somebody is waiting for it."""
_TRIAL: Final = 1.0
"""Seconds that a container without a probe must run, once it has been started again, until it is ready."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod's processes run. ``files``: the pod's own /etc files; ``hide``: the directory of namespace handles."""

    netns: Path
    files: Path
    hide: Path
    source: Path
    logs: Path
    node_ip: str

    def entry(self, argv: tuple[str, ...], hostname: str, directory: str | None = None) -> Entry:
        """A command in this place; relative directories are the source's, so that a lab's programs lie beside its YAML."""
        return Entry(argv, (str(self.netns),), str(self.hide), etc_binds(self.files), hostname, str(self.source / (directory or "")))


ETC_FILES: Final = ("resolv.conf", "hosts", "nsswitch.conf")


def etc_binds(files: Path) -> tuple[tuple[str, str], ...]:
    """What lays a directory's /etc files over the machine's."""
    return tuple((str(files / name), f"/etc/{name}") for name in ETC_FILES)


def write_etc_files(directory: Path, hostname: str, ips: tuple[str, ...], namespace: str) -> None:
    """The /etc files by which a process resolves names in the cluster."""
    directory.mkdir(parents=True, exist_ok=True)
    search = f"{namespace}.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}"
    resolv = f"nameserver {CLUSTER_DNS[0]}\nsearch {search}\noptions ndots:5 timeout:1\n"
    hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n" + "".join(f"{ip}\t{hostname}\n" for ip in ips)
    # Without this file the host's resolver daemon could be asked, through a socket in the file system that every namespace sees.
    nsswitch = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n"
    for name, text in zip(ETC_FILES, (resolv, hosts, nsswitch), strict=True):
        (directory / name).write_text(text)


class PodRunner:
    """Runs one pod; `changed` is called whenever something that `phase` or `ready` may depend on has changed."""

    def __init__(
        self, pod: PodAssignment, place: Place, captured: Callable[[PodAssignment], Awaitable[None]], changed: Callable[[], None]
    ) -> None:
        self.pod = pod
        self._place = place
        self._captured = captured
        self._changed = changed
        self._environment = base_environment()
        self._init = {container.name: self._process(container) for container in pod.spec.init_containers}
        self._containers = {container.name: self._process(container) for container in pod.spec.containers}
        self._ready: dict[str, bool] = dict.fromkeys(self._containers, False)
        self._why_not_ready: dict[str, str] = {}
        self._outcomes: dict[str, int] = {}
        self._failed = ""

    def adopt(self, pod: PodAssignment) -> None:
        """The same pod with other labels or annotations."""
        self.pod = pod

    @property
    def processes(self) -> Mapping[str, LabProcess]:
        """Of init containers too, in order of their start."""
        return self._init | self._containers

    @property
    def statuses(self) -> tuple[ProcessStatus, ...]:
        return tuple(process.status for process in self.processes.values())

    @property
    def phase(self) -> str:
        """Kubernetes' pod phase."""
        if self._failed:
            return "Failed"
        if self._containers and len(self._outcomes) == len(self._containers):
            return "Failed" if any(self._outcomes.values()) else "Succeeded"
        started = any(process.status.starts for process in self._containers.values())
        return "Running" if started or (self._initialised and all(self._ready.values())) else "Pending"

    @property
    def ready(self) -> bool:
        return bool(self._ready) and all(self._ready.values())

    @property
    def because(self) -> str:
        """Why the pod is not ready, in words for its user; empty if it is."""
        if self.ready:
            return ""
        if self._failed:
            return self._failed
        for name, process in self.processes.items():
            status = process.status
            if status.because and status.state in ("waiting", "pausing"):
                return f"{name}: {status.because}"
            if name in self._why_not_ready and not self._ready.get(name, True):
                return f"{name}: {self._why_not_ready[name] or 'starting'}"
        return "starting"

    _initialised = False

    async def run(self) -> None:
        """Until cancelled, or for ever if the pod has come to its end; all its processes are gone afterwards."""
        try:
            for process in self.processes.values():
                process.wait_for("capture by the agent")
            await self._captured(self.pod)
            if await self._run_init_containers():
                self._initialised = True
                async with trio.open_nursery() as nursery:
                    for container in self.pod.spec.containers:
                        nursery.start_soon(self._run_container, container)
            await trio.sleep_forever()
        finally:
            self._kill_leftovers()

    async def _run_init_containers(self) -> bool:
        for process in self._containers.values():
            process.wait_for("init containers")
        for container in self.pod.spec.init_containers:
            process = self._init[container.name]
            while container.argv and (status := await self._run_once(container, process)) != 0:
                if self.pod.spec.restart_policy == "Never":
                    self._failed = f"init container {container.name} failed: {process.status.last_exit}"
                    self._changed()
                    return False
                process.wait_for(f"another try, after exit status {status}")
                await trio.sleep(1)
        for process in self._containers.values():
            process.wait_for("")
        return True

    async def _run_container(self, container: Container) -> None:
        process = self._containers[container.name]
        if not container.argv:
            # The command is in an image, and the lab runs no images. The pod counts as ready: others may only want its address.
            process.wait_for("no command: the lab runs no images")
            self._set_ready(container.name, True)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_readiness, container, process)
            if self.pod.spec.restart_policy == "Always":
                await process.run_for_ever(self._entry(container), self._variables(container), grace=self.pod.spec.grace)
            status = await self._run_once(container, process)
            while status != 0 and self.pod.spec.restart_policy == "OnFailure":
                await trio.sleep(1)
                status = await self._run_once(container, process)
            nursery.cancel_scope.cancel()
        self._outcomes[container.name] = status
        self._set_ready(container.name, False, "completed")
        self._changed()

    async def _run_once(self, container: Container, process: LabProcess) -> int:
        return await process.run_once(self._entry(container), self._variables(container), grace=self.pod.spec.grace)

    async def _watch_readiness(self, container: Container, process: LabProcess) -> None:
        """Ready while running, and, with a probe, as it says; a container that was started again begins anew. Without a probe it must have
        lived for a moment then: one that ends as soon as it starts would be ready again and again."""
        while True:
            changed, status = process.status_changed, process.status
            running = status.state == "running"
            if not running:
                self._set_ready(container.name, False, status.because or status.last_exit)
            elif container.readiness is None and status.starts <= 1:
                self._set_ready(container.name, True)
            async with trio.open_nursery() as nursery:
                if running and container.readiness is not None:
                    nursery.start_soon(self._probe_for_ever, container, container.readiness)
                elif running and status.starts > 1:
                    nursery.start_soon(self._try, container, status.last_exit)
                await changed.wait()
                nursery.cancel_scope.cancel()

    async def _try(self, container: Container, last_exit: str) -> None:
        self._set_ready(container.name, False, f"{last_exit}; started again")
        await trio.sleep(_TRIAL)
        self._set_ready(container.name, True)

    async def _probe_for_ever(self, container: Container, probe: Probe) -> None:
        good = bad = 0
        self._set_ready(container.name, False, "not asked yet")
        await trio.sleep(probe.initial_delay)
        while True:
            failure = await self._probe(container, probe)
            good, bad = (good + 1, 0) if not failure else (0, bad + 1)
            if good >= probe.success_threshold:
                self._set_ready(container.name, True)
            elif bad >= probe.failure_threshold or not self._ready[container.name]:
                self._set_ready(container.name, False, failure)
            await trio.sleep(probe.period if self._ready[container.name] else _FIRST_PROBES)

    async def _probe(self, container: Container, probe: Probe) -> str:
        """Empty for success, else what went wrong.

        Asked from inside the pod, on its own address: connections that stay in the pod are never captured, so a probe sees the
        application and not the mesh, whatever policy applies.
        """
        ip = str(self.pod.ips[0])
        try:
            with trio.fail_after(probe.timeout):
                match probe.check:
                    case TcpCheck(port):
                        async with open_connection(self._place.netns, ip, container.find_port(port) or 0):
                            return ""
                    case HttpCheck(port, path, host):
                        number = container.find_port(port) or 0
                        answer = await fetch(self._place.netns, ip, number, path, within=probe.timeout, host=host)
                        return "" if 200 <= answer.status < 400 else f"readiness probe: HTTP status {answer.status}"
                    case ExecCheck(argv):
                        entry = self._place.entry(argv, self.pod.spec.hostname, container.directory)
                        done = await trio.run_process(entry.command(), check=False, env=self._variables(container), capture_stdout=True)
                        return "" if done.returncode == 0 else f"readiness probe: exit status {done.returncode}"
                    case _:
                        assert_never(probe.check)
        except Unreachable as exc:
            return f"readiness probe: {exc}"
        except trio.TooSlowError:
            return "readiness probe: no answer in time"

    def _set_ready(self, name: str, ready: bool, because: str = "") -> None:
        before = (self._ready[name], self._why_not_ready.get(name, ""))
        self._ready[name], self._why_not_ready[name] = ready, because
        if before != (ready, because):
            self._changed()

    def _process(self, container: Container) -> LabProcess:
        key = self.pod.spec.key
        return LabProcess(container.name, self._place.logs / f"{key.namespace}_{key.name}_{container.name}.log", self._changed)

    def entry_for(self, container: str | None, argv: tuple[str, ...]) -> Entry | None:
        """How to run a command beside a container, by default the first; None if there is no such container."""
        for candidate in (*self.pod.spec.containers, *self.pod.spec.init_containers):
            if container in (None, candidate.name):
                return self._place.entry(argv, self.pod.spec.hostname, candidate.directory)
        return None

    def _entry(self, container: Container) -> Entry:
        return self._place.entry(container.argv, self.pod.spec.hostname, container.directory)

    def _variables(self, container: Container) -> dict[str, str]:
        return self._environment | {variable.name: self._value(variable) for variable in container.environment}

    def _value(self, variable: EnvVar) -> str:
        spec = self.pod.spec
        match variable.field_path:
            case None:
                return variable.value
            case "metadata.name":
                return spec.key.name
            case "metadata.namespace":
                return spec.key.namespace
            case "metadata.uid":
                return self.pod.uid
            case "spec.nodeName":
                return self.pod.node
            case "spec.serviceAccountName":
                return spec.service_account
            case "status.podIP":
                return str(self.pod.ips[0])
            case "status.podIPs":
                return ",".join(map(str, self.pod.ips))
            case "status.hostIP":
                return self._place.node_ip
        return ""

    def _kill_leftovers(self) -> None:
        """What a container started and left, in a session of its own; the agent's processes only visit the pod's namespace."""
        if not self.pod.spec.host_network:
            for pid in processes_in_netns(self._place.netns):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def base_environment() -> dict[str, str]:
    """What every process of the lab finds in its environment; ``python3`` is the interpreter that runs the lab."""
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    path = environment.get("PATH", os.defpath)
    return environment | {"PATH": f"{Path(sys.executable).parent}:{path}", "PYTHONUNBUFFERED": "1"}
