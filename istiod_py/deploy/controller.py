"""The loop that keeps waypoints deployed, and what it asks of the place where they run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

import trio

from istiod_py.status import plan_conditions, utc_now
from istiod_py.translate import Config as TranslateConfig
from istiod_py.translate.deployment import (
    BadParameters,
    Object,
    Overlay,
    Template,
    is_deployed_by_us,
    plan_waypoint,
    version_to_stamp,
)
from istiod_py.translate.gateways import Facts, GatewayStatus, describe_gateway, takes_hbone
from istiod_py.translate.waypoints import account_name, deployed_name, hostname_of
from mesh.kube.gatewayapi.gateway import WAYPOINT_CLASS, WAYPOINT_CONTROLLER, KubeGateway, read_gateway, read_gateway_class
from mesh.kube.objects import KubeObject, ObjectKey, by_age
from mesh.kube.service import KubeService, read_service
from mesh.kube.store import ObjectStore
from mesh.model.labels import GATEWAY_CLASS_DEFAULTS, GATEWAY_MANAGED, GATEWAY_NAME, REVISION
from mesh.telemetry.log import get_logger

RESYNC: Final = 60.0
"""Seconds after which everything is applied again: what others took away comes back, and what overlays say anew is heard."""
RETRY: Final = 2.0
KINDS: Final = frozenset({"Gateway", "GatewayClass", "Service", "ServiceAccount", "Pod", "Namespace", "ConfigMap"})
"""A change of one of these may be a change for a waypoint."""

_log = get_logger("deploy")


class NotDeployed(Exception):
    """What the user, or somebody else, must act on; the text is for the Gateway's status."""


class Unreachable(Exception):
    """It may work later; the text is for our log."""


class Place(Protocol):
    """Where waypoints run."""

    async def put(self, gateway: KubeGateway, objects: tuple[Object, ...]) -> None:
        """Have these and no others for this Gateway. Raises NotDeployed, Unreachable."""

    async def stamp(self, gateway: KubeGateway) -> None:
        """Note on the Gateway whose it is. Raises Unreachable."""

    async def report(self, obj: KubeObject, status: Mapping[str, object]) -> None:
        """Make this the Gateway's whole status as far as it is ours. Raises Unreachable."""

    async def clean(self, gateways: frozenset[tuple[str, str]]) -> None:
        """There are only these left, by namespace and name. Raises Unreachable."""

    async def prepare(self) -> None:
        """What has to be there before any Gateway: their class. Raises Unreachable."""


@dataclass(frozen=True, slots=True)
class _Settled:
    """What was put last for a Gateway."""

    gateway: KubeGateway
    template: Template
    overlays: tuple[Overlay, ...]


