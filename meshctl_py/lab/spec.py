"""What the lab reads from Kubernetes objects: nodes, pods with their containers, services. Pure; mistakes come back as problems."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from mesh.kube.fields import Fields, did_you_mean
from mesh.kube.gatewayapi.gateway import WAYPOINT_CLASS
from mesh.kube.objects import KubeObject, SourceProblem
from mesh.model.address import InvalidAddress, IpAddress, parse_ip
from mesh.model.enrolment import Enrolment, decide_enrolment

KINDS = ("Node", "Namespace", "Pod", "Service", "Gateway")
"""What the lab builds, or needs to know to build."""
DEFAULT_GRACE = 5
"""Seconds between SIGTERM and SIGKILL where the pod does not say; Kubernetes has 30, but somebody is watching here."""


class PodKey(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ServiceKey(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class WaypointKey(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class TcpCheck:
    port: int | str


@dataclass(frozen=True, slots=True)
class HttpCheck:
    port: int | str
    path: str = "/"
    host: str = ""


@dataclass(frozen=True, slots=True)
class ExecCheck:
    argv: tuple[str, ...]


Check: TypeAlias = TcpCheck | HttpCheck | ExecCheck


@dataclass(frozen=True, slots=True)
class Probe:
    """A readiness probe with Kubernetes' defaults; times in seconds."""

    check: Check
    initial_delay: int = 0
    period: int = 1
    """Kubernetes asks every 10 s; a lab starts while its user waits."""
    timeout: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3


@dataclass(frozen=True, slots=True)
class EnvVar:
    """A value, or the path of a pod's own field (downward API) that gives it."""

    name: str
    value: str = ""
    field_path: str | None = None


@dataclass(frozen=True, slots=True)
class Container:
    """``argv`` empty: the image's own command would run, which the lab has not; nothing runs."""

    name: str
    argv: tuple[str, ...] = ()
    environment: tuple[EnvVar, ...] = ()
    directory: str | None = None
    readiness: Probe | None = None
    ports: Mapping[str, int] = field(default_factory=dict)

    def find_port(self, port: int | str) -> int | None:
        return port if isinstance(port, int) else self.ports.get(port)


@dataclass(frozen=True, slots=True)
class PodSpec:
    key: PodKey
    node: str | None = None
    service_account: str = "default"
    hostname: str = ""
    host_network: bool = False
    ips: tuple[IpAddress, ...] = ()
    """Addresses that the user's file asks for; none: the lab chooses."""
    init_containers: tuple[Container, ...] = ()
    containers: tuple[Container, ...] = ()
    restart_policy: str = "Always"
    grace: int = DEFAULT_GRACE
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    def runs_like(self, other: PodSpec) -> bool:
        """Whether a pod made from ``other`` is still this one: labels and annotations change on a living pod, the rest makes a new one."""
        return _without_metadata(self) == _without_metadata(other)

    def find_port(self, port: int | str) -> int | None:
        """A container port by number or name."""
        if isinstance(port, int):
            return port
        return next((container.ports[port] for container in self.containers if port in container.ports), None)


@dataclass(frozen=True, slots=True)
class ServicePortSpec:
    port: int
    target: int | str
    name: str = ""
    protocol: str = "TCP"


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    key: ServiceKey
    selector: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[ServicePortSpec, ...] = ()
    headless: bool = False
    cluster_ips: tuple[IpAddress, ...] = ()
    """Virtual addresses that the user's file asks for; none, and not headless: the lab chooses."""
    families: tuple[int, ...] = (4, 6)
    publish_not_ready: bool = False

    def selects(self, namespace: str, labels: Mapping[str, str]) -> bool:
        return (
            bool(self.selector)
            and namespace == self.key.namespace
            and all(labels.get(key) == value for key, value in self.selector.items())
        )


