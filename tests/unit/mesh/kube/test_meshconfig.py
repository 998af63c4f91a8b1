"""The mesh configuration: each field that is read, what is told of, and what makes it unusable."""

from __future__ import annotations

import textwrap

import pytest

from mesh.kube.configmap import read_config_map
from mesh.kube.meshconfig import DEFAULT, MeshConfig, ReadMeshConfig, read_mesh_config
from mesh.kube.trafficpolicy import LocalitySettings, OutlierSettings, PoolSettings
from mesh.model.l7.destination import Distribute, H2Upgrade, Keepalive, OutlierDetection
from mesh.model.l7.policy import ExtAuthzGrpc, ExtAuthzHttp
from mesh.model.l7.waypoint import AccessLogging, PathNormalization, Tracing
from mesh.testing.objects import objects_from_yaml

HEAD = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n"


def read(mesh: str) -> ReadMeshConfig:
    objects, problems = objects_from_yaml(f"{HEAD}data:\n  mesh: |\n{textwrap.indent(textwrap.dedent(mesh).strip(), '    ')}\n")
    assert problems == ()
    (obj,) = (obj for obj in objects if obj.kind == "ConfigMap")
    return read_mesh_config(obj, read_config_map(obj)[0])


def config_of(mesh: str) -> MeshConfig:
    found = read(mesh)
    assert (found.mistakes, found.notices) == ((), ())
    return found.config


def test_what_is_not_given_is_istios_default() -> None:
    assert config_of("{}") == config_of("# nothing") == DEFAULT
    assert (DEFAULT.connect_timeout, DEFAULT.path_normalization, DEFAULT.destination_rule_export_to) == (
        10.0,
        PathNormalization.BASE,
        ("*",),
    )


def test_what_a_default_installation_of_istio_says_is_no_mistake_and_no_news() -> None:
    assert (
        config_of("""
        accessLogFile: /dev/stdout
        defaultConfig: {discoveryAddress: "istiod.istio-system.svc:15012", proxyMetadata: {ISTIO_META_ENABLE_HBONE: "true"}}
        defaultProviders: {metrics: [prometheus]}
        enablePrometheusMerge: true
        extensionProviders: [{name: prometheus, prometheus: {}}, {name: log, envoyFileAccessLog: {path: /dev/stdout}}]
        rootNamespace: istio-system
        trustDomain: cluster.local
    """)
        == DEFAULT
    )


@pytest.mark.parametrize(("mesh", "expected"), [
    ("pathNormalization: {normalization: NONE}", MeshConfig(path_normalization=PathNormalization.NONE)),
    ("pathNormalization: {normalization: DECODE_AND_MERGE_SLASHES}",
     MeshConfig(path_normalization=PathNormalization.DECODE_AND_MERGE_SLASHES)),
    ("pathNormalization: {}", DEFAULT),
    ("accessLogFile: ''", MeshConfig(access_log=AccessLogging(enabled=False))),
    ("accessLogFormat: '%REQ(:METHOD)%'", MeshConfig(access_log=AccessLogging(format="%REQ(:METHOD)%"))),
    ("accessLogEncoding: JSON", MeshConfig(access_log=AccessLogging(as_json=True))),
    ("{accessLogEncoding: JSON, accessLogFormat: '{\"m\": \"%REQ(:METHOD)%\"}'}",
     MeshConfig(access_log=AccessLogging(as_json=True, json=(("m", "%REQ(:METHOD)%"),)))),
    ("connectTimeout: 1s", MeshConfig(connect_timeout=1.0)),
    ("tcpKeepalive: {probes: 3, time: 10s, interval: 5s}", MeshConfig(keepalive=Keepalive(3, 10.0, 5.0))),
    ("h2UpgradePolicy: UPGRADE", MeshConfig(h2_upgrade=H2Upgrade.UPGRADE)),
    ("trustDomainAliases: [old.example.com, older]", MeshConfig(trust_domain_aliases=("old.example.com", "older"))),
    ("defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 7}}, outlierDetection: {interval: 1s}}",
     MeshConfig(pool=PoolSettings(max_connections=7), outlier=OutlierSettings(OutlierDetection(interval=1.0)))),
    ("localityLbSetting: {distribute: [{from: a, to: {b: 100}}]}",
     MeshConfig(locality=LocalitySettings(distribute=(Distribute("a", {"b": 100}),)))),
    ("localityLbSetting: {enabled: false}", MeshConfig(locality=LocalitySettings(enabled=False))),
    ("{defaultServiceExportTo: [.], defaultVirtualServiceExportTo: ['*'], defaultDestinationRuleExportTo: ['.']}",
     MeshConfig(service_export_to=(".",), destination_rule_export_to=(".",))),
    ("outboundTrafficPolicy: {mode: REGISTRY_ONLY}", MeshConfig(registry_only=True)),
    ("enableTracing: true", MeshConfig(tracing=Tracing(percent=1.0))),
    ("{enableTracing: true, defaultConfig: {tracing: {sampling: 12.5, customTags: {env: {literal: {value: prod}}}}}}",
     MeshConfig(tracing=Tracing(percent=12.5, tags=(("env", "prod"),)))),
    ("{extensionProviders: [{name: o, opentelemetry: {service: otel.obs.svc.cluster.local, port: 4318, http: {path: /v1/traces}}}], "
     "defaultProviders: {tracing: [o]}}",
     MeshConfig(tracing=Tracing("http://otel.obs.svc.cluster.local:4318/v1/traces", 1.0))),
])  # fmt: skip
def test_a_field_is_read(mesh: str, expected: MeshConfig) -> None:
    assert config_of(mesh) == expected


