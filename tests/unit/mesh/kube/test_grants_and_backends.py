"""ReferenceGrants, BackendTLSPolicies, ConfigMaps and Secrets."""

from __future__ import annotations

from typing import Any

import pytest
from ruamel.yaml import YAML

from mesh.kube.backendtlspolicy import AuthorityRef, BackendTarget, read_backend_tls_policy
from mesh.kube.checked import check_object
from mesh.kube.objects import KubeObject, Layer, ObjectKey, Origin
from mesh.kube.prune import prune
from mesh.kube.referencegrant import GrantedFrom, GrantedTo, is_granted, read_reference_grant
from mesh.kube.resources import RESOURCES
from mesh.kube.secret import read_secret


def made(kind: str, text: str, namespace: str = "shop") -> KubeObject:
    raw: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return check_object(RESOURCES[kind].api_version, ObjectKey(kind, namespace, "x"), raw, (Layer(Origin("x", 0, 1), raw),))


def mistakes(kind: str, text: str) -> list[str]:
    return [f"{problem.field}: {problem.message}" for problem in made(kind, text).problems]


ROUTE = GrantedFrom("gateway.networking.k8s.io", "HTTPRoute", "web")
GRANT = "{spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: web}], to: [%s]}}"


@pytest.mark.parametrize(("to", "source", "target", "granted"), [
    ("{group: '', kind: Service}", ROUTE, GrantedTo("", "Service", "a"), True),
    ("{group: '', kind: Service, name: a}", ROUTE, GrantedTo("", "Service", "a"), True),
    ("{group: '', kind: Service, name: b}", ROUTE, GrantedTo("", "Service", "a"), False),
    ("{group: '', kind: Secret}", ROUTE, GrantedTo("", "Service", "a"), False),
    ("{group: other, kind: Service}", ROUTE, GrantedTo("", "Service", "a"), False),
    ("{group: '', kind: Service}", GrantedFrom(ROUTE.group, "TCPRoute", "web"), GrantedTo("", "Service", "a"), False),
    ("{group: '', kind: Service}", GrantedFrom(ROUTE.group, "HTTPRoute", "else"), GrantedTo("", "Service", "a"), False),
    ("{group: '', kind: Service}", GrantedFrom(ROUTE.group, "TCPRoute", "shop"), GrantedTo("", "Service", "a"), True),
])  # fmt: skip
def test_a_grant_is_for_what_it_names_and_no_more(to: str, source: GrantedFrom, target: GrantedTo, granted: bool) -> None:
    grant, problems = read_reference_grant(made("ReferenceGrant", GRANT % to))
    assert problems == ()
    assert is_granted([grant], source, "shop", target) == granted
    assert is_granted([], source, "shop", target) == (source.namespace == "shop")
    assert not is_granted([grant], source, "third", target)


@pytest.mark.parametrize(("text", "mistake"), [
    ("{spec: {}}", "spec: 'from' is required"),
    ("{spec: {from: [], to: []}}", "spec.from: a grant says from where"),
    ("{spec: {from: [{group: a, kind: b}], to: [{group: '', kind: c}]}}", "spec.from[0]: 'namespace' is required"),
    ("{spec: {from: [{group: a, kind: b, namespace: ''}], to: [{group: '', kind: c}]}}", "spec.from[0].namespace: is empty"),
    ("{spec: {from: [{group: a, kind: b, namespace: c}], to: [{group: ''}]}}", "spec.to[0]: 'kind' is required"),
    ("{spec: {from: [{group: a, kind: b, namespace: c}], to: [{group: '', kind: c, namespace: d}]}}", "spec.to[0].namespace: unknown"),
])  # fmt: skip
def test_a_grant_with_a_mistake_is_not_for_use(text: str, mistake: str) -> None:
    assert any(found.startswith(mistake) for found in mistakes("ReferenceGrant", text)), mistakes("ReferenceGrant", text)


