"""What a policy with ``targetRefs`` says in its status: the condition `WaypointAccepted`, in Istio's words (reference: Istio's
`policies.go` and `flattenConditions`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from istiod_py.translate.config import Condition
from istiod_py.translate.l7.attachment import ISTIO_CLASS
from istiod_py.translate.l7.notices import Notice, names_in
from istiod_py.translate.reading import Read
from mesh.kube.fields import did_you_mean
from mesh.kube.gatewayapi.gateway import WAYPOINT_CONTROLLER
from mesh.kube.objects import FieldPath, KubeObject
from mesh.kube.ownership import WAYPOINT_ACCEPTED
from mesh.kube.policies import AuthorizationPolicy
from mesh.kube.requestauthentication import RequestAuthentication
from mesh.kube.targets import GROUPS, TargetRef


@dataclass(frozen=True, slots=True)
class Targets:
    """What policies can be for. Keys are ``namespace/name`` of the objects, except those of classes, their names."""

    root_namespace: str
    waypoints: frozenset[str] = frozenset()
    """Those that are ready."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """GatewayClasses and the names of their controllers."""
    services: Mapping[str, str] = field(default_factory=dict)
    """Services and the waypoints they are bound to (``namespace/name``); empty: to none."""
    service_entries: Mapping[str, str] = field(default_factory=dict)
    gateways: Collection[str] = ()
    """All there are, ready or not."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """What has become of one target."""

    target: str
    bound: bool
    reason: str
    message: str


def acceptance_of(read: Read[AuthorizationPolicy] | Read[RequestAuthentication], targets: Targets) -> Condition | None:
    """None: the policy is not for waypoints."""
    policy = read.value
    if not policy.audience.has_waypoints:
        return None
    if read.problems:
        because = read.problems[0]
        effect = _effect_of_mistakes(read)
        return Condition(WAYPOINT_ACCEPTED, False, "Invalid", f"{effect}: {because}")
    found = [_bind(target, policy.namespace, read.obj.kind, targets) for target in policy.targets]
    if len(found) == 1:
        return Condition(WAYPOINT_ACCEPTED, found[0].bound, found[0].reason, found[0].message)
    unbound = [each.target for each in found if not each.bound]
    bound = len(unbound) < len(found)
    reason = ("PartiallyInvalid" if unbound else "Accepted") if bound else "Invalid"
    return Condition(WAYPOINT_ACCEPTED, bound, reason, f"Invalid targetRefs: {', '.join(unbound)}" if unbound else "")


def find_unbound(read: Read[AuthorizationPolicy] | Read[RequestAuthentication], targets: Targets) -> Iterator[Notice]:
    """The targets at which a policy without mistakes does nothing: it may be meant to guard them."""
    policy = read.value
    for target in policy.targets if policy.audience.has_waypoints and not read.problems else ():
        found = _bind(target, policy.namespace, read.obj.kind, targets)
        if not found.bound:
            why = _why_no_waypoint(f"{policy.namespace}/{target.name}", targets) if target.kind == "Gateway" else found.message
            yield Notice(_path_of(target, read.obj), f"no effect for {target.kind} {target.name}: {why}")


def _why_no_waypoint(key: str, targets: Targets) -> str:
    if key in targets.gateways:
        return f"waypoint {key} is not ready"
    namespace, _, name = key.partition("/")
    return f"there is no Gateway {key}{did_you_mean(name, names_in(targets.gateways, namespace))}"


def _path_of(target: TargetRef, obj: KubeObject) -> FieldPath:
    several = obj.spec.get("targetRefs")
    for index, item in enumerate(several if isinstance(several, list) else ()):
        if isinstance(item, Mapping) and (item.get("kind"), item.get("name")) == (target.kind, target.name):
            return "spec", "targetRefs", index
    return "spec", "targetRef"


def _effect_of_mistakes(read: Read[AuthorizationPolicy] | Read[RequestAuthentication]) -> str:
    if read.good:
        return "the last good version stays in force"
    dry_run = isinstance(read.value, AuthorizationPolicy) and read.value.dry_run
    if dry_run or read.obj.spec.get("action") == "AUDIT":
        return "not enforced"
    return "until corrected everything it applies to is refused"


def _bind(target: TargetRef, namespace: str, kind: str, targets: Targets) -> _Bound:
    key = f"{namespace}/{target.name}"
    name = f"{target.kind}.{GROUPS[target.kind] or 'core'}:{key}"
    match target.kind:
        case "GatewayClass":
            return _Bound(name, *_bind_class(target.name, namespace, kind, targets))
        case "Gateway":
            bound = key in targets.waypoints
            return _Bound(name, bound, "Accepted" if bound else "TargetNotFound", f"bound to {key}" if bound else "not bound")
        case "Service":
            return _Bound(name, *_bind_service("Service", key, targets.services))
    return _Bound(name, *_bind_service("ServiceEntry", key, targets.service_entries))


def _bind_class(name: str, namespace: str, kind: str, targets: Targets) -> tuple[bool, str, str]:
    if namespace != targets.root_namespace:
        message = f"{kind} must be in the root namespace `{targets.root_namespace}` when referencing a GatewayClass"
        return False, "Invalid", message
    controller = targets.classes.get(name, WAYPOINT_CONTROLLER if name == ISTIO_CLASS else None)
    if controller is None:
        return False, "TargetNotFound", "not bound"
    if controller != WAYPOINT_CONTROLLER:
        return False, "Invalid", f"GatewayClass must use controller name `{WAYPOINT_CONTROLLER}` for waypoints"
    return True, "Accepted", f"bound to {name}"


def _bind_service(kind: str, key: str, known: Mapping[str, str]) -> tuple[bool, str, str]:
    waypoint = known.get(key)
    if waypoint is None:
        return False, "TargetNotFound", f"{kind} {key} was not found"
    if not waypoint:
        return False, "AncestorNotBound", f"{kind} {key} is not bound to a waypoint"
    return True, "Accepted", f"bound to {waypoint}"
