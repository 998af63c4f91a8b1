"""What can be chosen at installation: the values of the Helm chart, with the same names and the same effect on the manifests. Pure."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from mesh.kube.documents import MalformedDocument, parse_chunk, split_documents
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.manifests import IMAGE, Manifests, Object, plain
from meshctl_py.cluster.objects import AGENT, CONTROL_PLANE

Text = Annotated[str, msgspec.Meta(min_length=1)]
CNI_CONF_DIR: Final = "/etc/cni/net.d"
SHORTEST_GRACE: Final = 6
"""Seconds. With less an agent could neither hand over nor let connections end."""
_MAX_FILE: Final = 1 << 20
_ESCAPED: Final = re.compile(r"\\(.)")


class _Struct(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    pass


class Image(_Struct, frozen=True):
    """``tag`` empty: this version's own."""

    repository: Text = IMAGE
    tag: str = ""
    pull_policy: Annotated[str, msgspec.Meta(pattern="^(Always|IfNotPresent|Never)?$")] = ""


class Workload(_Struct, frozen=True):
    """What both programs are given in the same way."""

    env: dict[str, str] = {}
    resources: dict[str, Any] = {}
    pod_annotations: dict[str, str] = {}
    pod_labels: dict[str, str] = {}
    node_selector: dict[str, str] = {}
    affinity: dict[str, Any] = {}


class ControlPlane(Workload, frozen=True):
    replicas: Annotated[int, msgspec.Meta(ge=0)] = 1
    tolerations: list[dict[str, Any]] = []


class Agent(Workload, frozen=True):
    max_surge: int | str = 1
    termination_grace_period_seconds: Annotated[int, msgspec.Meta(ge=SHORTEST_GRACE)] = 30
    se_linux_options: dict[str, Any] = {}
    cni_bin_dir: Annotated[str, msgspec.Meta(pattern="^/")] = "/opt/cni/bin"
    cni_conf_dir: Annotated[str, msgspec.Meta(pattern="^/")] = CNI_CONF_DIR


class Values(_Struct, frozen=True):
    """See the comments in ``deploy/chart/values.yaml``."""

    image: Image = Image()
    image_pull_secrets: list[dict[str, Any]] = []
    log_level: str = ""
    log_as_json: bool = False
    trust_domain: Text = "cluster.local"
    cluster_id: Text = msgspec.field(default="Kubernetes", name="clusterID")
    istiod: ControlPlane = ControlPlane()
    ztunnel: Agent = Agent()


Given = Mapping[str, Any]
"""Values as they were given, only those."""


def read_values(paths: Iterable[Path], settings: Iterable[str], image: str) -> Given:
    """Files in order, then ``--set``, then ``--image``; what comes later wins, mappings are merged. Raises ClusterProblem."""
    given: dict[str, Any] = {}
    for path in paths:
        given = merge(given, _checked(_read(path), str(path)))
    for setting in settings:
        given = merge(given, _checked(parse_setting(setting), f"--set {setting}"))
    if image:
        given = merge(given, {"image": split_image(image)})
    return given


def as_values(given: Given, where: str = "the values") -> Values:
    """Raises ClusterProblem."""
    try:
        return msgspec.convert(plain(given), Values, strict=False)
    except msgspec.ValidationError as exc:
        text, _, path = str(exc).partition(" - at `$.")
        raise ClusterProblem(f"{where}: {path.rstrip('`') + ': ' if path else ''}{text}") from exc


def _checked(given: Given, where: str) -> Given:
    as_values(given, where)
    return given


