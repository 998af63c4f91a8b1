"""Asking one node's agent: on its node over the Unix socket, from afar through the API server's port-forward, in a lab over its socket."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlencode

import msgspec
import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.portforward import open_port
from mesh.linux.unix_sockets import unix_address
from mesh.model.ports import ADMIN
from mesh.runtime.inspection import ADMIN_SOCKET, Page
from meshctl_py import http
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.objects import AGENT, NODES, PODS, SYSTEM_NAMESPACE, Named, Pod, list_all

LOCAL_SOCKET: Final = Path("/var/run/ambient-mesh") / ADMIN_SOCKET
ASK_TIMEOUT: Final = 30.0
"""Seconds for one page; the rules of 250 pods take an agent some two."""
MAX_PAGE: Final = 256 << 20
"""Bytes of one page: 100 000 connections are 50 MB."""

_T = TypeVar("_T", bound=Page)


@dataclass(frozen=True, slots=True)
class Agent:
    """``where`` names it in messages; ``dial`` opens a connection to its admin pages."""

    where: str
    dial: Callable[[], Awaitable[trio.abc.Stream]]

    async def ask(self, page: str, query: Mapping[str, str], kind: type[_T]) -> _T:
        """One of the pages below ``/debug/``. Raises ClusterProblem."""
        target = f"/debug/{page}" + (f"?{urlencode(query)}" if query else "")
        try:
            with trio.fail_after(ASK_TIMEOUT):
                async with await self.dial() as stream:
                    answer = await http.get(stream, target, "agent", limit=MAX_PAGE)
        except trio.TooSlowError as exc:
            raise ClusterProblem(f"{self.where} did not answer within {ASK_TIMEOUT:g} s") from exc
        except PermissionError as exc:
            raise ClusterProblem(f"{self.where}: {exc.strerror}: the socket is root's alone, so try as root") from exc
        except (OSError, trio.BrokenResourceError, http.Unreachable, ApiError, ApiUnavailable) as exc:
            raise ClusterProblem(f"{self.where} can't be asked: {exc}") from exc
        return self._read(answer, kind)

    def _read(self, answer: http.Answer, kind: type[_T]) -> _T:
        if answer.status != 200:
            text = answer.body[:500].decode("utf-8", "replace").strip()
            if answer.status == 404 and text == "not found":
                text = "it has no such page: it is of another version, or not ours"
            raise ClusterProblem(f"{self.where}: {text}")
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise ClusterProblem(f"{self.where} answered what we do not understand, is it of another version? {exc}") from exc


def socket_agent(path: Path, where: str) -> Agent:
    """Through a Unix socket on this machine."""

    async def dial() -> trio.abc.Stream:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with unix_address(path) as address:
                await sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    return Agent(where, dial)


def forwarded_agent(client: ApiClient, pod: Pod) -> Agent:
    """An agent's admin pages, through the API server."""
    return forwarded_pod(client, pod, ADMIN)


def forwarded_pod(client: ApiClient, pod: Pod, port: int) -> Agent:
    """The pages at a port of a pod of the mesh's own, through the API server."""
    name = pod.metadata.name
    what = "the agent" if pod.metadata.labels.get("app") == AGENT else "the control plane"
    return Agent(f"{what} on node {pod.spec.node_name} (pod {name})", lambda: open_port(client, SYSTEM_NAMESPACE, name, port))


async def list_agents(client: ApiClient, node: str = "") -> list[Pod]:
    """The agents' pods, of one node or of all. Raises ApiError, ApiUnavailable."""
    fields = f"spec.nodeName={node}" if node else ""
    return await list_all(client, PODS, Pod, namespace=SYSTEM_NAMESPACE, labels=f"app={AGENT}", fields=fields)


async def find_agent_pod(client: ApiClient, node: str) -> Pod:
    """The pod of a node's agent: while one takes over from another, the one that serves.

    Raises ClusterProblem, ApiError, ApiUnavailable.
    """
    pods = await list_agents(client, node)
    if pods:
        return max(pods, key=lambda pod: (pod.ready, pod.metadata.deletion_timestamp is None, pod.status.phase == "Running"))
    nodes = sorted(found.metadata.name for found in await list_all(client, NODES, Named))
    if node not in nodes:
        raise ClusterProblem(f"there is no node {node} (there are: {', '.join(nodes[:20])})")
    raise ClusterProblem(f"no agent runs on node {node}: 'meshctl status' shows where agents run, 'meshctl install' installs them")
