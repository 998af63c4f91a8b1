"""A Pod as the mesh reads it: identity, addresses, ports and state; what the lab needs to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.kube.fields import Fields
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.model.address import InvalidAddress, IpAddress, parse_ip

PROTOCOLS = ("TCP", "UDP", "SCTP")


@dataclass(frozen=True, slots=True)
class ContainerPort:
    name: str
    port: int
    protocol: str


@dataclass(frozen=True, slots=True)
class EnvVar:
    """``field`` is the path of a ``valueFrom.fieldRef`` (e.g. ``status.podIP``), ``""`` where ``value`` is meant."""

    name: str
    value: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    name: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[EnvVar, ...] = ()
    working_dir: str = ""
    ports: tuple[ContainerPort, ...] = ()
    restarts_always: bool = False
    """On an init container: it is a native sidecar and runs as long as the pod."""


@dataclass(frozen=True, slots=True)
class Controller:
    """The owner reference with ``controller: true``."""

    kind: str
    name: str
    uid: str = ""


@dataclass(frozen=True, slots=True)
class KubePod:
    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    service_account: str
    node: str
    host_network: bool
    containers: tuple[Container, ...]
    init_containers: tuple[Container, ...]
    ips: tuple[IpAddress, ...]
    """``status.podIPs``, else ``podIP``."""
    phase: str
    """``""`` where nothing reported a status yet."""
    ready: bool
    deleting: bool
    generate_name: str
    controller: Controller | None

    @property
    def finished(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    def find_port(self, name: str) -> int | None:
        """The TCP port a container or native sidecar calls ``name``."""
        sidecars = (container for container in self.init_containers if container.restarts_always)
        for container in (*self.containers, *sidecars):
            for port in container.ports:
                if port.name == name and port.protocol == "TCP":
                    return port.port
        return None


def read_pod(obj: KubeObject) -> tuple[KubePod, tuple[SourceProblem, ...]]:
    """The pod and every mistake in it; with a mistake the pod is for naming only, not for use."""
    fields = Fields(obj)
    metadata = fields.mapping("metadata") or Fields(obj, ("metadata",), {}, fields.problems)
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {"containers": []}, fields.problems)
    status = fields.mapping("status") or Fields(obj, ("status",), {}, fields.problems)
    containers = tuple(_read_container(container) for container in spec.mappings("containers", required=True))
    if spec.is_empty("containers") and not fields.problems:
        spec.complain("containers", "a pod needs at least one container")
    pod = KubePod(
        namespace=obj.namespace,
        name=obj.name,
        uid=obj.uid,
        labels=obj.labels,
        annotations=obj.annotations,
        service_account=spec.string("serviceAccountName") or spec.string("serviceAccount") or "default",
        node=spec.string("nodeName"),
        host_network=spec.boolean("hostNetwork"),
        containers=containers,
        init_containers=tuple(_read_container(container) for container in spec.mappings("initContainers")),
        ips=_read_ips(status),
        phase=status.string("phase", choices=("Pending", "Running", "Succeeded", "Failed", "Unknown")),
        ready=_read_ready(status),
        deleting="deletionTimestamp" in metadata,
        generate_name=metadata.string("generateName"),
        controller=_read_controller(metadata),
    )
    return pod, tuple(fields.problems)


def _read_container(container: Fields) -> Container:
    return Container(
        name=container.string("name", required=True),
        command=container.strings("command"),
        args=container.strings("args"),
        env=tuple(_read_env(variable) for variable in container.mappings("env")),
        working_dir=container.string("workingDir"),
        ports=tuple(_read_port(port) for port in container.mappings("ports")),
        restarts_always=container.string("restartPolicy") == "Always",
    )


def _read_env(variable: Fields) -> EnvVar:
    source = variable.mapping("valueFrom")
    reference = source.mapping("fieldRef") if source else None
    return EnvVar(
        name=variable.string("name", required=True),
        value=variable.string("value"),
        field=reference.string("fieldPath", required=True) if reference else "",
    )


def _read_port(port: Fields) -> ContainerPort:
    return ContainerPort(
        name=port.string("name"),
        port=port.integer("containerPort", required=True, low=1, high=65535),
        protocol=port.string("protocol", "TCP", choices=PROTOCOLS),
    )


def _read_ips(status: Fields) -> tuple[IpAddress, ...]:
    ips: dict[IpAddress, None] = {}
    for entry in status.mappings("podIPs"):
        _take_ip(ips, entry, "ip")
    if not ips and "podIP" in status:
        _take_ip(ips, status, "podIP")
    return tuple(ips)


def _take_ip(ips: dict[IpAddress, None], fields: Fields, key: str) -> None:
    text = fields.string(key, required=True)
    if text:
        try:
            ips[parse_ip(text)] = None
        except InvalidAddress as exc:
            fields.complain(key, str(exc))


def _read_ready(status: Fields) -> bool:
    return any(
        condition.string("type", required=True) == "Ready" and condition.string("status") == "True"
        for condition in status.mappings("conditions")
    )


def _read_controller(metadata: Fields) -> Controller | None:
    for owner in metadata.mappings("ownerReferences"):
        if owner.boolean("controller"):
            return Controller(owner.string("kind", required=True), owner.string("name", required=True), owner.string("uid"))
    return None
