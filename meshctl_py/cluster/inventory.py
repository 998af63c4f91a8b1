"""What an installation is made of, noted down in the cluster: so that an upgrade removes what is no longer part of it, with the values that
were chosen, and that an uninstallation of any version removes all of it."""

from __future__ import annotations

from typing import Final

import msgspec

from mesh.kube.api import ApiClient, ApiUnavailable
from mesh.kube.resources import CONFIG_MAPS, Resource
from meshctl_py.cluster.manifests import PART_OF, PROJECT, Object
from meshctl_py.cluster.objects import SYSTEM_NAMESPACE

NAME: Final = "ambient-mesh-installation"
MANAGER: Final = "meshctl"
"""Field manager of all that `meshctl` applies."""
_KEY: Final = "installation.json"


class Entry(msgspec.Struct, frozen=True, order=True):
    """One object. ``plural`` and ``namespaced`` as the API server had them, so that removing it needs no discovery."""

    api_version: str
    plural: str
    kind: str
    name: str
    namespace: str = ""
    namespaced: bool = True

    @classmethod
    def of(cls, resource: Resource, obj: Object) -> Entry:
        namespace = obj["metadata"].get("namespace", "") if resource.namespaced else ""
        return cls(resource.api_version, resource.plural, resource.kind, obj["metadata"]["name"], namespace, resource.namespaced)

    @property
    def resource(self) -> Resource:
        group, _, version = self.api_version.rpartition("/")
        return Resource(group, version, self.plural, self.kind, self.namespaced)

    @property
    def path(self) -> str:
        return self.resource.path(self.namespace, self.name)

    def __str__(self) -> str:
        group = self.api_version.rpartition("/")[0]
        return f"{self.kind.lower()}{'.' + group if group else ''}/{self.name}"


class Installation(msgspec.Struct, frozen=True):
    """``values`` as they were given. ``made_namespace``: istio-system was not there before."""

    version: str
    values: dict[str, object] = {}
    entries: list[Entry] = []
    made_namespace: bool = False


async def read_installation(client: ApiClient) -> Installation | None:
    """What `write_installation` noted last. Raises ApiError, ApiUnavailable."""
    found = await client.find(CONFIG_MAPS.path(SYSTEM_NAMESPACE, NAME))
    if found is None:
        return None
    data = found.get("data")
    text = data.get(_KEY, "") if isinstance(data, dict) else ""
    try:
        return msgspec.json.decode(text, type=Installation)
    except msgspec.DecodeError as exc:
        raise ApiUnavailable(f"ConfigMap {SYSTEM_NAMESPACE}/{NAME}: {_KEY}: {exc}") from exc


async def write_installation(client: ApiClient, installation: Installation) -> None:
    """Raises ApiError, ApiUnavailable."""
    text = msgspec.json.encode(installation, order="deterministic").decode()
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": NAME, "namespace": SYSTEM_NAMESPACE, "labels": {PART_OF: PROJECT}},
        "data": {_KEY: text},
    }
    await client.apply(CONFIG_MAPS.path(SYSTEM_NAMESPACE, NAME), body, manager=MANAGER)