def _read(path: Path) -> Given:
    try:
        text = path.read_bytes()[:_MAX_FILE].decode("utf-8")
        values = [value for chunk in split_documents(text) for value in parse_chunk(chunk) if value is not None]
    except OSError as exc:
        raise ClusterProblem(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ClusterProblem(f"{path}: not UTF-8") from exc
    except MalformedDocument as exc:
        raise ClusterProblem(f"{path}:{exc.line}: {exc.message}") from exc
    if len(values) > 1 or not all(isinstance(value, Mapping) for value in values):
        raise ClusterProblem(f"{path}: expected one mapping of values")
    found: Given = plain(values[0]) if values else {}
    return found


def parse_setting(text: str) -> Given:
    """``a.b=1,c=x`` as Helm writes it: dots go deeper, ``\\`` takes the next sign as it is. All is text, which `as_values` reads as what
    is wanted there. Raises ClusterProblem."""
    given: dict[str, Any] = {}
    for part in _split(text, ","):
        key, equals, value = part.partition("=")
        names = [_ESCAPED.sub(r"\1", name) for name in _split(key, ".")]
        if not equals or not all(names):
            raise ClusterProblem(f"--set {text}: expected NAME=VALUE, such as istiod.replicas=2")
        if any("[" in name for name in names) or value.startswith("{"):
            raise ClusterProblem(f"--set {text}: lists are given in a file, with -f")
        nested: Any = _ESCAPED.sub(r"\1", value)
        for name in reversed(names):
            nested = {name: nested}
        given = merge(given, nested)
    return given


def _split(text: str, separator: str) -> list[str]:
    return re.split(rf"(?<!\\){re.escape(separator)}", text)


def split_image(image: str) -> dict[str, str]:
    """``registry:5000/name:tag`` into the two values; a digest stays with the name."""
    name, colon, tag = image.rpartition(":")
    if "@" in image or not colon or "/" in tag:
        return {"repository": image}
    return {"repository": name, "tag": tag}


def merge(below: Given, above: Given) -> dict[str, Any]:
    """``above`` wins; mappings are merged."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        merged[key] = merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def configure(manifests: Manifests, values: Values) -> list[Object]:
    """The objects with these values. The manifests stay as they are."""
    objects = copy.deepcopy(list(manifests.objects))
    for obj in objects:
        match obj["kind"], obj["metadata"]["name"]:
            case "Deployment", str(name) if name == CONTROL_PLANE:
                _configure_control_plane(obj, values, manifests.tag)
            case "DaemonSet", str(name) if name == AGENT:
                _configure_agent(obj, values, manifests.tag)
    return objects


def _configure_control_plane(obj: Object, values: Values, tag: str) -> None:
    _configure(obj, values.istiod, values, tag, {})
    obj["spec"]["replicas"] = values.istiod.replicas
    if values.istiod.tolerations:
        obj["spec"]["template"]["spec"]["tolerations"] = values.istiod.tolerations
    arguments = obj["spec"]["template"]["spec"]["containers"][0]["args"]
    if values.trust_domain != "cluster.local":
        arguments.append(f"--trust-domain={values.trust_domain}")
    if values.cluster_id != "Kubernetes":
        arguments.append(f"--cluster-id={values.cluster_id}")


def _configure_agent(obj: Object, values: Values, tag: str) -> None:
    grace = values.ztunnel.termination_grace_period_seconds
    environment = {"TERMINATION_GRACE_PERIOD_SECONDS": str(grace)}
    if values.trust_domain != "cluster.local":
        environment["TRUST_DOMAIN"] = values.trust_domain
    if values.cluster_id != "Kubernetes":
        environment["CLUSTER_ID"] = values.cluster_id
    if values.ztunnel.cni_conf_dir != CNI_CONF_DIR:
        environment["CNI_NET_DIR_ON_NODE"] = values.ztunnel.cni_conf_dir
    _configure(obj, values.ztunnel, values, tag, environment)
    surge = str(values.ztunnel.max_surge)
    obj["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"] = int(surge) if surge.isdecimal() else surge
    pod = obj["spec"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = grace
    directories = {"cni-bin": values.ztunnel.cni_bin_dir, "cni-net": values.ztunnel.cni_conf_dir}
    for volume in pod["volumes"]:
        if volume["name"] in directories:
            volume["hostPath"]["path"] = directories[volume["name"]]
    if values.ztunnel.se_linux_options:
        for container in pod["containers"]:
            container["securityContext"]["seLinuxOptions"] = values.ztunnel.se_linux_options


def _configure(obj: Object, own: Workload, values: Values, tag: str, environment: Mapping[str, str]) -> None:
    template = obj["spec"]["template"]
    pod = template["spec"]
    template["metadata"]["labels"] = template["metadata"].get("labels", {}) | own.pod_labels
    template["metadata"]["annotations"] = template["metadata"].get("annotations", {}) | own.pod_annotations
    pod["nodeSelector"] = pod.get("nodeSelector", {}) | own.node_selector
    if own.affinity:
        pod["affinity"] = own.affinity
    if values.image_pull_secrets:
        pod["imagePullSecrets"] = values.image_pull_secrets
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        if container["image"].partition(":")[0] == IMAGE:
            container["image"] = image_of(values.image, tag)
            if values.image.pull_policy:
                container["imagePullPolicy"] = values.image.pull_policy
            _set_environment(container, {**_logging(values), **environment, **own.env})
    if own.resources:
        pod["containers"][0]["resources"] = own.resources


def image_of(image: Image, tag: str) -> str:
    return image.repository if "@" in image.repository else f"{image.repository}:{image.tag or tag}"


def _logging(values: Values) -> dict[str, str]:
    level = {"RUST_LOG": values.log_level} if values.log_level else {}
    return level | ({"LOG_FORMAT": "json"} if values.log_as_json else {})


def _set_environment(container: Object, environment: Mapping[str, str]) -> None:
    """What is there already keeps its place, what is new comes after it."""
    left = dict(environment)
    given = [{"name": item["name"], "value": left.pop(item["name"])} if item["name"] in left else item for item in container.get("env", ())]
    container["env"] = [*given, *({"name": name, "value": value} for name, value in sorted(left.items()))]