def test_the_default_retries_are_read() -> None:
    retry = config_of("defaultHttpRetryPolicy: {attempts: 5, perTryTimeout: 2s, retryOn: 'gateway-error,503'}").retry
    assert retry is not None
    assert (retry.attempts, retry.per_try_timeout, retry.on, retry.statuses) == (
        5,
        2.0,
        ("gateway-error", "retriable-status-codes"),
        (503,),
    )


def test_external_authorizers_are_read() -> None:
    assert config_of("""
        extensionProviders:
        - name: web
          envoyExtAuthzHttp:
            service: auth/ext.auth.svc.cluster.local
            port: 8000
            pathPrefix: /check
            timeout: 250ms
            failOpen: true
            clearRouteCache: true
            statusOnError: "503"
            includeHeadersInCheck: [Old]
            includeRequestHeadersInCheck: [X-Auth, X-*]
            includeAdditionalHeadersInCheck: {X-From: mesh}
            includeRequestBodyInCheck: {maxRequestBytes: 1024, allowPartialMessage: true}
            headersToUpstreamOnAllow: [X-User]
            headersToDownstreamOnDeny: ["*-reason"]
            headersToDownstreamOnAllow: [Set-Cookie]
        - name: older
          envoyExtAuthzHttp: {service: ext.auth.svc.cluster.local, port: 8000, includeHeadersInCheck: [Cookie]}
        - name: grpc
          envoyExtAuthzGrpc: {service: grpc.example.com, port: 9000, includeRequestBodyInCheck: {maxRequestBytes: 1, packAsBytes: true}}
    """).providers == {
        "web": ExtAuthzHttp(
            "auth", "ext.auth.svc.cluster.local", 8000, "/check", 0.25, True, 503, ("x-auth", "x-*"), (("x-from", "mesh"),), 1024, True,
            ("x-user",), ("*-reason",), ("set-cookie",),
        ),
        "older": ExtAuthzHttp("", "ext.auth.svc.cluster.local", 8000, include_request_headers=("cookie",)),
        "grpc": ExtAuthzGrpc("", "grpc.example.com", 9000, max_request_bytes=1, pack_as_bytes=True),
    }  # fmt: skip


@pytest.mark.parametrize(("mesh", "field", "message"), [
    ("connectTimeot: 1s", "data.mesh: connectTimeot", "unknown field, it has no effect"),
    ("defaultTrafficPolicy: {connectionPool: {tcp: {maxConnection: 1}}}",
     "data.mesh: defaultTrafficPolicy.connectionPool.tcp.maxConnection",
     "unknown field, it has no effect; did you mean 'maxConnections'?"),
    ("accessLogFormat: '%STREAM_ID%'", "data.mesh: accessLogFormat", "%STREAM_ID% says nothing here"),
    ("accessLogFile: /var/log/x", "data.mesh: accessLogFile", "waypoints write to their standard output"),
    ("extensionProviders: [{name: z, zipkin: {service: z.example.com, port: 9411}}]", "data.mesh: extensionProviders[0].zipkin",
     "waypoints send spans by OTLP over HTTP"),
    ("extensionProviders: [{name: o, opentelemetry: {service: o.example.com, port: 4317}}]",
     "data.mesh: extensionProviders[0].opentelemetry", "without 'http'"),
    ("defaultProviders: {tracing: [nobody]}", "data.mesh: defaultProviders", "there is no provider 'nobody'"),
    ("{enableTracing: true, defaultConfig: {tracing: {zipkin: {address: 'z:9411'}}}}", "data.mesh: defaultConfig", "waypoints send spans"),
    ("defaultConfig: {tracing: {customTags: {a: {header: {name: x}}}}}", "data.mesh: defaultConfig.tracing.customTags.a", "waypoints know"),
])  # fmt: skip
def test_what_has_no_effect_is_told_and_the_rest_is_used(mesh: str, field: str, message: str) -> None:
    found = read(f"{{connectTimeout: 3s, {mesh.removeprefix('{').removesuffix('}') if mesh.startswith('{') else mesh}}}")
    assert found.mistakes == ()
    assert found.config.connect_timeout == 3.0
    (notice,) = found.notices
    assert notice.field == field
    assert notice.message.startswith(message)


