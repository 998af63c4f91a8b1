"""The root as ConfigMap ``istio-ca-root-cert`` in every namespace, where agents and pods mount it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import mapping_at
from mesh.kube.ownership import ROOT_MAP, ROOT_MAP_MANAGER
from mesh.kube.reflector import Reflector
from mesh.kube.resources import CONFIG_MAPS
from mesh.telemetry.log import get_logger

KEY: Final = "root-cert.pem"
_LABELS: Final = {"istio.io/config": "true"}
_PASSED_OVER: Final = frozenset({"kube-public", "kube-node-lease", "local-path-storage"})
RETRY: Final = 2.0

_log = get_logger("root")


class RootMaps:
    """What the maps hold now; `run` keeps them right, to be called by the leader."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._found: dict[str, str | None] = {}
        self._changed = trio.Event()
        self.reflector = Reflector(client, CONFIG_MAPS, self, field_selector=f"metadata.name={ROOT_MAP}")

    async def run(self, namespaces: Callable[[], Iterable[str]], roots_pem: Callable[[], bytes]) -> None:
        """Until cancelled; `wake` when namespaces or root changed."""
        await self.reflector.synced.wait()
        while True:
            changed = self._changed
            wanted = roots_pem().decode("ascii")
            missing = [name for name in namespaces() if name not in _PASSED_OVER and self._found.get(name) != wanted]
            failed = [name for name in missing if not await self._write(name, wanted)]
            if failed:
                await trio.sleep(RETRY)
            else:
                await changed.wait()

    def wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _write(self, namespace: str, pem: str) -> bool:
        metadata = {"name": ROOT_MAP, "namespace": namespace, "labels": _LABELS}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {KEY: pem}}
        try:
            await self._client.apply(CONFIG_MAPS.path(namespace, ROOT_MAP), body, manager=ROOT_MAP_MANAGER)
        except (ApiError, ApiUnavailable) as exc:
            if isinstance(exc, ApiError) and exc.status in (403, 404):
                return True  # the namespace is ending, or gone; should it stay after all, the next change writes it
            _log.warning("publish.failed", namespace=namespace, because=str(exc))
            return False
        self._found[namespace] = pem
        _log.info("published", namespace=namespace)
        return True

    # Sink

    def reduce(self, obj: dict[str, object]) -> dict[str, object]:
        return obj

    def replace(self, objects: Sequence[dict[str, object]]) -> None:
        self._found = dict(map(_content, objects))
        self.wake()

    def put(self, obj: dict[str, object]) -> None:
        namespace, content = _content(obj)
        self._found[namespace] = content
        self.wake()

    def remove(self, namespace: str, name: str) -> None:
        self._found.pop(namespace, None)
        self.wake()

    def report(self, problem: str) -> None:
        if problem:
            _log.warning("watch.failed", because=problem)


def _content(obj: Mapping[str, object]) -> tuple[str, str | None]:
    content = mapping_at(obj, "data").get(KEY)
    return str(mapping_at(obj, "metadata").get("namespace")), content if isinstance(content, str) else None
