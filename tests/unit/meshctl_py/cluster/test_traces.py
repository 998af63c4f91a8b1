"""What the control plane wrote all over a cluster is found and taken away, with the rest of the mesh and without; never another mesh's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import ClusterAccess
from mesh.kube.ownership import DEPLOYED, LISTS, STATUS_MANAGERS
from mesh.kube.resources import RESOURCES
from mesh.testing.kube import FakeApiServer, Seen
from meshctl_py.cluster.manifests import PART_OF, PROJECT, Manifests, load_manifests
from meshctl_py.cluster.traces import Traces, find_traces, remove_traces
from meshctl_py.cluster.uninstall import Removal, describe, plan_removal, release_pods, remove_rest

OURS = {PART_OF: PROJECT}
MANAGED = {"gateway.istio.io/managed": "istio.io-mesh-controller", "gateway.networking.k8s.io/gateway-name": "front"}
CONTROL_PLANE = {"kind": "Deployment", "apiVersion": "apps/v1", "metadata": {"name": "istiod", "namespace": "istio-system", "labels": OURS}}


def run(test: Callable[[FakeApiServer, ApiClient], Awaitable[None]]) -> None:
    async def main() -> None:
        server = FakeApiServer()
        client = ApiClient(ClusterAccess("kubernetes", 443, tls=False), connect=server.connect)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            await test(server, client)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def by(*managers: str, subresource: str = "") -> list[dict[str, str]]:
    return [{"manager": manager, "operation": "Apply", "subresource": subresource} for manager in managers]


def put(server: FakeApiServer, kind: str, namespace: str, name: str, *, status: Mapping[str, Any] | None = None, **metadata: Any) -> None:
    head = {"name": name, **({"namespace": namespace} if namespace else {}), **metadata}
    server.put({"kind": kind, "metadata": head, **({"status": status} if status is not None else {})})


def put_waypoint(server: FakeApiServer, namespace: str = "shop") -> None:
    """With its Gateway and its class, as the control plane makes them."""
    put(server, "Gateway", namespace, "front", managedFields=by("istio.io/mesh-controller", subresource="status"))
    for resource in DEPLOYED:
        put(server, resource.kind, namespace, "front", labels=MANAGED)
    spec = {"controllerName": "istio.io/mesh-controller"}
    managers = [*by("ambient-mesh"), *by("istio-status", subresource="status")]
    server.put({"kind": "GatewayClass", "metadata": {"name": "istio-waypoint", "managedFields": managers}, "spec": spec})


def put_root_map(server: FakeApiServer, namespace: str, manager: str = "istiod-py") -> None:
    put(server, "ConfigMap", namespace, "istio-ca-root-cert", managedFields=by(manager))


async def plan(client: ApiClient, *objects: dict[str, Any]) -> Removal | None:
    return await plan_removal(client, Manifests(objects, ""), purge=False)


def names(server: FakeApiServer) -> set[tuple[str, str, str]]:
    return set(server.objects)


def changes(server: FakeApiServer) -> list[Seen]:
    return [seen for seen in server.requests if seen.method != "GET"]


def withdrawals(server: FakeApiServer) -> set[tuple[str, str]]:
    """Path and field manager of what was applied without a status."""
    return {(seen.path, seen.query["fieldManager"]) for seen in server.requests if seen.method == "PATCH" and "status" not in seen.body}


def test_root_maps_are_left_when_the_rest_is_gone_and_go() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        for namespace in ("shop", "bank"):
            put_root_map(server, namespace)
        put_root_map(server, "istios", "pilot-discovery")
        removal = await plan(client, CONTROL_PLANE)
        assert removal is not None
        assert list(describe(removal)) == [
            "The mesh itself is not installed. This removes what it left behind.",
            "The root certificate goes from 2 namespaces.",
        ]
        told: dict[str, str] = {}
        assert await remove_rest(client, removal, 10, told.__setitem__) == []
        assert told == {"configmap/istio-ca-root-cert": "deleted in 2 namespaces"}
        assert names(server) == {("configmaps", "istios", "istio-ca-root-cert")}
        assert await plan(client, CONTROL_PLANE) is None

    run(check)


def test_waypoints_go_with_all_that_runs_them_and_what_users_wrote_stays() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        put_waypoint(server)
        put_waypoint(server, "bank")
        put(server, "Deployment", "shop", "web")
        put(server, "Service", "shop", "east-west", labels={"gateway.istio.io/managed": "istio.io-eastwest-controller"})
        removal = await plan(client)
        assert removal is not None
        assert "2 waypoints go, and nothing enforces their policies any more (bank/front, shop/front)." in list(describe(removal))
        told: list[tuple[str, str]] = []
        assert await remove_rest(client, removal, 10, lambda *what: told.append(what)) == []
        assert names(server) == {
            ("gateways", "shop", "front"),
            ("gateways", "bank", "front"),
            ("deployments", "shop", "web"),
            ("services", "shop", "east-west"),
        }
        assert ("deployment.apps/front", "deleted in namespace shop") in told
        assert ("gatewayclass.gateway.networking.k8s.io/istio-waypoint", "deleted") in told

    run(check)


def test_a_class_that_somebody_else_made_or_changed_stays() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        spec = {"controllerName": "istio.io/mesh-controller"}
        for managers in (by("pilot-discovery"), by("ambient-mesh", "kubectl-edit")):
            server.put({"kind": "GatewayClass", "metadata": {"name": "istio-waypoint", "managedFields": managers}, "spec": spec})
            assert not await find_traces(client)

    run(check)


def test_waypoints_go_after_the_control_plane_which_may_make_more_until_it_ends() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.put(CONTROL_PLANE)
        pod = {"name": "istiod-1", "namespace": "istio-system", "labels": {"app": "istiod"}}
        server.put({"kind": "Pod", "metadata": pod, "spec": {"nodeName": "n1"}})
        put_waypoint(server)
        put_root_map(server, "shop")
        removal = await plan(client, CONTROL_PLANE)
        assert removal is not None
        assert next(iter(describe(removal))) == "This removes the mesh: 1 objects."

        async def end_control_plane() -> None:
            await trio.sleep(5)
            assert server.find("Deployment", "shop", "front") is not None
            put_waypoint(server, "late")
            put_root_map(server, "late")
            server.remove("Pod", "istio-system", "istiod-1")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_control_plane)
            assert await remove_rest(client, removal, 10, lambda name, what: None) == []
        assert names(server) == {("gateways", "shop", "front"), ("gateways", "late", "front")}
        changed = [seen.path for seen in changes(server)]
        assert changed[0] == "/apis/apps/v1/namespaces/istio-system/deployments/istiod"
        assert all(path.endswith("/istio-ca-root-cert") for path in changed[-2:])

    run(check)


@pytest.mark.parametrize("kind", sorted(STATUS_MANAGERS))
def test_our_words_are_withdrawn_from_the_status_of_every_kind(kind: str) -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        resource = RESOURCES[kind]
        namespace = "shop" if resource.namespaced else ""
        owners = sorted(STATUS_MANAGERS[kind])
        put(server, kind, namespace, "ours", managedFields=[*by(*owners, "somebody", subresource="status"), *by("kubectl")])
        put(server, kind, namespace, "others", managedFields=[*by("somebody", subresource="status"), *by(*owners)])
        traces = await find_traces(client)
        told: dict[str, str] = {}
        await remove_traces(client, traces, told.__setitem__)
        assert withdrawals(server) == {(resource.path(namespace, "ours", "status"), owner) for owner in owners}
        assert len(changes(server)) == len(owners)
        assert told == {"our words": "withdrawn from the status of 1 objects"}

    run(check)


def test_the_control_plane_may_write_to_the_status_of_these_kinds_and_deploy_these_and_no_others() -> None:
    (role,) = (obj for obj in load_manifests().objects if (obj["kind"], obj["metadata"]["name"]) == ("ClusterRole", "ambient-mesh-istiod"))
    rights = {(name, verb) for rule in role["rules"] for name in rule["resources"] for verb in rule["verbs"]}
    assert {f"{RESOURCES[kind].plural}/status" for kind in STATUS_MANAGERS} == {name for name, _ in rights if name.endswith("/status")}
    assert {resource.plural for resource in DEPLOYED} == {name for name, verb in rights if verb == "delete"}


@pytest.mark.parametrize("kind", sorted(LISTS))
def test_what_other_controllers_say_of_a_route_is_kept(kind: str) -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        ours, theirs = {"controllerName": "istio.io/mesh-controller"}, {"controllerName": "example.net/gateways"}
        status = {LISTS[kind]: [ours, theirs]}
        put(server, kind, "shop", "web", status=status, managedFields=by("istio-status", subresource="status"))
        await remove_traces(client, await find_traces(client), lambda name, what: None)
        found = server.find(kind, "shop", "web")
        assert found is not None
        assert found["status"] == {LISTS[kind]: [theirs]}
        assert not await find_traces(client), "there is nothing more to do"

    run(check)


def test_kinds_that_nobody_serves_and_older_versions_of_them() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        server.faults.absent_groups.add("networking.istio.io")
        routes = RESOURCES["TLSRoute"]
        server.served[server.served.index(routes)] = routes.at("v1alpha2")
        put(server, "TLSRoute", "shop", "web", managedFields=by("istio-status", subresource="status"))
        await remove_traces(client, await find_traces(client), lambda name, what: None)
        path = "/apis/gateway.networking.k8s.io/v1alpha2/namespaces/shop/tlsroutes/web/status"
        assert withdrawals(server) == {(path, "istio-status")}

    run(check)


def test_a_status_that_is_refused_is_told_and_holds_nothing_up() -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        put(server, "Service", "shop", "web", managedFields=by("istio-ambient-service", subresource="status"))
        put_root_map(server, "shop")
        traces = await find_traces(client)
        server.faults.refusals.append((422, "Invalid", {}))
        told: dict[str, str] = {}
        assert await remove_traces(client, traces, told.__setitem__) == [
            "the status of Service shop/web still has our words: refused: Invalid"
        ]
        assert told == {"configmap/istio-ca-root-cert": "deleted in 1 namespaces"}

    run(check)


ISTIOS = {
    "its control plane, wherever it is": ("Deployment", "istio-1-26", "istiod-1-26", {"app": "istiod"}),
    "its agents": ("DaemonSet", "istio-system", "ztunnel", {}),
    "the service of a control plane that is outside the cluster": ("Service", "istio-system", "istiod", {}),
}


@pytest.mark.parametrize(("kind", "namespace", "name", "labels"), ISTIOS.values(), ids=ISTIOS)
def test_another_mesh_keeps_its_waypoints_statuses_and_agents(kind: str, namespace: str, name: str, labels: Mapping[str, str]) -> None:
    async def check(server: FakeApiServer, client: ApiClient) -> None:
        put(server, kind, namespace, name, labels=labels)
        put_waypoint(server)
        put_root_map(server, "shop")
        assert await plan(client, CONTROL_PLANE) is None
        role = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "ours", "namespace": "istio-system", "labels": OURS}}
        server.put(role)
        before = names(server)
        removal = await plan(client, role)
        assert removal is not None
        assert removal.traces == Traces()
        assert f"There is another mesh: {kind} {namespace}/{name}. Waypoints, statuses and root certificates are left to it." in list(
            describe(removal)
        )
        if kind == "DaemonSet":
            assert await release_pods(client, 10, lambda pending: None) == []
        left = await remove_rest(client, removal, 10, lambda name, what: None)
        assert left == [
            f"waypoints, statuses and root certificates are left to another mesh, which goes by the same names: {kind} {namespace}/{name}"
        ]
        assert before - names(server) == {("deployments", "istio-system", "ours")}
        assert not withdrawals(server)

    run(check)
