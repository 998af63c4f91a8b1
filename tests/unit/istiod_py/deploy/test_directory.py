"""The controller beside a directory: waypoints' objects as files that are read as the user's are, their status as overlays."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import trio

from istiod_py.deploy import GatewayController
from istiod_py.deploy.directory import DirectoryPlace
from istiod_py.translate import Config
from istiod_py.translate.deployment import Template
from mesh.kube.directory import DirectoryStore, write_overlay
from mesh.kube.objects import KubeObject

GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
"""


class World:
    def __init__(self, directory: Path) -> None:
        self.source, self.deployed, self.status = (directory / name for name in ("source", "deployed", "status"))
        self.source.mkdir()
        (self.source / "namespace.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
        self.store = DirectoryStore([self.source, self.deployed, self.status], bases=2)

    def write(self, name: str, text: str) -> None:
        (self.source / name).write_text(text)

    def deployed_objects(self) -> set[tuple[str, str]]:
        return {(obj.kind, obj.name) for obj in self.store.objects("Pod", "Service", "ServiceAccount")}

    def gateway(self) -> KubeObject | None:
        return self.store.find("Gateway", "shop", "waypoint")

    def condition(self, kind: str) -> str:
        obj = self.gateway()
        conditions = obj.status.get("conditions", []) if obj is not None else []
        assert isinstance(conditions, list)
        return next((f"{item['status']} {item['reason']}: {item['message']}" for item in conditions if item["type"] == kind), "")

    async def until(self, holds: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not holds():  # noqa: ASYNC110 - files are changed by others
                await trio.sleep(0.02)


@asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    controller = GatewayController(
        world.store, DirectoryPlace(world.store, world.deployed, world.status), lambda: Template("", ""), Config()
    )

    async def follow() -> None:
        async with aclosing(world.store.watch()) as changes:
            async for change in changes:
                controller.notify({key.kind for key in change.changed})

    world.store.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        nursery.start_soon(controller.run)
        yield
        nursery.cancel_scope.cancel()


def run(directory: Path, check: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(directory)
        await check(world)

    trio.run(main)


ALL = {("Pod", "waypoint-0"), ("Service", "waypoint"), ("ServiceAccount", "waypoint")}


def test_a_gateway_becomes_a_pod_and_a_service_and_takes_them_with_it(tmp_path: Path) -> None:
    async def check(world: World) -> None:
        world.write("gateway.yaml", GATEWAY)
        async with running(world):
            await world.until(lambda: world.deployed_objects() == ALL)
            assert world.store.problems == ()
            await world.until(lambda: world.condition("Accepted").startswith("True"))
            write_overlay(
                world.status, "Service", "shop", "waypoint", {"spec": {"clusterIP": "10.96.1.7", "clusterIPs": ["10.96.1.7", "fd00::7"]}}
            )
            ready = {"phase": "Running", "podIP": "10.244.0.2", "conditions": [{"type": "Ready", "status": "True"}]}
            write_overlay(world.status, "Pod", "shop", "waypoint-0", {"status": ready})
            await world.until(lambda: world.condition("Programmed").startswith("True"))
            obj = world.gateway()
            assert obj is not None
            assert obj.status["addresses"] == [
                {"type": "IPAddress", "value": "10.96.1.7"},
                {"type": "IPAddress", "value": "fd00::7"},
                {"type": "Hostname", "value": "waypoint.shop.svc.cluster.local"},
            ]
            (world.source / "gateway.yaml").unlink()
            await world.until(lambda: world.deployed_objects() == set())
            assert not list(world.deployed.glob("*.json"))
            assert not list(world.status.glob("gateway_*"))

    run(tmp_path, check)


def test_what_was_deployed_before_a_restart_and_has_no_gateway_any_more_goes(tmp_path: Path) -> None:
    async def check(world: World) -> None:
        world.write("gateway.yaml", GATEWAY)
        async with running(world):
            await world.until(lambda: world.deployed_objects() == ALL)
        (world.source / "gateway.yaml").unlink()
        async with running(world):
            await world.until(lambda: world.deployed_objects() == set())

    run(tmp_path, check)


def test_the_users_own_object_of_that_name_stays_and_is_the_reason(tmp_path: Path) -> None:
    async def check(world: World) -> None:
        mine = "apiVersion: v1\nkind: Service\nmetadata: {name: waypoint, namespace: shop}\nspec: {ports: [{port: 80}]}\n"
        world.write("mine.yaml", mine)
        world.write("gateway.yaml", GATEWAY)
        async with running(world):
            await world.until(lambda: "somebody else's" in world.condition("Programmed"))
            assert world.deployed_objects() == {("Service", "waypoint")}

    run(tmp_path, check)


def test_a_config_map_says_how_many_pods(tmp_path: Path) -> None:
    async def check(world: World) -> None:
        def asking_for(replicas: int) -> str:
            options = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: options, namespace: shop}\n"
            data = f"data: {{deployment: 'spec: {{replicas: {replicas}}}'}}\n"
            return f"{GATEWAY}  infrastructure: {{parametersRef: {{kind: ConfigMap, name: options}}}}\n---\n{options}{data}"

        world.write("gateway.yaml", asking_for(2))
        async with running(world):
            await world.until(lambda: world.deployed_objects() == ALL | {("Pod", "waypoint-1")})
            world.write("gateway.yaml", asking_for(1))
            await world.until(lambda: world.deployed_objects() == ALL)

    run(tmp_path, check)


def test_gateways_whose_names_begin_alike_do_not_lose_each_others_files(tmp_path: Path) -> None:
    async def check(world: World) -> None:
        world.write("gateway.yaml", GATEWAY)
        world.write("other.yaml", GATEWAY.replace("name: waypoint,", "name: waypoint-0,"))
        async with running(world):
            both = ALL | {("Pod", "waypoint-0-0"), ("Service", "waypoint-0"), ("ServiceAccount", "waypoint-0")}
            await world.until(lambda: world.deployed_objects() == both)
            (world.source / "gateway.yaml").unlink()
            await world.until(lambda: world.deployed_objects() == both - ALL)

    run(tmp_path, check)


def test_a_status_is_a_merge_patch_beside_the_users_file(tmp_path: Path) -> None:
    async def check(world: World) -> None:
        world.write("gateway.yaml", GATEWAY)
        async with running(world):
            await world.until(lambda: "address pending" in world.condition("Programmed"))  # the last that it says here
            before = json.loads((world.status / "gateway_shop_waypoint.json").read_text())
            await trio.sleep(0.3)
            assert json.loads((world.status / "gateway_shop_waypoint.json").read_text()) == before
            assert (world.source / "gateway.yaml").read_text() == GATEWAY

    run(tmp_path, check)
