"""Where waypoints are asked for: the API server, or a directory of YAML. One set of verbs for both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import trio

from mesh.kube.api import ApiClient, ApiError
from mesh.kube.directory import DirectoryStore, LabelError, edit_labels
from mesh.kube.document_edit import EditError, remove_object
from mesh.kube.gatewayapi.gateway import WAYPOINT_CLASS
from mesh.kube.objects import KubeObject, ObjectKey
from mesh.kube.resources import RESOURCES
from mesh.model.labels import REVISION
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.objects import Condition, KubeStruct, Meta, Named, find_one, list_all
from meshctl_py.waypoints.gateway import Found, as_yaml

MANAGER: Final = "istioctl"
"""Of the fields that are applied: Istio's own tool's, so that what one has set the other changes."""
_GATEWAYS: Final = RESOURCES["Gateway"]
NO_GATEWAY_API: Final = "missing Kubernetes Gateway CRDs need to be installed before applying a waypoint"


class WaypointPlace(Protocol):
    """All raise ClusterProblem for what the user must act on; that on a cluster also ApiError, ApiUnavailable."""

    @property
    def namespace(self) -> str:
        """The one that is meant where none is named."""

    @property
    def label_command(self) -> str:
        """What the user would type to label something."""

    @property
    def is_tended(self) -> bool:
        """Whether somebody programs waypoints here, so that it makes sense to wait."""

    async def namespace_labels(self, namespace: str) -> Mapping[str, str]: ...

    async def label_namespace(self, namespace: str, key: str, value: str) -> None: ...

    async def apply(self, gateway: Mapping[str, Any]) -> None: ...

    async def find(self, namespace: str, name: str) -> Found | None: ...

    async def list(self, namespace: str, revision: str = "") -> list[Found]:
        """Of a namespace (empty: of all), and of a revision, in order of namespace and name."""

    async def delete(self, namespace: str, name: str) -> bool:
        """False: there is none."""


class _Spec(KubeStruct, frozen=True):
    gateway_class_name: str = ""


class _Status(KubeStruct, frozen=True):
    conditions: tuple[Condition, ...] = ()


class _Gateway(KubeStruct, frozen=True):
    metadata: Meta
    spec: _Spec = _Spec()
    status: _Status = _Status()


class ClusterWaypoints:
    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @property
    def namespace(self) -> str:
        return self._client.access.namespace

    label_command = "kubectl label"
    is_tended = True

    async def namespace_labels(self, namespace: str) -> Mapping[str, str]:
        found = await find_one(self._client, RESOURCES["Namespace"], Named, "", namespace)
        if found is None:
            raise ClusterProblem(f"namespace: {namespace} not found")
        return found.metadata.labels

    async def label_namespace(self, namespace: str, key: str, value: str) -> None:
        await self._client.merge_patch(RESOURCES["Namespace"].path("", namespace), {"metadata": {"labels": {key: value}}})

    async def apply(self, gateway: Mapping[str, Any]) -> None:
        metadata = gateway["metadata"]
        try:
            await self._client.apply(_GATEWAYS.path(metadata["namespace"], metadata["name"]), gateway, manager=MANAGER, force=False)
        except ApiError as exc:
            if exc.status == 404:
                raise ClusterProblem(f"{NO_GATEWAY_API}: {exc.message}") from exc
            raise

    async def find(self, namespace: str, name: str) -> Found | None:
        found = await find_one(self._client, _GATEWAYS, _Gateway, namespace, name)
        return None if found is None else _of_cluster(found)

    async def list(self, namespace: str, revision: str = "") -> list[Found]:
        selector = f"{REVISION}={revision}" if revision else ""
        try:
            found = await list_all(self._client, _GATEWAYS, _Gateway, namespace=namespace, labels=selector)
        except ApiError as exc:
            if exc.status == 404:
                raise ClusterProblem(
                    "this cluster has no Kubernetes Gateway CRDs, and so no waypoints: 'meshctl install' brings them"
                ) from exc
            raise
        ours = [_of_cluster(each) for each in found if each.spec.gateway_class_name == WAYPOINT_CLASS]
        return sorted(ours, key=lambda each: (each.namespace, each.name))

    async def delete(self, namespace: str, name: str) -> bool:
        try:
            await self._client.delete(_GATEWAYS.path(namespace, name))
        except ApiError as exc:
            if exc.status == 404:
                return False
            raise
        return True


def _of_cluster(gateway: _Gateway) -> Found:
    conditions = tuple(map(msgspec.structs.asdict, gateway.status.conditions))
    return Found(gateway.metadata.namespace, gateway.metadata.name, gateway.metadata.labels, conditions)


class DirectoryWaypoints:
    """``status``: the overlays of whoever looks after Gateways; None: nobody does."""

    namespace = "default"
    label_command = "meshctl label"

    def __init__(self, source: Path, status: Path | None) -> None:
        self._source = source
        self._status = status

    @property
    def is_tended(self) -> bool:
        return self._status is not None

    def _store(self) -> DirectoryStore:
        store = DirectoryStore([self._source, *([self._status] if self._status is not None else [])])
        store.load()
        return store

    async def namespace_labels(self, namespace: str) -> Mapping[str, str]:
        await trio.lowlevel.checkpoint()
        found = self._store().find("Namespace", "", namespace)
        if found is None:
            raise ClusterProblem(f"namespace: {namespace} not found")
        return found.labels

    async def label_namespace(self, namespace: str, key: str, value: str) -> None:
        await trio.lowlevel.checkpoint()
        self._edit("Namespace", namespace, {key: value}, "")

    async def apply(self, gateway: Mapping[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        metadata = gateway["metadata"]
        found = self._store().find("Gateway", metadata["namespace"], metadata["name"])
        if found is None:
            self._write(metadata["namespace"], metadata["name"], as_yaml(gateway))
            return
        if found.spec.get("gatewayClassName") != WAYPOINT_CLASS:
            raise ClusterProblem(f"Gateway {metadata['namespace']}/{metadata['name']} is there, and no waypoint: {found.origin.file}")
        # What was not given stays as it is, as under server-side apply what others have set.
        self._edit("Gateway", metadata["name"], metadata.get("labels", {}), metadata["namespace"])

    def _write(self, namespace: str, name: str, text: str) -> None:
        path = self._source / f"waypoint-{namespace}-{name}.yaml"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as exc:
            raise ClusterProblem(f"{path} is there, and no waypoint of this name in it") from exc
        except OSError as exc:
            raise ClusterProblem(f"cannot write {path}: {exc.strerror}") from exc

    def _edit(self, kind: str, name: str, labels: Mapping[str, str], namespace: str) -> None:
        try:
            if labels:
                edit_labels(self._source, kind, name, dict(labels), namespace=namespace)
        except LabelError as exc:
            raise ClusterProblem(str(exc)) from exc
        except OSError as exc:
            raise ClusterProblem(f"cannot write {exc.filename}: {exc.strerror}") from exc

    async def find(self, namespace: str, name: str) -> Found | None:
        await trio.lowlevel.checkpoint()
        found = self._store().find("Gateway", namespace, name)
        return None if found is None else _of_directory(found)

    async def list(self, namespace: str, revision: str = "") -> list[Found]:
        await trio.lowlevel.checkpoint()
        objects = (obj for obj in self._store().objects("Gateway") if obj.spec.get("gatewayClassName") == WAYPOINT_CLASS)
        found = (_of_directory(obj) for obj in objects if namespace in ("", obj.namespace))
        return [each for each in found if not revision or each.labels.get(REVISION) == revision]

    async def delete(self, namespace: str, name: str) -> bool:
        await trio.lowlevel.checkpoint()
        try:
            return remove_object(self._source, ObjectKey("Gateway", namespace, name)) is not None
        except EditError as exc:
            raise ClusterProblem(str(exc)) from exc
        except OSError as exc:
            raise ClusterProblem(f"cannot write {exc.filename}: {exc.strerror}") from exc


def _of_directory(obj: KubeObject) -> Found:
    listed = obj.status.get("conditions")
    items = msgspec.to_builtins(listed) if isinstance(listed, list) else []
    conditions = tuple({str(key): str(value) for key, value in item.items()} for item in items if isinstance(item, dict))
    return Found(obj.namespace, obj.name, obj.labels, conditions)
