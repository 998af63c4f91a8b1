"""Waypoints beside a directory: objects as files of a directory of their own, read by the lab as the user's are, and status as overlays.

There are no Deployments there, so their pods are written; whoever runs pods gives them node, address and what a kubelet would mount.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import trio

from istiod_py.deploy.controller import Unreachable, refuse_foreign
from istiod_py.translate.deployment import Object, make_pods
from mesh.kube.gatewayapi.gateway import KubeGateway
from mesh.kube.objects import KubeObject, ObjectKey
from mesh.kube.overlay import replace_file, write_overlay
from mesh.kube.store import ObjectStore
from mesh.telemetry.log import get_logger

_KINDS: Final = frozenset({"ServiceAccount", "Service", "Pod"})
"""What there is a use for where no controllers run."""

_log = get_logger("deploy")


class DirectoryPlace:
    """``deployed``: where objects go; ``status``: the overlays of their Gateways."""

    def __init__(self, store: ObjectStore, deployed: Path, status: Path) -> None:
        self._store = store
        self._deployed = deployed
        self._status = status

    async def prepare(self) -> None:
        try:
            for directory in (self._deployed, self._status):
                await trio.to_thread.run_sync(partial(directory.mkdir, parents=True, exist_ok=True))
        except OSError as exc:
            raise Unreachable(str(exc)) from exc

    async def put(self, gateway: KubeGateway, objects: tuple[Object, ...]) -> None:
        planned = [pod for obj in objects if obj["kind"] == "Deployment" for pod in make_pods(obj)]
        planned += [obj for obj in objects if obj["kind"] in _KINDS]
        files = {}
        for obj in planned:
            key = ObjectKey(obj["kind"], gateway.namespace, obj["metadata"]["name"])
            found = self._store.find(*key)
            if found is not None:
                refuse_foreign(key, found.labels)
            files[_file(gateway.namespace, gateway.name, key)] = obj
        await trio.to_thread.run_sync(self._write, _prefix(gateway.namespace, gateway.name), files)

    def _write(self, prefix: str, files: Mapping[str, Object]) -> None:
        """Raises Unreachable."""
        try:
            for name, obj in files.items():
                path, text = self._deployed / name, json.dumps(obj, indent=1) + "\n"
                if not (path.exists() and path.read_text(encoding="utf-8") == text):
                    replace_file(path, text.encode())
                    _log.info("deployed", kind=obj["kind"], namespace=obj["metadata"]["namespace"], name=obj["metadata"]["name"])
            for path in self._deployed.glob(f"{prefix}*.json"):
                if path.name not in files:
                    path.unlink(missing_ok=True)
                    _log.info("removed", file=path.name)
        except OSError as exc:
            raise Unreachable(str(exc)) from exc

    async def stamp(self, gateway: KubeGateway) -> None:
        """Nobody else is there to be told, and the user's files are not ours to write to."""

    async def report(self, obj: KubeObject, status: Mapping[str, object]) -> None:
        try:
            await trio.to_thread.run_sync(write_overlay, self._status, "Gateway", obj.namespace, obj.name, {"status": dict(status)})
        except OSError as exc:
            raise Unreachable(str(exc)) from exc

    async def clean(self, gateways: frozenset[tuple[str, str]]) -> None:
        kept = {_prefix(*gateway) for gateway in gateways}
        overlays = {f"gateway_{namespace}_{name}.json" for namespace, name in gateways}

        def remove() -> None:
            try:
                for path in self._deployed.glob("*.json"):
                    if not any(path.name.startswith(prefix) for prefix in kept):
                        path.unlink(missing_ok=True)
                        _log.info("removed", file=path.name)
                for path in self._status.glob("gateway_*.json"):
                    if path.name not in overlays:
                        path.unlink(missing_ok=True)
            except OSError as exc:
                raise Unreachable(str(exc)) from exc

        await trio.to_thread.run_sync(remove)


def _prefix(namespace: str, name: str) -> str:
    """``_`` occurs in no name of Kubernetes, so no Gateway's files are another's."""
    return f"{namespace}_{name}_"


def _file(namespace: str, gateway: str, key: ObjectKey) -> str:
    return f"{_prefix(namespace, gateway)}{key.kind.lower()}_{key.name}.json"
