"""What `meshctl` shows: progress, tables, failures. On a terminal with colours and live lines, elsewhere as plain lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.status import Status
from rich.text import Text

from meshctl_py.lab.home import LabHome
from meshctl_py.lab.messages import Failed
from meshctl_py.lab.status import LabStatus, PodStatus, Problem
from meshctl_py.table import ERR, OUT, Table, colour_state

MEANWHILE: Final = "Until it is mended, an object with a mistake stays as it last was right; a policy that never was right refuses."


class Progress:
    """One line of what is going on; where nothing can be overwritten, a line each time a thing is done."""

    def __init__(self, live: Status | None) -> None:
        self._live = live
        self._pending: frozenset[str] = frozenset()

    def show(self, step: str, pending: Sequence[tuple[str, str]]) -> None:
        """``pending``: names, and why they are not ready."""
        if self._live is not None:
            what = "; ".join(f"{name}: {because}" for name, because in pending[:3]) + (" ..." if len(pending) > 3 else "")
            self._live.update(Text(f"{step} {what}".rstrip()))
            return
        names = frozenset(name for name, _ in pending)
        if not pending:
            print(f"{step} ...", flush=True)
        self._settle(names)

    def finish(self, *, ready: bool = False) -> None:
        """The last word; ``ready``: nothing is pending any more."""
        if self._live is not None:
            self._live.stop()
        elif ready:
            self._settle(frozenset())

    def _settle(self, pending: frozenset[str]) -> None:
        for name in sorted(self._pending - pending):
            print(f"{name} is ready", flush=True)
        self._pending = pending


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress on standard output for as long as the context lasts."""
    if not OUT.is_terminal:
        yield Progress(None)
        return
    with OUT.status("starting") as live:
        yield Progress(live)


def show_up(status: LabStatus, seconds: float, *, alone: bool, foreground: bool) -> None:
    """The closing words of ``lab up``. ``alone``: no other lab runs, so that commands need no name."""
    name = "" if alone else f" --name {status.name}"
    OUT.print(f"lab {status.name} is up after {seconds:.1f} s: {_count(status.nodes, 'node')}, {_count(status.pods, 'pod')}", markup=False)
    _show_problems(status.problems)
    first = next(iter(status.pods), None)
    if first is not None:
        OUT.print(f"  try: meshctl lab exec {first.name} -n {first.namespace}{name} -- sh", markup=False)
    OUT.print(f"  see: meshctl lab status{name}", markup=False)
    OUT.print(f"  end: {'Ctrl-C' if foreground else f'meshctl lab down{name}'}", markup=False)


def show_failure(failure: Failed) -> None:
    """Why a lab did not become ready, with what its logs say."""
    ERR.print(f"Error: {failure.because}", markup=False)
    for item in failure.pending:
        ERR.print(f"\n{item.what}: {item.because}", markup=False)
        for line in item.tail:
            ERR.print(f"  {item.log}: {line}", markup=False)
    if failure.status is not None:
        _show_problems(failure.status.problems, to=ERR)


def show_labs(labs: Sequence[tuple[LabHome, LabStatus | str]]) -> None:
    """One line a lab; in place of a status: ``starting``, or ``killed`` where the processes are gone and the files are not."""
    if not labs:
        OUT.print("no labs")
        return
    table = Table("NAME", "STATE", "NODES", "PODS", "SOURCE")
    for home, status in labs:
        if isinstance(status, str):
            table.add_row(
                home.name, status, "", "", f"'meshctl lab down --name {home.name}' removes its files" if status == "killed" else ""
            )
        else:
            state = "not ready" if status.pending() else "ready"
            table.add_row(home.name, state, str(len(status.nodes)), str(len(status.pods)), status.source)
    table.print()


def show_status(status: LabStatus) -> None:
    """Tables of everything in a lab."""
    OUT.print(f"lab {status.name}  source {status.source}  logs {status.logs}", markup=False)
    nodes = Table("NODE", "ADDRESSES", "PODS", "AGENT")
    for node in status.nodes:
        nodes.add_row(node.name, ",".join(node.ips), str(node.pods), colour_state(node.agent, node.agent in ("ready", "off")))
    pods = Table("NAMESPACE", "POD", "NODE", "PHASE", "READY", "RESTARTS", "MESH", "ADDRESSES", "WHY")
    for pod in status.pods:
        pods.add_row(*_pod_row(pod))
    services = Table("NAMESPACE", "SERVICE", "ADDRESSES", "PORTS", "ENDPOINTS")
    for service in status.services:
        services.add_row(service.namespace, service.name, ",".join(service.ips), ",".join(service.ports), str(service.endpoints))
    waypoints = Table("NAMESPACE", "WAYPOINT", "PROGRAMMED", "WHY")
    for waypoint in status.waypoints:
        waypoints.add_row(
            waypoint.namespace, waypoint.name, colour_state("no" if waypoint.because else "yes", not waypoint.because), waypoint.because
        )
    processes = Table("PROCESS", "STATE", "PID", "STARTS", "LAST EXIT", "WHY")
    for process in status.processes:
        state = colour_state(process.state, process.state == "running")
        processes.add_row(process.name, state, str(process.pid or ""), str(process.starts), process.last_exit, process.because)
    for table in (nodes, pods, services, waypoints, processes):
        if table.rows:
            OUT.print()
            table.print()
    unready = status.control_plane not in ("ready", "off")
    if unready or status.problems:
        OUT.print()
    if unready:
        OUT.print(f"istiod: {status.control_plane}", markup=False)
    _show_problems(status.problems)


def _pod_row(pod: PodStatus) -> tuple[str | Text, ...]:
    mesh = colour_state(pod.mesh, pod.mesh in ("captured", "outside"))
    why = pod.because if not pod.ready and pod.because else pod.enrolment
    ready = colour_state("yes" if pod.ready else "no", pod.ready or pod.phase == "Succeeded")
    return (pod.namespace, pod.name, pod.node, pod.phase, ready, str(pod.restarts), mesh, ",".join(pod.ips), why)


def _show_problems(problems: Sequence[Problem], to: Console = OUT) -> None:
    if problems:
        to.print(Text(f"{_count(problems, 'problem')} in the source:", style="bold"))
    for problem in problems:
        to.print(f"  {problem}", markup=False)
    if problems:
        to.print(MEANWHILE, markup=False, style="dim")


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
