"""Waypoints on Kubernetes: objects applied to the API server, owned by their Gateway, so that they go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import msgspec

from istiod_py.deploy.controller import NotDeployed, Unreachable, refuse_foreign
from istiod_py.status import StatusPatch, apply_status
from istiod_py.translate.deployment import CONTROLLER_VERSION, Object, Template
from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.gatewayapi.gateway import WAYPOINT_CLASS, WAYPOINT_CONTROLLER, KubeGateway
from mesh.kube.objects import KubeObject, ObjectKey, mapping_at
from mesh.kube.ownership import DEPLOYED, DEPLOYER
from mesh.kube.resources import RESOURCES, Resource
from mesh.kube.store import ObjectStore
from mesh.model.labels import GATEWAY_CONTROLLER_VERSION, GATEWAY_MANAGED, GATEWAY_NAME, MESH_CONTROLLER
from mesh.telemetry.log import get_logger

_RESOURCES: Final[Mapping[str, Resource]] = {resource.kind: resource for resource in DEPLOYED}
_PAGE: Final = 100

_log = get_logger("deploy")


class ClusterPlace:
    """Applies, one object after the other. Every object is read before it is written, and written only as it was read."""

    def __init__(self, client: ApiClient, store: ObjectStore) -> None:
        self._client = client
        self._store = store

    async def prepare(self) -> None:
        """The class, if there is a Gateway API and nobody has made it; what users changed in it stays."""
        if self._store.find("GatewayClass", "", WAYPOINT_CLASS) is not None:
            return
        resource = RESOURCES["GatewayClass"]
        spec = {"controllerName": WAYPOINT_CONTROLLER, "description": "Waypoints of the mesh"}
        body = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": WAYPOINT_CLASS}, "spec": spec}
        try:
            await self._client.create(resource.collection(), body)
            _log.info("class.made", name=WAYPOINT_CLASS)
        except ApiError as exc:
            if exc.status not in (404, 409):  # no Gateway API yet; somebody was faster, or our store has not heard of it
                raise Unreachable(str(exc)) from exc
        except ApiUnavailable as exc:
            raise Unreachable(str(exc)) from exc

    async def stamp(self, gateway: KubeGateway) -> None:
        patch = {"metadata": {"annotations": {GATEWAY_CONTROLLER_VERSION: str(CONTROLLER_VERSION)}}}
        try:
            await self._client.merge_patch(RESOURCES["Gateway"].path(gateway.namespace, gateway.name), patch)
        except (ApiError, ApiUnavailable) as exc:
            raise Unreachable(str(exc)) from exc

    async def put(self, gateway: KubeGateway, objects: tuple[Object, ...]) -> None:
        try:
            for obj in objects:
                await self._apply(obj)
            await self._remove_others(gateway, {(obj["kind"], obj["metadata"]["name"]) for obj in objects})
        except ApiError as exc:
            if exc.status in (400, 403, 422):
                raise NotDeployed(str(exc)) from exc
            raise Unreachable(str(exc)) from exc
        except ApiUnavailable as exc:
            raise Unreachable(str(exc)) from exc

    async def _apply(self, obj: Object) -> None:
        """Raises NotDeployed, ApiError, ApiUnavailable."""
        resource, metadata = _RESOURCES[obj["kind"]], obj["metadata"]
        path = resource.path(metadata["namespace"], metadata["name"])
        found = await self._client.find(path)
        body = obj
        if found is not None:
            now = mapping_at(found, "metadata")
            refuse_foreign(ObjectKey(resource.kind, metadata["namespace"], metadata["name"]), now.get("labels"))
            # With the version that was read it is a Conflict to write to what somebody put in its place meanwhile.
            body = {**obj, "metadata": {**metadata, "resourceVersion": now.get("resourceVersion")}}
        await self._client.apply(path, body, manager=DEPLOYER)
        if found is None:
            _log.info("deployed", kind=resource.kind, namespace=metadata["namespace"], name=metadata["name"])

    async def _remove_others(self, gateway: KubeGateway, kept: set[tuple[str, str]]) -> None:
        """What was made for this Gateway before and is no longer wanted: under another name, or an overlay that went."""
        query = {"labelSelector": f"{GATEWAY_NAME}={gateway.name},{GATEWAY_MANAGED}={MESH_CONTROLLER}"}
        for resource in _RESOURCES.values():
            page = await self._client.list_page(resource.collection(gateway.namespace), query, _PAGE)
            for item in page.items:
                found = msgspec.json.decode(item, type=dict[str, object])
                metadata = mapping_at(found, "metadata")
                if (resource.kind, str(metadata.get("name"))) not in kept and _is_owned(metadata, gateway.uid):
                    await self._client.delete(resource.path(gateway.namespace, str(metadata.get("name"))))
                    _log.info("removed", kind=resource.kind, namespace=gateway.namespace, name=metadata.get("name"))

    async def report(self, obj: KubeObject, status: Mapping[str, object]) -> None:
        try:
            await apply_status(self._client, obj.key, StatusPatch(DEPLOYER, status))
        except (ApiError, ApiUnavailable) as exc:
            if not (isinstance(exc, ApiError) and exc.status == 404):
                raise Unreachable(str(exc)) from exc

    async def clean(self, gateways: frozenset[tuple[str, str]]) -> None:
        """The garbage collector does it: all that we made is owned by its Gateway."""


async def make_template(client: ApiClient, template: Template, namespace: str, pod: str) -> Template:
    """With the image that this control plane runs itself, and how it is pulled, where that can be found out. Raises Unreachable."""
    try:
        found = await client.find(RESOURCES["Pod"].path(namespace, pod))
    except (ApiError, ApiUnavailable) as exc:
        if isinstance(exc, ApiError) and exc.status == 403:
            return template
        raise Unreachable(str(exc)) from exc
    spec = mapping_at(found, "spec") if found is not None else {}
    containers = spec.get("containers")
    container = containers[0] if isinstance(containers, list) and containers else {}
    secrets = spec.get("imagePullSecrets")
    names = tuple(str(item.get("name")) for item in secrets if isinstance(item, Mapping)) if isinstance(secrets, list) else ()
    image = container.get("image") if isinstance(container, Mapping) else None
    if not image:
        return template
    return replace(template, image=str(image), pull_policy=str(container.get("imagePullPolicy") or ""), pull_secrets=names)


def _is_owned(metadata: Mapping[str, object], uid: str) -> bool:
    owners = metadata.get("ownerReferences")
    return isinstance(owners, list) and any(isinstance(owner, Mapping) and owner.get("uid") == uid for owner in owners)