@dataclass(frozen=True, slots=True)
class Cluster:
    """Everything the lab builds, in the order of the files."""

    nodes: tuple[str, ...] = ()
    pods: Mapping[PodKey, PodSpec] = field(default_factory=dict)
    services: Mapping[ServiceKey, ServiceSpec] = field(default_factory=dict)
    namespace_labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    waypoints: tuple[WaypointKey, ...] = ()
    """Gateways that somebody must deploy pods for."""
    problems: tuple[SourceProblem, ...] = ()

    def enrolment_of(self, pod: PodSpec) -> Enrolment:
        """Whether the agent on the pod's node is expected to capture it."""
        return decide_enrolment(
            namespace=pod.key.namespace,
            namespace_labels=self.namespace_labels.get(pod.key.namespace, {}),
            pod_labels=pod.labels,
            pod_annotations=pod.annotations,
            host_network=pod.host_network,
            phase="Pending",
        )


def read_cluster(objects: Iterable[KubeObject]) -> Cluster:
    """The lab's view of the objects; kinds it does not build are left to the control plane."""
    nodes: list[str] = []
    pods: dict[PodKey, PodSpec] = {}
    services: dict[ServiceKey, ServiceSpec] = {}
    labels: dict[str, Mapping[str, str]] = {}
    waypoints: list[WaypointKey] = []
    problems: list[SourceProblem] = []
    for obj in objects:
        fields = Fields(obj, problems=problems)
        match obj.kind:
            case "Node":
                nodes.append(obj.name)
            case "Namespace":
                labels[obj.name] = obj.labels
            case "Pod":
                pod = _read_pod(obj, fields)
                pods[pod.key] = pod
            case "Service":
                service = _read_service(obj, fields)
                services[service.key] = service
            case "Gateway" if obj.spec.get("gatewayClassName") == WAYPOINT_CLASS:
                waypoints.append(WaypointKey(obj.namespace, obj.name))
    return Cluster(tuple(nodes), pods, services, labels, tuple(waypoints), tuple(problems))


def _without_metadata(pod: PodSpec) -> PodSpec:
    return replace(pod, labels={}, annotations={})


def _read_pod(obj: KubeObject, fields: Fields) -> PodSpec:
    spec = fields.mapping("spec", required=True) or Fields(obj, values={})
    status = fields.mapping("status") or Fields(obj, values={})
    return PodSpec(
        PodKey(obj.namespace, obj.name),
        node=spec.string("nodeName") or None,
        service_account=spec.string("serviceAccountName") or "default",
        hostname=spec.string("hostname") or obj.name[:63],
        host_network=spec.boolean("hostNetwork"),
        ips=_read_addresses(status, "podIP", "podIPs", lambda item: item.string("ip", required=True)),
        init_containers=tuple(map(_read_container, spec.mappings("initContainers"))),
        containers=tuple(map(_read_container, spec.mappings("containers", required=True))),
        restart_policy=spec.string("restartPolicy", "Always", choices=("Always", "OnFailure", "Never")),
        grace=spec.integer("terminationGracePeriodSeconds", DEFAULT_GRACE, low=0, high=3600),
        labels=obj.labels,
        annotations=obj.annotations,
    )


def _read_addresses(fields: Fields, single: str, several: str, read: Callable[[Fields], str]) -> tuple[IpAddress, ...]:
    texts = [read(item) for item in fields.mappings(several)] or [fields.string(single)]
    addresses: list[IpAddress] = []
    for text in filter(None, texts):
        try:
            addresses.append(parse_ip(text))
        except InvalidAddress as exc:
            fields.complain(several if several in fields else single, str(exc))
    return tuple(addresses)


def _read_container(fields: Fields) -> Container:
    ports = {
        name: number
        for port in fields.mappings("ports")
        if (number := _port_number(port, "containerPort")) and (name := port.string("name"))
    }
    return Container(
        fields.string("name", required=True),
        argv=fields.strings("command") + fields.strings("args") if "command" in fields else (),
        environment=tuple(_read_variable(item) for item in fields.mappings("env")),
        directory=fields.string("workingDir") or None,
        readiness=_read_probe(fields.mapping("readinessProbe"), ports),
        ports=ports,
    )


def _port_number(fields: Fields, key: str) -> int:
    return fields.integer(key, required=True, low=1, high=65535)


def _read_variable(fields: Fields) -> EnvVar:
    name = fields.string("name", required=True)
    source = fields.mapping("valueFrom")
    if source is None:
        return EnvVar(name, fields.string("value"))
    reference = source.mapping("fieldRef")
    if reference is None:
        source.complain(None, "the lab knows valueFrom.fieldRef only")
        return EnvVar(name)
    return EnvVar(name, field_path=reference.string("fieldPath", required=True, choices=FIELD_PATHS))