@pytest.mark.parametrize(("mesh", "mistake"), [
    ("- a", "objects.yaml:5: data.mesh: expected one mapping, found a list"),
    ("a: [", "objects.yaml:5: data.mesh: no YAML: line 2"),
    ("connectTimeout: soon", "objects.yaml:6: data.mesh: connectTimeout: expected a duration"),
    ("\n\nconnectTimeout: soon", "objects.yaml:6: data.mesh: connectTimeout: expected a duration"),
    ("a: b\nconnectTimeout: 0s", "objects.yaml:7: data.mesh: connectTimeout: expected a duration of at least"),
    ("pathNormalization: {normalization: ALL}", "objects.yaml:6: data.mesh: pathNormalization.normalization: expected one of"),
    ("accessLogFormat: '%NONSENSE%'", "objects.yaml:6: data.mesh: accessLogFormat: unknown operator %NONSENSE%"),
    ("{accessLogEncoding: JSON, accessLogFormat: '{\"a\": \"%REQ%\"}'}", "objects.yaml:6: data.mesh: accessLogFormat: %REQ% needs"),
    ("{accessLogEncoding: JSON, accessLogFormat: '%REQ(:METHOD)%'}", "objects.yaml:6: data.mesh: accessLogFormat: with accessLogEncoding"),
    ("{accessLogEncoding: JSON, accessLogFormat: '{\"a\": {}}'}", "objects.yaml:6: data.mesh: accessLogFormat: with accessLogEncoding"),
    ("trustDomainAliases: [a/b]", "objects.yaml:6: data.mesh: trustDomainAliases[0]: expected a trust domain"),
    ("defaultServiceExportTo: [shop]", "objects.yaml:6: data.mesh: defaultServiceExportTo[0]: expected '*' or '.'"),
    ("defaultTrafficPolicy: {connectionPool: {}}", "objects.yaml:6: data.mesh: defaultTrafficPolicy.connectionPool: 'tcp' or 'http'"),
    ("extensionProviders: [{envoyExtAuthzHttp: {service: a.b, port: 1}}]", "objects.yaml:6: data.mesh: extensionProviders[0]: 'name' is"),
    ("extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b}}]",
     "objects.yaml:6: data.mesh: extensionProviders[0].envoyExtAuthzHttp: 'port' is required"),
    ("extensionProviders: [{name: a, envoyExtAuthzHttp: {service: 'a b', port: 1}}]",
     "objects.yaml:6: data.mesh: extensionProviders[0].envoyExtAuthzHttp.service: expected the hostname"),
    ("extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b, port: 1, statusOnError: '99'}}]",
     "objects.yaml:6: data.mesh: extensionProviders[0].envoyExtAuthzHttp.statusOnError: expected an HTTP status"),
    ("extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b, port: 1, includeRequestHeadersInCheck: ['*']}}]",
     "objects.yaml:6: data.mesh: extensionProviders[0].envoyExtAuthzHttp.includeRequestHeadersInCheck[0]: expected the name of a header"),
    ("extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b, port: 1, pathPrefix: x}}]",
     "objects.yaml:6: data.mesh: extensionProviders[0].envoyExtAuthzHttp.pathPrefix: expected a path"),
    ("extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: a.b, port: 1, includeRequestBodyInCheck: {}}}]",
     "objects.yaml:6: data.mesh: extensionProviders[0].envoyExtAuthzGrpc.includeRequestBodyInCheck: 'maxRequestBytes' is required"),
    ("extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b, port: 1, includeRequestBodyInCheck: {maxRequestBytes: 16777217}}}]",
     "objects.yaml:6: data.mesh: extensionProviders[0].envoyExtAuthzHttp.includeRequestBodyInCheck.maxRequestBytes: expected"),
    ("extensionProviders: [{name: a, prometheus: {}}, {name: a, prometheus: {}}]",
     "objects.yaml:6: data.mesh: extensionProviders[1].name: two providers"),
    ("defaultConfig: {tracing: {sampling: 101}}", "objects.yaml:6: data.mesh: defaultConfig.tracing.sampling: expected a number"),
])  # fmt: skip
def test_a_mistake_is_found_at_its_line_and_field(mesh: str, mistake: str) -> None:
    found = read(mesh)
    assert any(str(problem).startswith(mistake) for problem in found.mistakes), list(map(str, found.mistakes))
