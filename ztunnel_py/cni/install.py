"""Keeps the CNI plugin on the node: its program, its kubeconfig, its entry in the chain; and takes them away again.

Another agent, the primary plugin's first of all, may rewrite the chain at any time; the directory is watched and the entry put back. Every
file is replaced in one step, so a container runtime never reads half a chain. While our agent restarts all of it stays: a pod of the mesh
that is made meanwhile must wait, not run in plain text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.kubeconfig import ClusterAccess, KubeconfigError
from mesh.kube.resources import RESOURCES
from mesh.linux.inotify import DirectoryWatch
from mesh.runtime.files import write_atomically
from mesh.telemetry.log import get_logger
from ztunnel_py.cni.chain import MAX_FILE, PLUGIN, Delete, Plan, Write, is_configuration, plan_install, plan_removal

KUBECONFIG: Final = f"{PLUGIN}-kubeconfig"
LOOK_SECONDS: Final = 10.0
"""How often everything is looked at anyway: a notification may be lost."""
TOKEN_SECONDS: Final = 24 * 3600
"""The life asked for the plugin's token. It is renewed at half of what is granted: an agent may be away for the other half, and the plugin
still knows whom to let pass."""
SETTLE_SECONDS: Final = 0.05
"""Whoever writes a file often writes another with it."""
LONGEST_PAUSE: Final = 10.0
"""Between two repairs when somebody undoes each: losing is better than spinning, and it is logged."""
_PROGRAM_MODE: Final = 0o755
_SECRET_MODE: Final = 0o600
_CHAIN_MODE: Final = 0o644

_log = get_logger("cni")


@dataclass(frozen=True, slots=True)
class Installation:
    """Paths as the agent sees them, but ``net_dir_on_node`` and ``socket``, which are as the node does."""

    program: Path
    bin_dir: Path
    net_dir: Path
    net_dir_on_node: str
    socket: str
    excluded_namespaces: frozenset[str]
    agent_namespace: str
    daemon_set: str

    def entry(self) -> dict[str, object]:
        """The plugin's own entry of the chain."""
        return {
            "type": PLUGIN,
            "socket": self.socket,
            "kubeconfig": f"{self.net_dir_on_node}/{KUBECONFIG}",
            "excludedNamespaces": sorted(self.excluded_namespaces),
            "agent": {"namespace": self.agent_namespace, "daemonSet": self.daemon_set},
        }


@dataclass(frozen=True, slots=True)
class PluginToken:
    """A token of the plugin's own service account, and for how many seconds from now it is good."""

    text: str
    seconds: float


