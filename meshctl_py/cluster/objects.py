"""The objects of a cluster that `meshctl` looks at, and of each only what it looks at."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final, TypeVar

import msgspec

from mesh.kube.api import ApiClient, ApiUnavailable
from mesh.kube.resources import RESOURCES, Resource

SYSTEM_NAMESPACE: Final = "istio-system"
AGENT: Final = "ztunnel"
CONTROL_PLANE: Final = "istiod"
PODS: Final = RESOURCES["Pod"]
NODES: Final = RESOURCES["Node"]
_PAGE: Final = 500

_T = TypeVar("_T", bound="KubeStruct")


class KubeStruct(msgspec.Struct, frozen=True, rename="camel"):
    """Base: names as Kubernetes writes them."""


class Meta(KubeStruct, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    generation: int = 0
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class Condition(KubeStruct, frozen=True):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""


class Waiting(KubeStruct, frozen=True):
    reason: str = ""
    message: str = ""


class Terminated(KubeStruct, frozen=True):
    reason: str = ""
    message: str = ""
    exit_code: int = 0


class ContainerState(KubeStruct, frozen=True):
    waiting: Waiting | None = None
    terminated: Terminated | None = None


class ContainerStatus(KubeStruct, frozen=True):
    name: str = ""
    ready: bool = False
    restart_count: int = 0
    image: str = ""
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()


class PodSpec(KubeStruct, frozen=True):
    node_name: str = ""


class PodState(KubeStruct, frozen=True):
    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: list[Condition] = []
    container_statuses: list[ContainerStatus] = []
    init_container_statuses: list[ContainerStatus] = []


class Pod(KubeStruct, frozen=True):
    metadata: Meta
    spec: PodSpec = PodSpec()
    status: PodState = PodState()

    @property
    def ready(self) -> bool:
        return self.metadata.deletion_timestamp is None and any(c.type == "Ready" and c.status == "True" for c in self.status.conditions)

    def why_not_ready(self) -> str:
        """The innermost reason the kubelet or the scheduler gives."""
        if self.metadata.deletion_timestamp is not None:
            return "is being deleted"
        for container in (*self.status.init_container_statuses, *self.status.container_statuses):
            waiting, ended = container.state.waiting, container.state.terminated
            if waiting is not None and waiting.reason not in ("", "ContainerCreating", "PodInitializing"):
                before = container.last_state.terminated
                last = f"; it ended with status {before.exit_code}{_message(before.message)}" if before is not None else ""
                return f"{waiting.reason}{_message(waiting.message)}{last}"
            if ended is not None and ended.exit_code:
                return f"container {container.name} ended with status {ended.exit_code}{_message(ended.message)}"
        for condition in self.status.conditions:
            if condition.status == "False" and condition.type in ("PodScheduled", "Initialized", "ContainersReady"):
                return f"{condition.reason}{_message(condition.message)}"
        return self.status.reason or self.status.phase or "not scheduled yet"


def _message(text: str) -> str:
    return f": {text}" if text else ""


class Named(KubeStruct, frozen=True):
    """Any object, of which only its metadata count."""

    metadata: Meta


class DeploymentState(KubeStruct, frozen=True):
    """Of Deployments and DaemonSets; each fills its own half."""

    observed_generation: int = 0
    replicas: int = 0
    ready_replicas: int = 0
    updated_replicas: int = 0
    available_replicas: int = 0
    desired_number_scheduled: int = 0
    number_ready: int = 0
    number_available: int = 0
    updated_number_scheduled: int = 0
    conditions: list[Condition] = []


class WorkloadSpec(KubeStruct, frozen=True):
    replicas: int = 1


class Controller(KubeStruct, frozen=True):
    """A Deployment or a DaemonSet."""

    metadata: Meta
    spec: WorkloadSpec = WorkloadSpec()
    status: DeploymentState = DeploymentState()


async def list_all(
    client: ApiClient, resource: Resource, kind: type[_T], *, namespace: str = "", labels: str = "", fields: str = ""
) -> list[_T]:
    """All of them, page by page. Raises ApiError, ApiUnavailable."""
    selectors = {"labelSelector": labels, "fieldSelector": fields}
    query: Mapping[str, str] = {name: value for name, value in selectors.items() if value}
    found: list[_T] = []
    token = ""
    while True:
        page = await client.list_page(resource.collection(namespace), query, _PAGE, token)
        found += (_decode(item, kind) for item in page.items)
        token = page.token
        if not token:
            return found


async def find_one(client: ApiClient, resource: Resource, kind: type[_T], namespace: str, name: str) -> _T | None:
    """Raises ApiError, ApiUnavailable."""
    found = await client.find(resource.path(namespace, name))
    return None if found is None else _decode(msgspec.Raw(msgspec.json.encode(found)), kind)


def _decode(raw: msgspec.Raw, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as exc:
        raise ApiUnavailable(f"the API server's {kind.__name__} is none: {exc}") from exc