class GatewayController:
    """`run` while leading; `notify` of changes."""

    def __init__(self, store: ObjectStore, place: Place, template: Callable[[], Template], config: TranslateConfig) -> None:
        """``store`` has the ConfigMaps that overlays are in, too."""
        self._store = store
        self._place = place
        self._template = template
        self._config = config
        self._changed = trio.Event()
        self._settled: dict[tuple[str, str], _Settled] = {}
        self._reported: dict[tuple[str, str], tuple[KubeObject, GatewayStatus]] = {}

    def notify(self, kinds: Collection[str]) -> None:
        """Objects of these kinds changed."""
        if KINDS.isdisjoint(kinds):
            return
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        self._settled.clear()
        self._reported.clear()
        resync = trio.current_time()
        while True:
            changed = self._changed
            again = trio.current_time() >= resync
            if again:
                self._settled.clear()
                resync = trio.current_time() + RESYNC
            good = await self._reconcile_all()
            with trio.move_on_at(min(resync, trio.current_time() + (RESYNC if good else RETRY))):
                await changed.wait()

    async def _reconcile_all(self) -> bool:
        good = await _try("class", self._place.prepare())
        ours = self._find_gateways()
        for obj, gateway in ours:
            good &= await _try(gateway.key, self._reconcile(obj, gateway))
        left = frozenset((gateway.namespace, gateway.name) for _, gateway in ours)
        for gone in (self._settled.keys() | self._reported.keys()) - left:
            self._settled.pop(gone, None)
            self._reported.pop(gone, None)
        return good & await _try("cleaning", self._place.clean(left))

    def _find_gateways(self) -> list[tuple[KubeObject, KubeGateway]]:
        """Those of a class that is ours, for this control plane, and not in newer hands."""
        found: list[tuple[KubeObject, KubeGateway]] = []
        for obj in self._store.objects("Gateway"):
            gateway, problems = read_gateway(obj)
            revision = obj.labels.get(REVISION)
            if problems or (revision is not None and revision not in self._config.revisions):
                continue
            if self._controller_of(gateway) == WAYPOINT_CONTROLLER and version_to_stamp(gateway) is not None:
                found.append((obj, gateway))
        return found

    def _controller_of(self, gateway: KubeGateway) -> str:
        """The class need not be there: everybody knows ours."""
        obj = self._store.find("GatewayClass", "", gateway.class_name)
        if obj is None:
            return WAYPOINT_CONTROLLER if gateway.class_name == WAYPOINT_CLASS else ""
        return read_gateway_class(obj)[0].controller

    async def _reconcile(self, obj: KubeObject, gateway: KubeGateway) -> None:
        key = (gateway.namespace, gateway.name)
        rejected = trouble = ""
        unreachable: Unreachable | None = None
        try:
            if is_deployed_by_us(gateway) and takes_hbone(gateway):
                await self._deploy(key, gateway)
        except BadParameters as exc:
            rejected = str(exc)
        except NotDeployed as exc:
            trouble = str(exc)
        except Unreachable as exc:
            unreachable = exc
        await self._report(obj, gateway, self._look(gateway, rejected, trouble))
        if unreachable is not None:
            raise unreachable

    async def _deploy(self, key: tuple[str, str], gateway: KubeGateway) -> None:
        template, settled = self._template(), self._settled.get(key)
        overlays = find_overlays(self._store, gateway, self._config.root_namespace)
        now = _Settled(replace(gateway, assigned=()), template, overlays)
        if settled == now and self._is_there(gateway):
            return
        objects = plan_waypoint(gateway, template, overlays)
        if version_to_stamp(gateway):
            await self._place.stamp(gateway)
        await self._place.put(gateway, objects)
        self._settled[key] = now

    def _is_there(self, gateway: KubeGateway) -> bool:
        """What of it we see all the time; the rest is looked after with every `RESYNC`."""
        service = self._store.find("Service", gateway.namespace, deployed_name(gateway))
        return service is not None and self._store.find("ServiceAccount", gateway.namespace, account_name(gateway)) is not None

    def _look(self, gateway: KubeGateway, rejected: str, trouble: str) -> Facts:
        obj = self._store.find("Service", gateway.namespace, self._hostname(gateway).partition(".")[0])
        service: KubeService | None = None
        if obj is not None:
            read, problems = read_service(obj)
            service = None if problems else read
        ready = any(
            _is_ready(pod)
            for pod in self._store.objects("Pod")
            if pod.namespace == gateway.namespace and pod.labels.get(GATEWAY_NAME) == gateway.name
        )
        return Facts(service, ready, rejected, trouble)

    async def _report(self, obj: KubeObject, gateway: KubeGateway, facts: Facts) -> None:
        key = (gateway.namespace, gateway.name)
        status = describe_gateway(gateway, self._hostname(gateway), facts)
        if self._reported.get(key) == (obj, status):
            return
        patch = plan_gateway_status(obj, status, utc_now())
        if patch is not None:
            await self._place.report(obj, patch)
            _log.info(
                "gateway.reported", gateway=gateway.key, programmed=status.conditions[-1].status, because=status.conditions[-1].message
            )
        self._reported[key] = (obj, status)

    def _hostname(self, gateway: KubeGateway) -> str:
        """Of the service that we deploy, or of the one that the user has."""
        asked = next((address.value for address in gateway.addresses if address.type == "Hostname"), "")
        return asked or hostname_of(gateway, self._config)