def test_every_field_of_a_backend_policy_is_read() -> None:
    policy, problems = read_backend_tls_policy(
        made(
            "BackendTLSPolicy",
            """
spec:
  targetRefs:
  - {group: '', kind: Service, name: web, sectionName: https}
  - {group: networking.istio.io, kind: ServiceEntry, name: api}
  validation:
    hostname: web.example.com
    caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]
    subjectAltNames: [{type: Hostname, hostname: '*.example.com'}, {type: URI, uri: 'spiffe://x/y'}]
  options: {example.com/a: b}
""",
        )
    )
    assert problems == ()
    assert policy.targets == (BackendTarget("", "Service", "web", "https"), BackendTarget("networking.istio.io", "ServiceEntry", "api", ""))
    assert [target.is_known for target in policy.targets] == [True, True]
    assert policy.authorities == (AuthorityRef("", "ConfigMap", "ca"),)
    assert (policy.hostname, policy.names, policy.uris) == ("web.example.com", ("*.example.com",), ("spiffe://x/y",))
    assert (policy.system_roots, policy.options) == (False, {"example.com/a": "b"})


VALID = "validation: {hostname: a.b, wellKnownCACertificates: System}"
SAN = "validation: {hostname: a.b, wellKnownCACertificates: System, subjectAltNames: [%s]}"
TARGET = "targetRefs: [{group: '', kind: Service, name: web}]"


@pytest.mark.parametrize(("spec", "mistake"), [
    (VALID, "spec: 'targetRefs' is required"),
    (f"targetRefs: [], {VALID}", "spec.targetRefs: name what the policy is for"),
    (TARGET, "spec: 'validation' is required"),
    (f"{TARGET}, validation: {{hostname: a.b}}", "spec.validation.caCertificateRefs: somebody must vouch"),
    (f"{TARGET}, validation: {{hostname: '*.b', wellKnownCACertificates: System}}", "spec.validation.hostname: expected a hostname"),
    (f"{TARGET}, validation: {{wellKnownCACertificates: System}}", "spec.validation: 'hostname' is required"),
    (f"{TARGET}, validation: {{hostname: a, wellKnownCACertificates: System, caCertificateRefs: [{{group: '', kind: C, name: n}}]}}",
     "spec.validation.wellKnownCACertificates: give caCertificateRefs or"),
    (f"{TARGET}, {SAN % '{type: Hostname}'}", "spec.validation.subjectAltNames[0].hostname: an alternative name has"),
    (f"{TARGET}, {SAN % '{type: URI, hostname: a.b}'}", "spec.validation.subjectAltNames[0].hostname: an alternative name has"),
    (f"{TARGET}, {SAN % '{type: URI, uri: abc}'}", "spec.validation.subjectAltNames[0].uri: expected a URI"),
    (f"targetRefs: [{{group: '', kind: Service, name: a}}, {{group: '', kind: Service, name: a}}], {VALID}",
     "spec.targetRefs[1].sectionName: this target is given twice"),
    (f"targetRefs: [{{group: '', kind: Service, name: a}}, {{group: '', kind: Service, name: a, sectionName: x}}], {VALID}",
     "spec.targetRefs[1].sectionName: of several references"),
    (f"{TARGET}, {VALID}, option: {{}}", "spec.option: unknown field"),
])  # fmt: skip
def test_what_the_gateway_api_refuses_of_a_backend_policy_is_refused(spec: str, mistake: str) -> None:
    found = mistakes("BackendTLSPolicy", f"{{spec: {{{spec}}}}}")
    assert any(each.startswith(mistake) for each in found), found


def test_a_secret_is_decoded_and_shows_itself_to_nobody() -> None:
    secret, problems = read_secret(made("Secret", "{data: {tls.crt: UEVN, bin: /w==}, stringData: {tls.key: geheim}}"))
    assert problems == ()
    assert secret.data == {"tls.crt": "PEM", "tls.key": "geheim"}
    assert "geheim" not in repr(secret)
    (mistake,) = mistakes("Secret", "{data: {tls.key: 'geheim!'}}")
    assert mistake == 'data["tls.key"]: not Base64'


def test_what_nobody_reads_of_secrets_and_maps_is_not_kept() -> None:
    raw = {"metadata": {"name": "x"}, "type": "Opaque", "data": {"tls.crt": "a", "password": "b"}}
    assert prune("Secret", raw)["data"] == {"tls.crt": "a"}
    assert "data" not in prune("Secret", {**raw, "type": "kubernetes.io/service-account-token"})
    assert prune("ConfigMap", {"metadata": {"name": "x"}, "data": {"mesh": "a", "app.yaml": "b"}}).get("data") == {"mesh": "a"}
