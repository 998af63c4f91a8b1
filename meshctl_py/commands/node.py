"""``meshctl node``: look into the agent of one node, without the control plane."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import click
import msgspec
import trio

from mesh.kube.api import ApiClient
from mesh.runtime import inspection
from mesh.runtime.inspection import ADMIN_SOCKET, MAX_LIMIT, ConnectionsPage, NamedConnection, Page, StatusPage
from meshctl_py.cluster.agents import LOCAL_SOCKET, Agent, find_agent_pod, forwarded_agent, socket_agent
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.objects import AGENT, PODS, SYSTEM_NAMESPACE
from meshctl_py.cluster.show_agent import connection_table, show_page
from meshctl_py.lab.client import Lab
from meshctl_py.logs import show_log, without_cri
from meshctl_py.table import OUT, show_data
from meshctl_py.target import ClusterFlags, choose_place, cluster_flags, run_on_cluster

_T = TypeVar("_T")

WATCH_INTERVAL: Final = 1.0
WATCH_WIDTHS: Final = (6, 24, 9, 44, 36, 44, 7, 8, 5, 7)
"""Columns of what is still to come can't be measured."""
POD_LOGS: Final = Path("/var/log/pods")
"""Where kubelets have containers' logs."""

_PAGES: Final[Mapping[str, type[Page]]] = {
    "pods": inspection.PodsPage,
    "connections": ConnectionsPage,
    "certificates": inspection.CertificatesPage,
    "policies": inspection.ObjectsPage,
    "workloads": inspection.ObjectsPage,
    "services": inspection.ObjectsPage,
    "rules": inspection.AllRulesPage,
}


@dataclass(frozen=True, slots=True)
class _Question:
    node: str
    what: str
    query: Mapping[str, str]
    output: str
    watch: bool


@click.command()
@click.argument("node")
@click.argument("what", type=click.Choice([*_PAGES, "logs"]), metavar="WHAT")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", help="As a table, JSON or YAML.")
@click.option("--pod", metavar="[NS/]NAME", help="Of this pod alone.")
@click.option("--limit", type=click.IntRange(1, MAX_LIMIT), default=inspection.DEFAULT_LIMIT, show_default=True, help="At most so many.")
@click.option("-w", "--watch", is_flag=True, help="connections: go on and tell which are opened and which end.")
@click.option("-f", "--follow", is_flag=True, help="logs: go on as the log grows.")
@click.option("--tail", "lines", type=click.IntRange(min=0), help="logs: only so many last lines.")
@click.option("--lab", "lab_name", metavar="LAB", help="The node of this lab.")
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), metavar="PATH", help="Ask the agent at this socket.")
@cluster_flags(namespace="What is of this namespace alone.")
def node(
    flags: ClusterFlags,
    node: str,
    what: str,
    output: str,
    pod: str | None,
    limit: int,
    watch: bool,
    follow: bool,
    lines: int | None,
    lab_name: str | None,
    socket_path: Path | None,
) -> None:
    """Show what the agent of NODE knows and does; only the agent is asked.

    WHAT is one of pods, connections, certificates, policies, workloads, services, rules and logs.

    On the node itself this goes over the agent's own socket, which is root's; elsewhere through the API server, which needs the right to
    pods/portforward in istio-system. 'meshctl node n1 rules' reads the pods' nftables rules back from the kernel.
    """
    if watch and what != "connections":
        raise click.UsageError("-w goes with connections; with logs it is -f")
    if (follow or lines is not None) and what != "logs":
        raise click.UsageError("-f and --tail go with logs")
    if watch and output == "yaml":
        raise click.UsageError("-w writes tables or lines of JSON")
    query = {"limit": str(limit)} | {key: value for key, value in (("pod", pod), ("namespace", flags.namespace)) if value}
    asked = _Question(node, what, query, output, watch)
    if socket_path is not None:
        if what == "logs":
            raise click.UsageError("there are no logs at a socket")
        return _locally(lambda: _show(asked, socket_agent(socket_path, f"the agent at {socket_path}")))
    if lab_name is None and _is_here(node, flags):
        return _on_node(asked, lines, follow)
    lab = choose_place(flags, lab_name)
    if lab is not None:
        return _in_lab(lab, asked, lines, follow)
    if what == "logs":
        return run_on_cluster(flags, lambda client: _logs(client, node, lines, follow))
    return run_on_cluster(flags, lambda client: _ask_cluster(client, asked))


def _is_here(node: str, flags: ClusterFlags) -> bool:
    """Whether this machine is that node: its agent has a socket here and says so."""
    if flags.chosen or not os.path.exists(LOCAL_SOCKET):  # Path.exists raises where we may not look
        return False
    agent = socket_agent(LOCAL_SOCKET, "the agent of this machine")
    try:
        return trio.run(agent.ask, "status", {}, StatusPage).node == node
    except ClusterProblem:
        return False


