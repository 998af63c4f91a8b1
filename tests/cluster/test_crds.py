"""Our CustomResourceDefinitions on a real API server: it takes what our parsers take, and refuses mistakes with the field's path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mesh.kube.crds import MANAGED_BY, is_ours, make_definition, make_definitions
from mesh.kube.resources import RESOURCES
from tests.cluster.harness.api import Api, ApiRefused, Object
from tests.cluster.harness.client import Cluster, wait_until
from tests.corpus import EXAMPLES, MESH, Mistake, read_manifests, read_mistakes

GROUPS = (".istio.io", "gateway.networking.k8s.io")
CUSTOM = [kind for kind, resource in RESOURCES.items() if resource.group.endswith(GROUPS) and resource.namespaced]
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    install_definitions(cluster)
    with cluster.namespace("shop") as name:
        yield name


def install_definitions(cluster: Cluster) -> None:
    """Install ours, and wait until the API server serves them."""
    for name, definition in make_definitions().items():
        path = f"{DEFINITIONS}/{name}?fieldManager=tests&force=true"
        cluster.api.request("PATCH", path, definition, "application/apply-patch+yaml")

    def established() -> bool:
        found = [cluster.api.get(f"{DEFINITIONS}/{name}") for name in make_definitions()]
        return all(is_established(definition) for definition in found)

    wait_until(established, "the definitions are established")
    wait_until(lambda: all(served(cluster.api, kind) for kind in CUSTOM), "their kinds are served")


def is_established(definition: Object) -> bool:
    conditions = definition.get("status", {}).get("conditions", ())
    return any(condition["type"] == "Established" and condition["status"] == "True" for condition in conditions)


def served(api: Api, kind: str) -> bool:
    try:
        api.get(RESOURCES[kind].collection("shop"))
    except ApiRefused:
        return False
    return True


def post(api: Api, manifest: dict[str, Any], *, version: str = "", **query: str) -> Object:
    """Create as kubectl does, dry: fields that nobody knows are refused."""
    resource = RESOURCES[manifest["kind"]]
    path = resource.collection("shop")
    body = {**manifest, "metadata": {**manifest["metadata"], "namespace": "shop"}}
    if version:
        path, body["apiVersion"] = path.replace(f"/{resource.version}/", f"/{version}/"), f"{resource.group}/{version}"
    options = {"fieldValidation": "Strict", "dryRun": "All", **query}
    return api.create(f"{path}?{'&'.join(f'{key}={value}' for key, value in options.items())}", body)


@pytest.mark.parametrize("mistake", [mistake for mistake in read_mistakes() if mistake.api_field], ids=str)
def test_a_mistake_is_refused_with_its_path(cluster: Cluster, namespace: str, mistake: Mistake) -> None:
    with pytest.raises(ApiRefused) as refusal:
        post(cluster.api, mistake.manifest)
    assert refusal.value.status in (400, 422)
    assert mistake.api_field in str(refusal.value)


@pytest.mark.parametrize("mistake", [mistake for mistake in read_mistakes() if not mistake.api_field], ids=str)
def test_what_only_the_parser_refuses_reaches_it_as_it_was_written(cluster: Cluster, namespace: str, mistake: Mistake) -> None:
    assert post(cluster.api, mistake.manifest)["spec"] == mistake.spec


def good() -> list[dict[str, Any]]:
    return [manifest for manifest in read_manifests(*sorted(EXAMPLES.rglob("*.yaml")), MESH) if manifest["kind"] in CUSTOM]


@pytest.mark.parametrize("manifest", good(), ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}")
def test_what_is_right_is_taken_in_every_version_and_nothing_of_it_is_lost(
    cluster: Cluster, namespace: str, manifest: dict[str, Any]
) -> None:
    versions = [version["name"] for version in make_definition(manifest["kind"])["spec"]["versions"]]
    assert len(versions) > 1
    for version in versions:
        assert post(cluster.api, manifest, version=version).get("spec") == manifest.get("spec")


def test_a_status_is_written_beside_others_and_never_with_the_spec(cluster: Cluster, namespace: str) -> None:
    resource = RESOURCES["AuthorizationPolicy"]
    head = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": "one", "namespace": namespace}}
    conditions = {name: {"type": name, "status": "True", "reason": "Accepted", "observedGeneration": "1"} for name in "AB"}
    created = cluster.api.create(resource.collection(namespace), {**head, "spec": {}, "status": {"conditions": [conditions["A"]]}})
    assert "status" not in created
    for name, condition in conditions.items():
        body = {**head, "status": {"conditions": [condition]}}
        path = f"{resource.path(namespace, 'one', 'status')}?fieldManager=writer-of-{name.lower()}&force=true"
        found = cluster.api.request("PATCH", path, body, "application/apply-patch+yaml")
    assert found["status"]["conditions"] == list(conditions.values())
    cluster.api.delete(resource.path(namespace, "one"))


def test_kubectl_shows_them_by_short_name_with_their_columns(cluster: Cluster, namespace: str) -> None:
    manifests = "---".join(
        f"""
apiVersion: {RESOURCES[kind].api_version}
kind: {kind}
metadata: {{name: shown, namespace: {namespace}}}
spec: {spec}
"""
        for kind, spec in (
            ("AuthorizationPolicy", "{action: DENY, rules: [{}]}"),
            ("PeerAuthentication", "{mtls: {mode: STRICT}}"),
            ("ServiceEntry", "{hosts: [a.example.com], location: MESH_INTERNAL, resolution: DNS}"),
            ("WorkloadEntry", "{address: 192.0.2.1}"),
            ("VirtualService", "{hosts: [b.example.com], gateways: [mesh], http: [{route: [{destination: {host: b.example.com}}]}]}"),
        )
    )
    cluster.apply(manifests)
    try:
        expected = {"ap": "DENY", "pa": "STRICT", "se": "a.example.com MESH_INTERNAL DNS", "we": "192.0.2.1", "vs": "b.example.com mesh"}
        for short, words in expected.items():
            shown = cluster.kubectl("get", "-n", namespace, short, "shown")
            assert all(word in shown for word in words.split()), shown
    finally:
        cluster.kubectl("delete", "-f", "-", stdin=manifests)


def test_definitions_of_somebody_else_are_told_and_server_side_apply_does_not_take_them_over(cluster: Cluster, namespace: str) -> None:
    name = str(RESOURCES["WorkloadEntry"])
    path = f"{DEFINITIONS}/{name}"
    assert is_ours(cluster.api.get(path))
    theirs = make_definition("WorkloadEntry")
    theirs["metadata"]["labels"] = {"app": "istio-pilot"}
    theirs["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    cluster.api.delete(path)
    wait_until(lambda: not defined(cluster.api, path), "the definition is gone")
    try:
        cluster.api.request("PATCH", f"{path}?fieldManager=istioctl", theirs, "application/apply-patch+yaml")
        assert not is_ours(cluster.api.get(path))
        text = json.dumps(make_definition("WorkloadEntry"))
        refused = cluster.kubectl("apply", "--server-side", "-f", "-", stdin=text, check=False)
        assert refused == ""
        found = cluster.api.get(path)
        assert MANAGED_BY not in found["metadata"]["labels"]
        assert "properties" not in found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    finally:
        cluster.api.delete(path)
        wait_until(lambda: not defined(cluster.api, path), "the definition is gone")
        install_definitions(cluster)


def defined(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except ApiRefused as exc:
        if exc.status == 404:
            return False
        raise
    return True