FIELD_PATHS = (
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.podIP",
    "status.podIPs",
    "status.hostIP",
)
"""What a container may learn of its pod."""


def _read_probe(fields: Fields | None, ports: Collection[str]) -> Probe | None:
    if fields is None:
        return None
    check = _read_check(fields, ports)
    if check is None:
        return None
    return Probe(
        check,
        initial_delay=fields.integer("initialDelaySeconds", 0, low=0, high=3600),
        period=fields.integer("periodSeconds", 1, low=1, high=3600),
        timeout=fields.integer("timeoutSeconds", 1, low=1, high=3600),
        success_threshold=fields.integer("successThreshold", 1, low=1, high=100),
        failure_threshold=fields.integer("failureThreshold", 3, low=1, high=100),
    )


def _read_check(fields: Fields, ports: Collection[str]) -> Check | None:
    if (tcp := fields.mapping("tcpSocket")) is not None:
        return TcpCheck(_read_probed_port(tcp, ports))
    if (http := fields.mapping("httpGet")) is not None:
        return HttpCheck(_read_probed_port(http, ports), http.string("path") or "/", http.string("host"))
    if (command := fields.mapping("exec")) is not None:
        return ExecCheck(command.strings("command", required=True))
    fields.complain(None, "the lab knows tcpSocket, httpGet and exec probes")
    return None


def _read_probed_port(fields: Fields, ports: Collection[str]) -> int | str:
    port = _int_or_string(fields, "port")
    if isinstance(port, str) and port not in ports:
        fields.complain("port", f"no port of this container is named '{port}'{did_you_mean(port, ports)}")
    return port


def _int_or_string(fields: Fields, key: str) -> int | str:
    value = fields.number_or_string(key)
    if value is None:
        fields.complain(None, f"'{key}' is required")
        return 0
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _read_service(obj: KubeObject, fields: Fields) -> ServiceSpec:
    spec = fields.mapping("spec", required=True) or Fields(obj, values={})
    kind = spec.string("type", "ClusterIP")
    headless = spec.string("clusterIP") == "None" or "None" in spec.strings("clusterIPs")
    addresses = () if headless else _read_cluster_ips(spec)
    return ServiceSpec(
        ServiceKey(obj.namespace, obj.name),
        selector={} if kind == "ExternalName" else spec.string_map("selector"),
        ports=tuple(_read_service_port(port) for port in spec.mappings("ports")),
        headless=headless or kind == "ExternalName",
        cluster_ips=addresses,
        families=_read_families(spec),
        publish_not_ready=spec.boolean("publishNotReadyAddresses"),
    )


def _read_cluster_ips(spec: Fields) -> tuple[IpAddress, ...]:
    texts = spec.strings("clusterIPs") or tuple(filter(None, (spec.string("clusterIP"),)))
    addresses: list[IpAddress] = []
    for text in texts:
        try:
            addresses.append(parse_ip(text))
        except InvalidAddress as exc:
            spec.complain("clusterIPs" if "clusterIPs" in spec else "clusterIP", str(exc))
    return tuple(addresses)


def _read_service_port(fields: Fields) -> ServicePortSpec:
    port = _port_number(fields, "port")
    target = fields.number_or_string("targetPort")
    return ServicePortSpec(
        port,
        port if target is None else target,
        fields.string("name"),
        fields.string("protocol", "TCP", choices=("TCP", "UDP", "SCTP")),
    )


def _read_families(spec: Fields) -> tuple[int, ...]:
    """Both unless the service says otherwise: Kubernetes gives one, but a lab that shows IPv6 only on request hides half its faults."""
    named = tuple({"IPv4": 4, "IPv6": 6}.get(family, 0) for family in spec.strings("ipFamilies"))
    if 0 in named:
        spec.complain("ipFamilies", "expected IPv4 or IPv6")
    named = tuple(family for family in named if family)
    if spec.string("ipFamilyPolicy") == "SingleStack":
        return named[:1] or (4,)
    return named or (4, 6)
