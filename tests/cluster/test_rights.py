"""The mesh's programs use all the rights that the manifests give them, and ask for no others: by the API server's audit log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from mesh.kube.api import ApiClient, ApiError
from mesh.kube.kubeconfig import ClusterAccess, find_access
from tests.cluster.control import request_token
from tests.cluster.harness.api import condition, path_of
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.mesh import SYSTEM, agent_of, install, kustomized, label, remove, wait_captured, wait_rolled_out
from tests.cluster.waypoints import apply, conditions_of, gateway, overlay, rules
from tests.cluster.workloads import apply_pods, echo_pod

NAMESPACE = "rights"


DECISION = "authorization.k8s.io/decision"
"""The audit log's annotation with what authorization said of a request, apart from what came of it."""


class Right(NamedTuple):
    account: str
    verb: str
    group: str
    resource: str


SELDOM = {
    Right("istiod", "update", "", "secrets"): "the root is renewed when a fifth of its ten years is left",
    Right("ztunnel-cni", "get", "", "pods"): "by the CNI plugin while no agent answers it: test_capture.py",
    Right("ztunnel-cni", "get", "", "namespaces"): "likewise",
    Right("istiod", "get", "", "nodes"): "when a node has the taint that says it waits for its agent: test_capture.py",
    Right("istiod", "patch", "", "nodes"): "likewise",
    Right("ztunnel", "patch", "", "events"): "when the same is to be told of a pod again",
}
"""Rights that nothing here makes use of, and when they are used."""


def granted() -> set[Right]:
    """By the manifests, to the accounts of the mesh."""
    found = kustomized()
    rights: set[Right] = set()
    for (kind, namespace, _), binding in found.items():
        if not kind.endswith("RoleBinding"):
            continue
        role = found[binding["roleRef"]["kind"], namespace if binding["roleRef"]["kind"] == "Role" else "", binding["roleRef"]["name"]]
        for subject in binding["subjects"]:
            assert (subject["kind"], subject["namespace"]) == ("ServiceAccount", SYSTEM)
            for rule in role["rules"]:
                rights |= {
                    Right(subject["name"], verb, group, resource)
                    for verb in rule["verbs"]
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                }
    return rights


def audited(cluster: Cluster) -> list[dict[str, Any]]:
    """All requests so far by accounts of the mesh's namespace."""
    return [json.loads(line) for line in cluster.home.audit.read_text().splitlines() if line.endswith("}")]


def used(event: dict[str, Any]) -> Iterator[Right]:
    reference = event["objectRef"]
    resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
    account = event["user"]["username"].rpartition(":")[2]
    yield Right(account, event["verb"], reference.get("apiGroup", ""), resource)
    if event["verb"] == "patch" and event["responseStatus"]["code"] == 201:  # server-side apply of what was not there
        yield Right(account, "create", reference.get("apiGroup", ""), resource)


def lacks_right(event: dict[str, Any]) -> bool:
    """Whether a request was refused for want of a right. What would be made in a namespace that is going away is refused with 403 too, by
    an admission plugin, after authorization has allowed it."""
    return bool(event["responseStatus"].get("code") == HTTPStatus.FORBIDDEN and event["annotations"].get(DECISION) != "allow")


def use_waypoint(cluster: Cluster, namespace: str) -> None:
    """One that is deployed with all there can be, stands before something of each kind, and is renamed, which removes what it had."""
    cluster.api.patch(path_of("Namespace", namespace), {"metadata": {"labels": {"istio.io/use-waypoint": "waypoint"}}})
    objects = rules(namespace)
    apply(cluster.api, overlay("more", namespace, podDisruptionBudget={"spec": {"minAvailable": 1}}, horizontalPodAutoscaler={}))
    for obj in (waypoint := gateway("waypoint", namespace, "more"), *objects):
        apply(cluster.api, obj)
    wait_until(lambda: conditions_of(cluster.api, waypoint).get("Programmed") == ("True", "Programmed"), "the waypoint is programmed")
    wait_until(lambda: all(conditions_of(cluster.api, obj) for obj in objects), "everything has a status")
    apply(cluster.api, gateway("waypoint", namespace, "more", name_override="other", service_account="other"))
    wait_until(lambda: cluster.api.find("Deployment", "waypoint", namespace) is None, "what it had under its former name is gone")