async def _try(what: str, work: Awaitable[None]) -> bool:
    try:
        await work
    except Unreachable as exc:
        _log.warning("deploy.failed", gateway=what, because=str(exc))
        return False
    return True


def plan_gateway_status(obj: KubeObject, wanted: GatewayStatus, now: str) -> dict[str, object] | None:
    """The whole of our part, None if it stands there already."""
    listed = obj.status.get("listeners")
    found = {str(item.get("name")): item for item in listed if isinstance(item, Mapping)} if isinstance(listed, list) else {}
    listeners = [
        {
            "name": listener.name,
            "attachedRoutes": 0,
            "supportedKinds": [],
            "conditions": plan_conditions(
                obj, listener.conditions, now, found=found.get(listener.name, {}).get("conditions", []), always=True
            ),
        }
        for listener in wanted.listeners
    ]
    planned: dict[str, object] = {
        "conditions": plan_conditions(obj, wanted.conditions, now, always=True),
        "addresses": [{"type": address.type, "value": address.value} for address in wanted.addresses],
        "listeners": listeners,
    }
    return None if all(_covers(obj.status.get(name), part) for name, part in planned.items()) else planned


def _covers(found: object, wanted: object) -> bool:
    """Whether all that is wanted stands there; conditions of others may stand beside ours."""
    if isinstance(wanted, dict):
        return isinstance(found, Mapping) and all(_covers(found.get(key), value) for key, value in wanted.items())
    if not isinstance(wanted, list):
        return found == wanted or str(found) == str(wanted)
    if not wanted:
        return not found
    if not isinstance(found, list):
        return False
    if all(isinstance(item, dict) and "type" in item and "status" in item for item in wanted):
        by_type = {item.get("type"): item for item in found if isinstance(item, Mapping)}
        return all(_covers(by_type.get(item["type"]), item) for item in wanted)
    return len(found) == len(wanted) and all(_covers(a, b) for a, b in zip(found, wanted, strict=True))


def find_overlays(store: ObjectStore, gateway: KubeGateway, root_namespace: str) -> tuple[Overlay, ...]:
    """What to merge onto the deployment: the defaults of its class (of several the oldest), then the Gateway's own. Raises
    BadParameters."""
    maps = [each for each in store.objects("ConfigMap") if each.labels.get(GATEWAY_CLASS_DEFAULTS) == gateway.class_name]
    found = [_data(each) for each in by_age([each for each in maps if each.namespace == root_namespace])[:1]]
    reference = gateway.infrastructure.parameters if gateway.infrastructure else None
    if reference is not None:
        if (reference.group, reference.kind) != ("", "ConfigMap"):
            raise BadParameters(f"unknown infrastructure parameters type {reference.group}/{reference.kind}")
        own = store.find("ConfigMap", gateway.namespace, reference.name)
        if own is None:
            name = f"{gateway.namespace}/{reference.name}"
            raise BadParameters(f'parametersRef targeting configmap "{name}", but configmap does not exist')
        found.append(_data(own))
    return tuple(found)


def _data(config_map: KubeObject) -> Overlay:
    """Of the keys that a source leaves out none is an overlay's."""
    data = config_map.raw.get("data")
    return {str(key): value for key, value in data.items() if isinstance(value, str)} if isinstance(data, Mapping) else {}


def _is_ready(pod: KubeObject) -> bool:
    if "deletionTimestamp" in pod.metadata:
        return False
    conditions = pod.status.get("conditions")
    return isinstance(conditions, list) and any(
        isinstance(item, Mapping) and item.get("type") == "Ready" and item.get("status") == "True" for item in conditions
    )


def refuse_foreign(key: ObjectKey, labels: object) -> None:
    """An object may be written to if it says that a controller of Gateways has made it. Raises NotDeployed."""
    if not (isinstance(labels, Mapping) and GATEWAY_MANAGED in labels):
        raise NotDeployed(f"{key} is somebody else's: it lacks the label {GATEWAY_MANAGED}")