class Installer:
    """Use `run`; `remove` once the DaemonSet is gone."""

    def __init__(
        self,
        installation: Installation,
        access: ClusterAccess,
        fetch_token: Callable[[], Awaitable[PluginToken]],
        in_charge: Callable[[], bool],
    ) -> None:
        """``fetch_token`` raises ApiError, ApiUnavailable. While we are not ``in_charge`` of the node an installation that is whole is left
        alone: during a roll-out two agents, of different versions perhaps, would undo each other's work."""
        self._own = installation
        self._access = access
        self._fetch_token = fetch_token
        self._in_charge = in_charge
        self._token = ""
        self._renew_at = float("-inf")

    async def run(self, on_change: Callable[[str], None]) -> None:
        """Until cancelled. ``on_change`` is told after every look why the plugin is not in place, ``""`` when it is."""
        pause = SETTLE_SECONDS
        with ExitStack() as stack:
            watch: DirectoryWatch | None = None
            while True:
                watch = watch or _open_watch(stack)
                if watch is not None:
                    watch.drain()
                    self._watch_all(watch)
                because = await self._renew_token()
                changed: tuple[str, ...] = ()
                if not because:
                    because, changed = await trio.to_thread.run_sync(self._look)
                on_change(because)
                if changed:
                    _log.info("chain.mended", files=", ".join(changed))
                with trio.move_on_after(LOOK_SECONDS) as quiet:
                    if watch is None:
                        await trio.sleep_forever()
                    else:
                        await trio.lowlevel.wait_readable(watch.fileno())
                if quiet.cancelled_caught or not changed:
                    pause = SETTLE_SECONDS
                elif pause < LONGEST_PAUSE:
                    pause = min(pause * 2, LONGEST_PAUSE)
                    if pause == LONGEST_PAUSE:
                        _log.warning("chain.contested", directory=str(self._own.net_dir), because="somebody rewrites it again and again")
                await trio.sleep(pause)

    async def _renew_token(self) -> str:
        """Why there is no token, or ``""``. One that could not be renewed is used for as long as it is good."""
        if trio.current_time() >= self._renew_at:
            try:
                token = await self._fetch_token()
            except (ApiError, ApiUnavailable) as exc:
                if not self._token:
                    return f"the CNI plugin can't be installed: no token for it: {exc}"
                _log.warning("token.not_renewed", error=str(exc))
            else:
                self._token = token.text
                self._renew_at = trio.current_time() + token.seconds / 2
        return ""

    def _look(self) -> tuple[str, tuple[str, ...]]:
        try:
            return self.mend(self._token)
        except (OSError, KubeconfigError) as exc:
            return f"the CNI plugin can't be installed: {exc}", ()

    def mend(self, token: str) -> tuple[str, tuple[str, ...]]:
        """Put in place what is not: why the chain lacks the plugin or ``""``, and the files written. Raises OSError, KubeconfigError.

        The program is there before anything names it, and the kubeconfig before it could be wanted.
        """
        own = self._own
        if not self._in_charge() and self._is_whole():
            return "", ()
        changed: list[str] = []
        changed += _update(own.bin_dir / PLUGIN, own.program.read_bytes(), _PROGRAM_MODE)
        changed += _update(own.net_dir / KUBECONFIG, write_kubeconfig(self._access, token), _SECRET_MODE)
        plan = plan_install(self._read_chain(), own.entry())
        self._carry_out(plan)
        return plan.because, (*changed, *(step.name for step in plan.steps))

    def _is_whole(self) -> bool:
        """Whether there is an installation of somebody's that works."""
        plan = plan_removal(self._read_chain())
        return bool(plan.steps) and (self._own.bin_dir / PLUGIN).exists() and (self._own.net_dir / KUBECONFIG).exists()

    def remove(self) -> None:
        """Take the plugin out of the chain, then its files. Raises OSError."""
        self._carry_out(plan_removal(self._read_chain()))
        for path in (self._own.net_dir / KUBECONFIG, self._own.bin_dir / PLUGIN):
            path.unlink(missing_ok=True)

    def _read_chain(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in self._own.net_dir.iterdir():
            if is_configuration(path.name) and path.is_file():
                with path.open("rb") as file:
                    found[path.name] = file.read(MAX_FILE).decode("utf-8", "replace")
        return found

    def _carry_out(self, plan: Plan) -> None:
        for step in plan.steps:
            path = self._own.net_dir / step.name
            match step:
                case Write():
                    write_atomically(path, step.text.encode(), path.stat().st_mode & 0o777 if path.exists() else _CHAIN_MODE)
                case Delete():
                    path.unlink(missing_ok=True)

    def _watch_all(self, watch: DirectoryWatch) -> None:
        for directory in (self._own.net_dir, self._own.bin_dir):
            try:
                watch.add(directory)
            except OSError as exc:  # looked at every LOOK_SECONDS all the same
                _log.warning("watch.failed", directory=str(directory), error=str(exc))


async def request_token(client: ApiClient, namespace: str, account: str, now: datetime) -> PluginToken:
    """A token that lives as long as its account, not as the pod that asked: our own would end with our pod, and with it would everybody
    who starts without an agent wait. Raises ApiError, ApiUnavailable."""
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": TOKEN_SECONDS}}
    answer = await client.create(RESOURCES["ServiceAccount"].path(namespace, account, "token"), body)
    status = answer.get("status")
    token, expires = (status.get("token"), status.get("expirationTimestamp")) if isinstance(status, dict) else (None, None)
    try:
        seconds = (datetime.fromisoformat(str(expires)) - now).total_seconds()
    except (ValueError, TypeError) as exc:
        raise ApiUnavailable(f"the answer to a TokenRequest has no time: {exc}") from exc
    if not isinstance(token, str) or not token:
        raise ApiUnavailable("the answer to a TokenRequest has no token")
    return PluginToken(token, seconds)


def write_kubeconfig(access: ClusterAccess, token: str) -> bytes:
    """A kubeconfig of one cluster and one user, as JSON, which is YAML: the plugin needs no parser for more. Roots and token are in it,
    since files of the agent's pod are not the node's. Raises KubeconfigError."""
    host = f"[{access.host}]" if ":" in access.host else access.host
    cluster: dict[str, object] = {
        "server": f"{'https' if access.tls else 'http'}://{host}:{access.port}{access.prefix}",
        "certificate-authority-data": base64.b64encode(access.read_roots()).decode(),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": PLUGIN,
        "clusters": [{"name": PLUGIN, "cluster": cluster}],
        "users": [{"name": PLUGIN, "user": {"token": token}}],
        "contexts": [{"name": PLUGIN, "context": {"cluster": PLUGIN, "user": PLUGIN}}],
    }
    return json.dumps(config, indent=2).encode() + b"\n"


def _update(path: Path, content: bytes, mode: int) -> tuple[str, ...]:
    """Replace a file that differs. The parts of a node's directory that others made are theirs, so only ours is looked at."""
    try:
        if path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
            return ()
    except FileNotFoundError:
        pass
    write_atomically(path, content, mode)
    return (path.name,)


def _open_watch(stack: ExitStack) -> DirectoryWatch | None:
    try:
        return stack.enter_context(DirectoryWatch())
    except OSError as exc:  # inotify is used up; then changes are seen every LOOK_SECONDS
        _log.debug("watch.failed", error=str(exc))
        return None