def test_no_right_is_given_that_is_not_used_and_none_is_asked_for_that_is_not_given(cluster: Cluster, tmp_path: Path) -> None:
    remove(cluster, tmp_path)
    start = len(audited(cluster))
    install(cluster, tmp_path)
    policy = {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["nowhere"]}}]}]}
    path = f"/apis/security.istio.io/v1/namespaces/{NAMESPACE}/authorizationpolicies"
    with cluster.namespace(NAMESPACE) as namespace:
        label(cluster, namespace)
        on_the_host = echo_pod("on-the-host", "n2", probe=False)
        on_the_host["spec"]["hostNetwork"] = True
        apply_pods(cluster, namespace, echo_pod("one", "n1"), on_the_host)
        use_waypoint(cluster, namespace)
        wait_captured(cluster, namespace, 1)
        body = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "nobody"}, "spec": policy}
        cluster.api.create(path, body)
        wait_until(lambda: condition(cluster.api.get(f"{path}/nobody"), "ZtunnelAccepted"), "the policy is in force")
        cluster.api.patch(path_of("Node", "n1"), {"spec": {"taints": [{"key": "cni.istio.io/not-ready", "effect": "NoSchedule"}]}})
        # Whatever programs ask for when they start and when they end.
        cluster.api.delete(path_of("Pod", agent_of(cluster, "n1")["metadata"]["name"], SYSTEM))
        for pod in cluster.api.list("Pod", SYSTEM, labelSelector="app=istiod"):
            cluster.api.delete(path_of("Pod", pod["metadata"]["name"], SYSTEM))
        wait_rolled_out(cluster)
        cluster.api.delete(f"{path}/nobody")
    wanted = granted() - SELDOM.keys()
    assert SELDOM.keys() <= granted()

    def seen() -> set[Right]:
        return {right for event in audited(cluster)[start:] for right in used(event)}

    with suppress(AssertionError):
        wait_until(lambda: wanted <= seen(), "all are used", 30)
    assert wanted - seen() == set()
    refused = [event for event in audited(cluster)[start:] if lacks_right(event)]
    assert [(event["user"]["username"], event["verb"], event["requestURI"], event["responseStatus"]) for event in refused] == []
    assert seen() <= granted()


def test_a_request_without_a_right_is_told_from_one_that_is_too_late(mesh: Cluster, tmp_path: Path) -> None:
    """The control plane itself makes the second kind now and then, when the namespace of a ConfigMap is on its way out."""
    start = len(audited(mesh))
    (tmp_path / "token").write_text(request_token(mesh, SYSTEM, "istiod", audience=""))
    admin = find_access(str(mesh.kubeconfig))
    access = ClusterAccess(admin.host, admin.port, ca_pem=admin.ca_pem, token_file=tmp_path / "token")
    held = path_of("ConfigMap", "held", "ending")
    lacking, late = "/api/v1/namespaces/ending/serviceaccounts/default/token", "/api/v1/namespaces/ending/configmaps"

    async def ask() -> None:
        client = ApiClient(access)
        for path in (lacking, late):
            with pytest.raises(ApiError) as refusal:
                await client.create(path, {"metadata": {"name": "late"}})
            assert refusal.value.status == HTTPStatus.FORBIDDEN
        await client.aclose()

    with mesh.namespace("ending"):
        mesh.api.create(late, {"metadata": {"name": "held", "finalizers": ["example.org/held"]}})
    try:
        wait_until(lambda: "deletionTimestamp" in mesh.api.get(path_of("Namespace", "ending"))["metadata"], "the namespace is ending")
        trio.run(ask)
    finally:
        mesh.api.patch(held, {"metadata": {"finalizers": None}})

    def found() -> dict[str, bool]:
        return {event["requestURI"]: lacks_right(event) for event in audited(mesh)[start:] if event["requestURI"] in (lacking, late)}

    wait_until(lambda: len(found()) == 2, "both are in the audit log")
    assert found() == {lacking: True, late: False}
