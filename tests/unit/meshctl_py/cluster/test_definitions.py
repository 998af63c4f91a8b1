"""CustomResourceDefinitions: ours are installed and taken into service first, Istio's own are nobody's to touch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import ClusterAccess
from mesh.kube.resources import Resource
from mesh.testing.kube import FakeApiServer
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.install import Plan, apply_plan, in_order
from meshctl_py.cluster.manifests import PART_OF, PROJECT, Manifests
from meshctl_py.cluster.uninstall import Removal, plan_removal, remove_rest

CRDS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False)
NAME = "authorizationpolicies.security.istio.io"
SERVED = {"conditions": [{"type": "Established", "status": "True"}]}


def definition(**fields: Any) -> dict[str, Any]:
    names = {"plural": "authorizationpolicies", "kind": "AuthorizationPolicy"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME, "labels": {PART_OF: PROJECT}},
        "spec": {"group": "security.istio.io", "names": names, "versions": [{"name": "v1", "storage": True}]},
        **fields,
    }


def namespace() -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "istio-system", "labels": {PART_OF: PROJECT}}}


def run(test: Callable[[FakeApiServer, ApiClient], Awaitable[None]]) -> None:
    async def main() -> None:
        server = FakeApiServer()
        server.served.append(CRDS)
        server.establishes = False
        client = ApiClient(ClusterAccess("kubernetes", 443, tls=False), connect=server.connect)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            await test(server, client)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def install(client: ApiClient, *objects: dict[str, Any]) -> dict[str, str]:
    told: dict[str, str] = {}
    await apply_plan(client, Plan(in_order(objects), {}), told.__setitem__)
    return told


async def plan(client: ApiClient, *, purge: bool) -> Removal:
    found = await plan_removal(client, Manifests((definition(), namespace()), ""), purge=purge)
    assert found is not None
    return found


def test_ours_is_applied_before_all_else_and_waited_for() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        async def take_into_service() -> None:
            await server.wait_until(lambda: server.find("CustomResourceDefinition", "", NAME) is not None)
            server.put(definition(status={"conditions": None}))  # so it is for a moment on a real API server
            await trio.sleep(5)
            server.put(definition(status=SERVED))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_into_service)
            told = await install(client, definition(), namespace())
        assert told[f"customresourcedefinition.apiextensions.k8s.io/{NAME}"] == "created"
        assert trio.current_time() >= 5

    run(check)


def test_one_that_is_never_served_is_an_error() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        with pytest.raises(ClusterProblem, match=f"{NAME} was not taken into service within 30 s"):
            await install(client, definition())

    run(check)


def test_istios_own_is_left_alone_at_installation_and_by_a_purge() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.put(definition(metadata={"name": NAME, "labels": {"chart": "istio"}}, status=SERVED))
        before = server.find("CustomResourceDefinition", "", NAME)
        told = await install(client, definition(), namespace())
        assert told[f"customresourcedefinition/{NAME}"] == "left alone: it is Istio's own"
        assert (await plan(client, purge=True)).crds == ()
        assert server.find("CustomResourceDefinition", "", NAME) == before

    run(check)


def test_a_purge_tells_how_many_objects_go_with_ours_and_without_it_they_stay() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        await install(client, definition(status=SERVED), namespace())
        for name in ("a", "b"):
            server.put({"kind": "AuthorizationPolicy", "metadata": {"name": name, "namespace": "shop"}})
        assert (await plan(client, purge=False)).crds == ()
        purge = await plan(client, purge=True)
        assert purge.custom == {NAME: 2}
        await remove_rest(client, purge, 10, lambda name, what: None)
        assert server.find("CustomResourceDefinition", "", NAME) is None

    run(check)
