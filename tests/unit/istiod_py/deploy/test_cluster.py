"""The controller against an API server: what is applied, what is left alone, what is removed, and what the Gateway's status says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from istiod_py.deploy import GatewayController
from istiod_py.deploy.cluster import ClusterPlace, make_template
from istiod_py.translate import Config
from istiod_py.translate.deployment import Template
from mesh.kube.api import ApiClient
from mesh.kube.cluster import ClusterStore
from mesh.kube.kubeconfig import ClusterAccess
from mesh.testing.kube import FakeApiServer, Object

TEMPLATE = Template(image="image:1", discovery="https://istiod.istio-system.svc:15012")
GATEWAYS = "gateway.networking.k8s.io/v1"


def gateway(name: str = "waypoint", **changes: Any) -> Object:
    spec = {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]}
    metadata = {"name": name, "namespace": "shop", **changes.pop("metadata", {})}
    return {"apiVersion": GATEWAYS, "kind": "Gateway", "metadata": metadata, "spec": {**spec, **changes}}


class World:
    def __init__(self, api: FakeApiServer, client: ApiClient, nursery: trio.Nursery) -> None:
        self.api = api
        self.client = client
        self._nursery = nursery

    async def start(self, template: Template = TEMPLATE) -> None:
        store = ClusterStore(self.client)
        controller = GatewayController(store, ClusterPlace(self.client, store), lambda: template, Config())
        self._nursery.start_soon(store.run)
        await store.wait_synced()
        self._nursery.start_soon(self._follow, store, controller)
        self._nursery.start_soon(controller.run)

    async def _follow(self, store: ClusterStore, controller: GatewayController) -> None:
        async with aclosing(store.watch()) as changes:
            async for change in changes:
                controller.notify({key.kind for key in change.changed})

    def find(self, kind: str, name: str = "waypoint", namespace: str = "shop") -> Object | None:
        return self.api.find(kind, namespace, name)

    async def until(self, holds: Callable[[], bool]) -> None:
        with trio.fail_after(200):
            await self.api.wait_until(holds)

    def status(self, name: str = "waypoint") -> Object:
        found = self.find("Gateway", name)
        return found.get("status", {}) if found else {}

    def condition(self, kind: str, name: str = "waypoint") -> tuple[str, str, str]:
        for item in self.status(name).get("conditions", []):
            if item["type"] == kind:
                return item["status"], item["reason"], item["message"]
        return "", "", ""

    def run_pod(self, *, ready: bool = True, address: str = "10.96.0.9") -> None:
        """What a cluster does with what was applied."""
        service = self.find("Service")
        assert service is not None
        service["spec"]["clusterIP"] = address
        self.api.put(service)
        labels = {"gateway.networking.k8s.io/gateway-name": "waypoint"}
        status = {"phase": "Running", "podIP": "10.244.0.2", "conditions": [{"type": "Ready", "status": str(ready)}]}
        spec = {"nodeName": "n1", "containers": [{"name": "istio-proxy"}]}
        self.api.put(
            {"kind": "Pod", "metadata": {"name": "waypoint-x", "namespace": "shop", "labels": labels}, "spec": spec, "status": status}
        )


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    api = FakeApiServer()
    client = ApiClient(ClusterAccess("api", 443, tls=False), connect=api.connect)
    async with trio.open_nursery() as nursery:
        await nursery.start(api.run)
        for namespace in ("istio-system", "shop"):
            api.put({"kind": "Namespace", "metadata": {"name": namespace}})
        yield World(api, client, nursery)
        nursery.cancel_scope.cancel()


def run(check: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with world() as made:
            await check(made)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_gateway_gets_what_runs_it_and_says_so_once_a_pod_is_ready() -> None:
    async def check(world: World) -> None:
        world.api.put(gateway())
        await world.start()
        await world.until(lambda: world.find("Service") is not None and world.condition("Programmed")[0] != "")
        assert world.find("Deployment") is not None
        assert world.find("ServiceAccount") is not None
        assert world.condition("Accepted") == ("True", "Accepted", "Resource accepted")
        assert world.condition("Programmed")[:2] in [("False", "AddressNotUsable"), ("False", "AddressNotAssigned")]
        assert not world.status().get("addresses")
        world.run_pod(ready=False)
        missing = 'Failed to assign to any requested addresses: no instances found for hostname "waypoint.shop.svc.cluster.local"'
        await world.until(lambda: world.condition("Programmed") == ("False", "AddressNotUsable", missing))
        world.run_pod()
        done = "Resource programmed, assigned to service(s) waypoint.shop.svc.cluster.local:15008"
        await world.until(lambda: world.condition("Programmed") == ("True", "Programmed", done))
        assert world.status()["addresses"] == [
            {"type": "IPAddress", "value": "10.96.0.9"},
            {"type": "Hostname", "value": "waypoint.shop.svc.cluster.local"},
        ]
        (listener,) = world.status()["listeners"]
        assert {item["type"]: item["status"] for item in listener["conditions"]} == {
            "Accepted": "True",
            "Conflicted": "False",
            "Programmed": "True",
            "ResolvedRefs": "True",
        }
        assert world.find("Gateway")["metadata"]["annotations"]["gateway.istio.io/controller-version"] == "5"

    run(check)


def test_addresses_stay_when_the_last_pod_fails() -> None:
    """Else what is bound to the waypoint would go around it."""

    async def check(world: World) -> None:
        world.api.put(gateway())
        await world.start()
        await world.until(lambda: world.find("Service") is not None)
        world.run_pod()
        await world.until(lambda: world.condition("Programmed")[0] == "True")
        world.run_pod(ready=False)
        await world.until(lambda: world.condition("Programmed")[0] == "False")
        assert len(world.status()["addresses"]) == 2

    run(check)


def test_the_class_is_made_where_nobody_has_and_left_as_it_is_where_somebody_has() -> None:
    async def check(world: World) -> None:
        await world.start()
        await world.until(lambda: world.find("GatewayClass", "istio-waypoint", "") is not None)
        made = world.find("GatewayClass", "istio-waypoint", "")
        assert made is not None
        assert made["spec"]["controllerName"] == "istio.io/mesh-controller"
        made["spec"]["description"] = "changed"
        world.api.put(made)
        world.api.put(gateway())
        await world.until(lambda: world.find("Service") is not None)
        assert world.find("GatewayClass", "istio-waypoint", "")["spec"]["description"] == "changed"
        world.api.remove("GatewayClass", "", "istio-waypoint")
        await world.until(lambda: world.find("GatewayClass", "istio-waypoint", "") is not None)

    run(check)


def test_without_a_gateway_api_nothing_happens_and_nothing_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def check(world: World) -> None:
        world.api.faults.absent_groups.add("gateway.networking.k8s.io")
        await world.start()
        await world.until(lambda: any(seen.path.endswith("/gatewayclasses") and seen.method == "POST" for seen in world.api.requests))
        assert not [seen for seen in world.api.requests if seen.method == "PATCH"]

    run(check)


@pytest.mark.parametrize("kind", ["Service", "ServiceAccount", "Deployment"])
def test_what_somebody_else_made_is_not_written_over(kind: str) -> None:
    async def check(world: World) -> None:
        theirs = {"kind": kind, "metadata": {"name": "waypoint", "namespace": "shop", "labels": {"app": "x"}}, "spec": {"ports": []}}
        world.api.put(theirs)
        world.api.put(gateway())
        await world.start()
        because = f"{kind} shop/waypoint is somebody else's: it lacks the label gateway.istio.io/managed"
        await world.until(lambda: world.condition("Programmed") == ("False", "Invalid", because))
        found = world.find(kind)
        assert found is not None
        assert found["metadata"]["labels"] == {"app": "x"}

    run(check)


def test_what_was_taken_away_comes_back() -> None:
    async def check(world: World) -> None:
        world.api.put(gateway())
        await world.start()
        await world.until(lambda: world.find("Service") is not None and world.find("Deployment") is not None)
        world.api.remove("Service", "shop", "waypoint")
        await world.until(lambda: world.find("Service") is not None)
        world.api.remove("Deployment", "shop", "waypoint")
        await world.until(lambda: world.find("Deployment") is not None)

    run(check)


def test_nothing_is_written_again_when_nothing_changed() -> None:
    async def check(world: World) -> None:
        world.api.put(gateway())
        await world.start()
        await world.until(lambda: world.condition("Programmed")[0] != "" and world.find("Service") is not None)
        await trio.sleep(5)
        before = len([seen for seen in world.api.requests if seen.method in ("PATCH", "POST")])
        world.api.put({"kind": "Pod", "metadata": {"name": "other", "namespace": "shop"}, "spec": {"containers": [{"name": "a"}]}})
        await trio.sleep(5)
        assert len([seen for seen in world.api.requests if seen.method in ("PATCH", "POST")]) == before

    run(check)


@pytest.mark.parametrize("changes", [
    {"metadata": {"annotations": {"gateway.istio.io/controller-version": "6"}}},
    {"metadata": {"labels": {"istio.io/rev": "canary"}}},
    {"gatewayClassName": "somebody-elses"},
])  # fmt: skip
def test_what_is_not_ours_is_left_alone(changes: dict[str, Any]) -> None:
    async def check(world: World) -> None:
        world.api.put(gateway("theirs", **changes))
        world.api.put(gateway())
        await world.start()
        await world.until(lambda: world.condition("Programmed")[0] != "")
        assert world.status("theirs") == {}
        assert world.find("Service", "theirs") is None

    run(check)


def test_a_class_of_the_users_own_with_our_controller_is_ours() -> None:
    async def check(world: World) -> None:
        spec = {"controllerName": "istio.io/mesh-controller"}
        world.api.put({"apiVersion": GATEWAYS, "kind": "GatewayClass", "metadata": {"name": "mine"}, "spec": spec})
        world.api.put(gateway(gatewayClassName="mine"))
        await world.start()
        await world.until(lambda: world.find("Service") is not None)

    run(check)


def test_a_gateway_that_no_waypoint_could_serve_is_not_accepted() -> None:
    async def check(world: World) -> None:
        world.api.put(gateway(listeners=[{"name": "http", "port": 80, "protocol": "HTTP"}]))
        await world.start()
        expected = 'Expected a single listener on port 15008 with protocol "HBONE"'
        await world.until(lambda: world.condition("Accepted") == ("False", "ListenersNotValid", expected))
        assert world.find("Service") is None

    run(check)


# Overlays


def parameters(**data: str) -> Object:
    return {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "options", "namespace": "shop"}, "data": data}


ASKED = {"infrastructure": {"parametersRef": {"group": "", "kind": "ConfigMap", "name": "options"}}}


def test_the_classs_defaults_come_before_the_gateways_own() -> None:
    async def check(world: World) -> None:
        labels = {"gateway.istio.io/defaults-for-class": "istio-waypoint"}
        world.api.put(
            {
                "kind": "ConfigMap",
                "metadata": {"name": "defaults", "namespace": "istio-system", "labels": labels},
                "data": {"deployment": "spec: {replicas: 2, minReadySeconds: 7}", "podDisruptionBudget": "spec: {minAvailable: 1}"},
            }
        )
        world.api.put(parameters(deployment="spec: {replicas: 3}"))
        world.api.put(gateway(**ASKED))
        await world.start()
        await world.until(lambda: world.find("PodDisruptionBudget") is not None)
        deployment = world.find("Deployment")
        assert deployment is not None
        assert (deployment["spec"]["replicas"], deployment["spec"]["minReadySeconds"]) == (3, 7)

    run(check)


def test_what_an_overlay_no_longer_asks_for_is_removed() -> None:
    async def check(world: World) -> None:
        world.api.put(parameters(horizontalPodAutoscaler="spec: {maxReplicas: 3}"))
        world.api.put(gateway(**ASKED))
        await world.start()
        await world.until(lambda: world.find("HorizontalPodAutoscaler") is not None)
        somebodys = {"name": "other", "namespace": "shop", "labels": {"gateway.networking.k8s.io/gateway-name": "waypoint"}}
        world.api.put({"kind": "HorizontalPodAutoscaler", "metadata": somebodys, "spec": {}})
        world.api.put(parameters())
        await world.until(lambda: world.find("HorizontalPodAutoscaler") is None)
        assert world.find("HorizontalPodAutoscaler", "other") is not None

    run(check)


@pytest.mark.parametrize(("reference", "data", "because"), [
    (
        {"group": "", "kind": "ConfigMap", "name": "missing"},
        {},
        'parametersRef targeting configmap "shop/missing", but configmap does not exist',
    ),
    ({"group": "x.io", "kind": "Thing", "name": "t"}, {}, "unknown infrastructure parameters type x.io/Thing"),
    (ASKED["infrastructure"]["parametersRef"], {"service": "metadata: {name: x}"}, "service: illegal metadata change"),
])  # fmt: skip
def test_parameters_that_cannot_be_used_are_said_and_nothing_is_deployed(
    reference: dict[str, str], data: dict[str, str], because: str
) -> None:
    async def check(world: World) -> None:
        world.api.put(parameters(**data))
        world.api.put(gateway(infrastructure={"parametersRef": reference}))
        await world.start()
        await world.until(lambda: world.condition("Accepted") == ("False", "InvalidParameters", because))
        assert world.find("Service") is None
        assert world.find("Deployment") is None

    run(check)


def test_an_api_server_that_is_away_for_a_while_is_asked_again() -> None:
    async def check(world: World) -> None:
        await world.start()
        await world.until(lambda: world.find("GatewayClass", "istio-waypoint", "") is not None)
        world.api.faults.refusals += [(503, "ServiceUnavailable", {})] * 3
        world.api.put(gateway())
        await world.until(lambda: world.find("Service") is not None)

    run(check)


# The image


def test_waypoints_run_the_image_that_we_run() -> None:
    async def check(world: World) -> None:
        spec = {
            "containers": [{"name": "istiod", "image": "registry/mesh:7", "imagePullPolicy": "Always"}],
            "imagePullSecrets": [{"name": "s"}],
        }
        world.api.put({"kind": "Pod", "metadata": {"name": "istiod-1", "namespace": "istio-system"}, "spec": spec})
        found = await make_template(world.client, TEMPLATE, "istio-system", "istiod-1")
        assert (found.image, found.pull_policy, found.pull_secrets) == ("registry/mesh:7", "Always", ("s",))
        assert await make_template(world.client, TEMPLATE, "istio-system", "no-pod") == TEMPLATE

    run(check)
