"""Where the API server has which kind, asked of the server itself: what it serves is not ours to know."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.resources import Resource
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.manifests import Object

_T = TypeVar("_T")

_LISTABLE: Final = "list"


class _Kind(msgspec.Struct):
    name: str
    kind: str
    namespaced: bool
    verbs: list[str] = []


class _Kinds(msgspec.Struct):
    resources: list[_Kind] = []


class _Version(msgspec.Struct):
    groupVersion: str


class _Group(msgspec.Struct):
    preferredVersion: _Version


class _Groups(msgspec.Struct):
    groups: list[_Group] = []


class Discovery:
    """Asks about each API version once, and again for kinds that were not there yet."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._known: dict[str, list[_Kind]] = {}

    async def resource_of(self, obj: Object) -> Resource:
        """Raises ClusterProblem when the server has no such kind; ApiError, ApiUnavailable."""
        api_version, kind = str(obj["apiVersion"]), str(obj["kind"])
        found = await self.find(api_version, kind)
        if found is None:
            raise ClusterProblem(f"the API server does not know {kind} of {api_version}: is the cluster too old?")
        return found

    async def find(self, api_version: str, kind: str) -> Resource | None:
        group, _, version = api_version.rpartition("/")
        for known in (self._known.get(api_version), None):
            kinds = known if known is not None else await self._ask(api_version)
            for entry in kinds:
                if entry.kind == kind and "/" not in entry.name:
                    return Resource(group, version, entry.name, kind, entry.namespaced)
        return None

    async def list_namespaced(self) -> list[Resource]:
        """Everything that can be listed in a namespace, each in the version its group prefers. Groups that fail are left out."""
        versions = ["v1", *(group.preferredVersion.groupVersion for group in (await self._decode("/apis", _Groups)).groups)]
        found: list[Resource] = []
        for api_version in versions:
            group, _, version = api_version.rpartition("/")
            try:
                kinds = await self._ask(api_version)
            except (ApiError, ApiUnavailable):
                continue  # an aggregated API whose own server is away
            found += (
                Resource(group, version, kind.name, kind.kind)
                for kind in kinds
                if kind.namespaced and _LISTABLE in kind.verbs and "/" not in kind.name
            )
        return found

    async def _ask(self, api_version: str) -> list[_Kind]:
        try:
            found = await self._decode(f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}", _Kinds)
        except ApiError as exc:
            if exc.status == 404:
                return []
            raise
        self._known[api_version] = found.resources
        return found.resources

    async def _decode(self, path: str, kind: type[_T]) -> _T:
        try:
            return msgspec.convert(await self._client.get(path), kind)
        except msgspec.ValidationError as exc:
            raise ApiUnavailable(f"{path} of the API server is no discovery document: {exc}") from exc