def _locally(work: Callable[[], Awaitable[_T]]) -> _T:
    try:
        return trio.run(work)
    except ClusterProblem as exc:
        raise click.ClickException(str(exc)) from exc


def _in_lab(lab: Lab, asked: _Question, lines: int | None, follow: bool) -> None:
    nodes = sorted(path.name for path in (lab.home.path / "run").glob("*"))
    if asked.node not in nodes:
        raise click.ClickException(f"lab {lab.home.name} has no node {asked.node} (there are: {', '.join(nodes)})")
    if asked.what == "logs":
        show_log(lab.home.logs / f"ztunnel-{asked.node}.log", lines, follow=lambda: follow and lab.home.alive)
        return
    agent = socket_agent(lab.home.run_of(asked.node) / ADMIN_SOCKET, f"the agent of node {asked.node} in lab {lab.home.name}")
    _locally(lambda: _show(asked, agent))


def _on_node(asked: _Question, lines: int | None, follow: bool) -> None:
    if asked.what != "logs":
        _locally(lambda: _show(asked, socket_agent(LOCAL_SOCKET, f"the agent of node {asked.node}")))
        return
    files = sorted(POD_LOGS.glob(f"{SYSTEM_NAMESPACE}_{AGENT}-*/{AGENT}/*.log"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise click.ClickException(f"there is no log of the agent below {POD_LOGS}")
    show_log(files[-1], lines, follow=lambda: follow, clean=without_cri)


async def _ask_cluster(client: ApiClient, asked: _Question) -> None:
    await _show(asked, forwarded_agent(client, await find_agent_pod(client, asked.node)))


async def _logs(client: ApiClient, node: str, lines: int | None, follow: bool) -> None:
    """Of all containers of the agent's pod: a mover runs in one of its own."""
    pod = await find_agent_pod(client, node)
    path = PODS.path(SYSTEM_NAMESPACE, pod.metadata.name, "log")
    query = ({"tailLines": str(lines)} if lines is not None else {}) | ({"follow": "true"} if follow else {})
    sources = [client.stream(path, query | {"container": status.name}) for status in pod.status.container_statuses]
    if follow:
        async with trio.open_nursery() as nursery:
            for source in sources:
                nursery.start_soon(_copy_lines, source)
        return
    found: list[bytes] = []
    for source in sources:
        async with aclosing(source) as chunks:
            found += b"".join([chunk async for chunk in chunks]).splitlines(keepends=True)
    found.sort(key=lambda line: line.partition(b"\t")[0])  # by the time that each begins with
    sys.stdout.buffer.write(b"".join(found if lines is None else found[-lines:] if lines else []))
    sys.stdout.buffer.flush()


async def _copy_lines(source: AsyncGenerator[bytes, None]) -> None:
    rest = b""
    async with aclosing(source) as chunks:
        async for chunk in chunks:
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            sys.stdout.buffer.write(whole + newline)
            sys.stdout.buffer.flush()
    sys.stdout.buffer.write(rest)
    sys.stdout.buffer.flush()


async def _show(asked: _Question, agent: Agent) -> None:
    page = await agent.ask(asked.what, asked.query, _PAGES[asked.what])
    if asked.watch and isinstance(page, ConnectionsPage):
        await _watch(asked, agent, page)
    elif asked.output == "table":
        show_page(page, asked.what, asked.node, asked.query.get("pod", ""))
    else:
        show_data(page, asked.output)


async def _watch(asked: _Question, agent: Agent, page: ConnectionsPage) -> None:
    """The connections that live, then those that are opened and those that end, as the agent is asked again and again."""
    known = {_key(item): item for item in page.items}
    widths = _tell(asked, "LIVING", page.items, WATCH_WIDTHS, first=True)
    while True:
        await trio.sleep(WATCH_INTERVAL)
        page = await agent.ask(asked.what, asked.query, ConnectionsPage)
        now = {_key(item): item for item in page.items}
        widths = _tell(asked, "OPENED", [item for key, item in now.items() if key not in known], widths)
        widths = _tell(asked, "ENDED", [item for key, item in known.items() if key not in now], widths)
        known = now


def _key(item: NamedConnection) -> tuple[str, ...]:
    living = item.connection
    return living.pod, living.direction, living.source, living.destination, living.authority


def _tell(asked: _Question, event: str, items: list[NamedConnection], widths: Sequence[int], *, first: bool = False) -> Sequence[int]:
    if asked.output == "json":
        for item in items:
            click.echo(_json_line(event, item))
        return widths
    if not items and not first:
        return widths
    widths = connection_table(items, event).print(headings=first, least=widths)
    OUT.file.flush()
    return widths


def _json_line(event: str, item: NamedConnection) -> str:
    return msgspec.json.encode({"event": event, **msgspec.to_builtins(item)}).decode()
