"""HTTPRoute, GRPCRoute, TCPRoute and TLSRoute: what is right is read as it was meant, and every mistake names its field."""

from __future__ import annotations

import pytest

from mesh.kube.gatewayapi.filters import Filters, Mirroring
from mesh.kube.gatewayapi.references import BackendRef, ParentRef
from mesh.kube.gatewayapi.routes import (
    ConnectionRoute,
    RequestRoute,
    RequestRule,
    RuleBackend,
    read_grpc_route,
    read_http_route,
    read_tcp_route,
    read_tls_route,
)
from mesh.kube.headeredits import HeaderEdits
from mesh.model.l7.matching import Exact, HeaderMatch, PathKind, PathMatch, QueryMatch, Regex, RouteMatch
from mesh.model.l7.routing import Cors, HeaderChanges, Redirect, Retry, Rewrite
from mesh.testing.objects import objects_from_yaml

READERS = {"HTTPRoute": read_http_route, "GRPCRoute": read_grpc_route, "TCPRoute": read_tcp_route, "TLSRoute": read_tls_route}
A = BackendRef("", "Service", "a", port=80)
EVERYTHING = PathMatch(PathKind.SEGMENTS, "/")
TO = "backendRefs: [{name: a, port: 80}]"


def read(kind: str, spec: str, version: str = "v1") -> RequestRoute | ConnectionRoute:
    head = f"apiVersion: gateway.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{name: r, namespace: shop}}\n"
    objects, problems = objects_from_yaml(f"{head}spec: {spec}\n")
    assert problems == ()
    (obj,) = objects
    reader = READERS[kind]
    value, problems = reader(obj)
    assert problems == ()
    return value


def http(text: str) -> RequestRule:
    found = read("HTTPRoute", f"{{rules: [{{{text}}}]}}")
    assert isinstance(found, RequestRoute)
    (rule,) = found.rules
    return rule


def filters(text: str) -> Filters:
    return http(f"filters: [{text}]").filters


@pytest.mark.parametrize(("kind", "version"), [
    ("HTTPRoute", "v1beta1"), ("GRPCRoute", "v1alpha2"), ("TCPRoute", "v1alpha2"), ("TLSRoute", "v1alpha3"), ("TLSRoute", "v1alpha2"),
])  # fmt: skip
def test_older_versions_are_read_alike(kind: str, version: str) -> None:
    spec = f"{{parentRefs: [{{group: '', kind: Service, name: s}}], rules: [{{{TO}}}]}}"
    assert read(kind, spec, version) == read(kind, spec)


def test_parents_and_hostnames() -> None:
    route = read(
        "HTTPRoute",
        "{parentRefs: [{name: gw}, {group: '', kind: Service, name: s, namespace: other, port: 80}, {name: gw, sectionName: web}],"
        " hostnames: [a.b, '*.c'], useDefaultGateways: None}",
    )
    service = ParentRef("", "Service", "s", "other", port=80)
    gateway = ParentRef("gateway.networking.k8s.io", "Gateway", "gw")
    assert route.parents == (gateway, service, ParentRef("gateway.networking.k8s.io", "Gateway", "gw", section="web"))
    assert route.hostnames == ("a.b", "*.c")
    assert service.as_object() == {"group": "", "kind": "Service", "name": "s", "namespace": "other", "port": 80}
    assert gateway.as_object() == {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gw"}


def test_a_route_without_rules_has_one_for_every_request_and_no_backend() -> None:
    assert read("HTTPRoute", "{}") == RequestRoute("HTTPRoute", "shop", "r", (), (), (RequestRule("", (), Filters(), ()),))


@pytest.mark.parametrize(("text", "match"), [
    ("{}", RouteMatch(path=EVERYTHING)),
    ("path: {value: /a/}", RouteMatch(path=PathMatch(PathKind.SEGMENTS, "/a"))),
    ("path: {type: PathPrefix, value: /}", RouteMatch(path=EVERYTHING)),
    ("path: {type: Exact, value: /a/}", RouteMatch(path=PathMatch(PathKind.EXACT, "/a/"))),
    ("path: {type: RegularExpression, value: '/a.*'}", RouteMatch(path=PathMatch(PathKind.REGEX, "/a.*"))),
    ("method: PUT", RouteMatch(path=EVERYTHING, method=Exact("PUT"))),
    ("headers: [{name: X-A, value: '1'}, {name: x-a, value: '2'}, {name: x-b, type: RegularExpression, value: 'b+'}]",
     RouteMatch(path=EVERYTHING, headers=(HeaderMatch("x-a", Exact("1")), HeaderMatch("x-b", Regex("b+"))))),
    ("queryParams: [{name: Q, value: '1'}, {name: Q, value: '2'}, {name: q, type: RegularExpression, value: 'b+'}]",
     RouteMatch(path=EVERYTHING, query=(QueryMatch("Q", Exact("1")), QueryMatch("q", Regex("b+"))))),
])  # fmt: skip
def test_every_kind_of_match_and_the_first_of_equal_names(text: str, match: RouteMatch) -> None:
    assert http(f"matches: [{text if text == '{}' else '{' + text + '}'}]").matches == (match,)


@pytest.mark.parametrize(("text", "path"), [
    ("{service: p.S, method: M}", PathMatch(PathKind.EXACT, "/p.S/M")),
    ("{service: p.S}", PathMatch(PathKind.SEGMENTS, "/p.S")),
    ("{method: M}", PathMatch(PathKind.REGEX, "/[^/]+/M")),
    ("{type: Exact, method: M}", PathMatch(PathKind.REGEX, "/[^/]+/M")),
    ("{type: RegularExpression, service: 'a|b', method: 'c|d'}", PathMatch(PathKind.REGEX, "/(?:a|b)/(?:c|d)")),
    ("{type: RegularExpression, service: 'a.*'}", PathMatch(PathKind.REGEX, "/(?:a.*)/.+")),
    ("{type: RegularExpression, method: 'a.*'}", PathMatch(PathKind.REGEX, "/[^/]+/(?:a.*)")),
])  # fmt: skip
def test_a_grpc_method_is_a_path(text: str, path: PathMatch) -> None:
    route = read("GRPCRoute", f"{{rules: [{{matches: [{{method: {text}, headers: [{{name: A, value: b}}]}}]}}]}}")
    assert isinstance(route, RequestRoute)
    assert route.rules[0].matches == (RouteMatch(path=path, headers=(HeaderMatch("a", Exact("b")),)),)


def test_a_grpc_route_has_filters_backends_and_rules_for_everything() -> None:
    route = read("GRPCRoute", f"{{rules: [{{filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{remove: [A]}}}}], {TO}}}]}}")
    assert isinstance(route, RequestRoute)
    (rule,) = route.rules
    assert (rule.matches, rule.backends) == ((), (RuleBackend(A, Filters()),))
    assert rule.filters.edits == HeaderEdits(HeaderChanges(remove=("a",)))


def test_backends_with_weights_and_filters() -> None:
    backends = http(
        "backendRefs: [{name: a, port: 80}, {name: b, port: 81, weight: 0, namespace: other, filters: [{type: ResponseHeaderModifier,"
        " responseHeaderModifier: {set: [{name: X, value: y}]}}]}, {group: networking.istio.io, kind: Hostname, name: x.y, port: 443}]"
    ).backends
    assert [backend.ref for backend in backends] == [
        A, BackendRef("", "Service", "b", "other", 81, 0), BackendRef("networking.istio.io", "Hostname", "x.y", port=443),
    ]  # fmt: skip
    assert backends[1].filters.edits == HeaderEdits(response=HeaderChanges(set=(("x", "y"),)))


@pytest.mark.parametrize(("text", "edits"), [
    ("set: [{name: X, value: '1'}, {name: x, value: '2'}, {name: A, value: '3'}], add: [{name: Y, value: z}], remove: [Q]",
     HeaderEdits(HeaderChanges((("a", "3"), ("x", "1")), (("y", "z"),), ("q",)))),
    ("set: [{name: Host, value: h}, {name: a, value: b}]", HeaderEdits(HeaderChanges((("a", "b"),)), authority="h")),
    ("set: [{name: a, value: '50%'}, {name: b, value: '%REQ(x)%'}]", HeaderEdits(HeaderChanges((("a", "50%%"), ("b", "%REQ(x)%"))))),
])  # fmt: skip
def test_header_values_are_meant_literally_where_they_are_no_format(text: str, edits: HeaderEdits) -> None:
    assert filters(f"{{type: RequestHeaderModifier, requestHeaderModifier: {{{text}}}}}").edits == edits


@pytest.mark.parametrize(("text", "redirect"), [
    ("hostname: a.b", Redirect(302, authority="a.b", request_port=True)),
    ("hostname: a.b, statusCode: 308", Redirect(308, authority="a.b", request_port=True)),
    ("scheme: https", Redirect(302, scheme="https")),
    ("scheme: https, port: 443", Redirect(302, scheme="https")),
    ("scheme: https, port: 8443", Redirect(302, scheme="https", port=8443)),
    ("port: 8083", Redirect(302, port=8083)),
    ("port: 80", Redirect(302)),
    ("path: {type: ReplaceFullPath, replaceFullPath: /b}", Redirect(302, path="/b", request_port=True)),
    ("path: {type: ReplacePrefixMatch, replacePrefixMatch: /b/}", Redirect(302, prefix="/b", request_port=True)),
    ("path: {type: ReplacePrefixMatch, replacePrefixMatch: ''}", Redirect(302, prefix="/", request_port=True)),
])  # fmt: skip
def test_a_redirects_port_is_the_services_unless_a_scheme_or_a_port_is_given(text: str, redirect: Redirect) -> None:
    assert filters(f"{{type: RequestRedirect, requestRedirect: {{{text}}}}}").redirect == redirect


@pytest.mark.parametrize(("text", "rewrite"), [
    ("hostname: a.b", Rewrite(authority="a.b")),
    ("path: {type: ReplaceFullPath, replaceFullPath: /b}", Rewrite(full="/b")),
    ("path: {type: ReplacePrefixMatch, replacePrefixMatch: /}", Rewrite(prefix="/")),
    ("path: {type: ReplacePrefixMatch, replacePrefixMatch: /b/}, hostname: c", Rewrite(prefix="/b", authority="c")),
])  # fmt: skip
def test_a_rewrite(text: str, rewrite: Rewrite) -> None:
    assert filters(f"{{type: URLRewrite, urlRewrite: {{{text}}}}}").rewrite == rewrite


@pytest.mark.parametrize(("text", "percent"), [
    ("", 100.0), (", percent: 20", 20.0), (", percent: 0", 0.0), (", fraction: {numerator: 1}", 1.0),
    (", fraction: {numerator: 1, denominator: 8}", 12.5),
])  # fmt: skip
def test_the_share_that_is_mirrored(text: str, percent: float) -> None:
    mirror = f"{{type: RequestMirror, requestMirror: {{backendRef: {{name: a, port: 80}}{text}}}}}"
    assert filters(f"{mirror}, {mirror}").mirrors == (Mirroring(A, percent), Mirroring(A, percent))


def test_cors() -> None:
    cors = filters(
        "{type: CORS, cors: {allowOrigins: ['https://www.foo.com', 'https://*.bar.com', 'http://*.baz.com:*'], allowMethods: [GET],"
        " allowHeaders: [X], exposeHeaders: [Y], maxAge: 3600, allowCredentials: true}}"
    ).cors
    label = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
    origins = (Exact("https://www.foo.com"), Regex(rf"https://{label}\.bar\.com"), Regex(rf"http://{label}\.baz\.com:[0-9]+"))
    assert cors == Cors(origins, ("GET",), ("X",), ("Y",), 3600, True, False, True)


def test_cors_of_every_origin_keeps_its_answer_five_seconds() -> None:
    cors = filters("{type: CORS, cors: {allowOrigins: ['*'], allowMethods: ['*']}}").cors
    assert cors is not None
    assert (cors.max_age, cors.methods) == (5, ("*",))
    assert isinstance(cors.origins[0], Regex)


@pytest.mark.parametrize(("text", "times"), [
    ("timeouts: {request: 10s, backendRequest: 2s}", (10.0, 2.0, None)),
    ("timeouts: {request: 0s, backendRequest: 2s}", (0.0, 2.0, None)),
    ("retry: {}", (None, None, Retry(2, ("connect-failure", "refused-stream", "unavailable", "cancelled", "reset")))),
    ("retry: {codes: [500, 503, 500], attempts: 3, backoff: 100ms}",
     (None, None, Retry(3, ("connect-failure", "refused-stream", "unavailable", "cancelled", "reset", "retriable-status-codes"), (500, 503),
                        backoff_base=0.1, backoff_max=1.0))),
])  # fmt: skip
def test_times_and_retries(text: str, times: tuple[float | None, float | None, Retry | None]) -> None:
    rule = http(f"{text}, {TO}")
    assert (rule.timeout, rule.backend_timeout, rule.retry) == times


def test_what_is_not_supported_is_read_to_be_told() -> None:
    rule = http(
        "sessionPersistence: {type: Cookie, sessionName: x}, filters: [{type: ExtensionRef, extensionRef: {group: a.b, kind: C, name: d}},"
        " {type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: a, port: 1}}}]"
    )
    assert (rule.sticky, rule.filters.unsupported) == (True, ((0, "ExtensionRef"), (1, "ExternalAuth")))
    assert not http(TO).sticky


def test_connections() -> None:
    tls = read("TLSRoute", f"{{hostnames: [a.b], rules: [{{name: n, {TO}}}]}}")
    assert isinstance(tls, ConnectionRoute)
    assert (tls.hostnames, tls.rules[0].name, tls.rules[0].backends) == (("a.b",), "n", (A,))
    assert isinstance(read("TCPRoute", "{rules: [{backendRefs: [{name: a, port: 80, weight: 0}]}]}"), ConnectionRoute)


RULE = "spec.rules[0]"
PREFIX_MATCH = "path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}"
MANY = ", ".join(["{}"] * 65)


@pytest.mark.parametrize(("kind", "spec", "field", "message"), [
    ("HTTPRoute", "{rulez: []}", "spec.rulez", "did you mean 'rules'?"),
    ("HTTPRoute", "{hostnames: ['a.*.b']}", "spec.hostnames[0]", "lower case letters"),
    ("HTTPRoute", "{hostnames: ['*']}", "spec.hostnames[0]", "lower case letters"),
    ("HTTPRoute", "{parentRefs: [{kind: Service}]}", "spec.parentRefs[0]", "'name' is required"),
    ("HTTPRoute", "{parentRefs: [{name: a, port: 0}]}", "spec.parentRefs[0].port", "from 1 to 65535"),
    ("HTTPRoute", "{parentRefs: [{name: a}, {name: a}]}", "spec.parentRefs[1]", "given twice"),
    ("HTTPRoute", "{parentRefs: [{name: a, namespace: A}]}", "spec.parentRefs[0].namespace", "no name of a namespace"),
    ("HTTPRoute", "{rules: [{name: a}, {name: a}]}", "spec.rules[1].name", "two rules"),
    ("HTTPRoute", f"{{rules: [{', '.join(['{}'] * 17)}]}}", "spec.rules", "17 items, of at most 16"),
    ("HTTPRoute", f"{{rules: [{{matches: [{MANY}]}}]}}", f"{RULE}.matches", "65 items, of at most 64"),
    ("HTTPRoute", f"{{rules: [{f'{{matches: [{MANY[4:]}]}}, ' * 3}]}}", "spec.rules", "192 matches together, of at most 128"),
    ("TCPRoute", "{}", "spec", "'rules' is required"),
    ("TLSRoute", "{rules: []}", "spec.rules", "needs a rule"),
    ("TCPRoute", "{rules: [{backendRefs: [{name: a}]}]}", f"{RULE}.backendRefs[0]", "'port' is required"),
    ("TCPRoute", "{rules: [{backendRefs: [{name: a, port: 1, filters: []}]}]}", f"{RULE}.backendRefs[0].filters", "unknown field"),
    ("TCPRoute", "{rules: [{backendRefs: [{name: a, port: 1, weight: 1000001}]}]}", f"{RULE}.backendRefs[0].weight", "to 1000000"),
    ("GRPCRoute", "{rules: [{matches: [{method: {}}]}]}", f"{RULE}.matches[0].method", "'service' or 'method'"),
    ("GRPCRoute", "{rules: [{matches: [{method: {service: 'a/b'}}]}]}", f"{RULE}.matches[0].method.service", "no name of a gRPC service"),
    ("GRPCRoute", "{rules: [{matches: [{method: {method: 'a.b'}}]}]}", f"{RULE}.matches[0].method.method", "no name of a gRPC method"),
    ("GRPCRoute", "{rules: [{matches: [{method: {type: RegularExpression, method: '('}}]}]}", f"{RULE}.matches[0].method.method", "RE2"),
    ("GRPCRoute", "{rules: [{filters: [{type: CORS}]}]}", f"{RULE}.filters[0].type", "expected one of"),
])  # fmt: skip
def test_a_mistake_in_the_whole_names_its_field(kind: str, spec: str, field: str, message: str) -> None:
    check(kind, spec, field, message)


@pytest.mark.parametrize(("text", "field", "message"), [
    ("matches: [{path: {value: a}}]", "matches[0].path.value", "begins with '/'"),
    ("matches: [{path: {value: //a}}]", "matches[0].path.value", "'//' is in no path"),
    ("matches: [{path: {value: /a/../b}}]", "matches[0].path.value", "'/../' is in no path"),
    ("matches: [{path: {value: /a/..}}]", "matches[0].path.value", "no path ends"),
    ("matches: [{path: {value: /a%2fb}}]", "matches[0].path.value", "'%2f' is in no path"),
    ("matches: [{path: {value: '/a#b'}}]", "matches[0].path.value", "'#' is in no path"),
    ("matches: [{path: {type: Exact, value: '/a b'}}]", "matches[0].path.value", "not a path"),
    ("matches: [{path: {type: Exact, value: '/%zz'}}]", "matches[0].path.value", "not a path"),
    (f"matches: [{{path: {{value: /{'a' * 1024}}}}}]", "matches[0].path.value", "1025 characters"),
    ("matches: [{path: {type: RegularExpression, value: '(?<=a)'}}]", "matches[0].path.value", "RE2"),
    ("matches: [{path: {type: Suffix, value: /a}}]", "matches[0].path.type", "expected one of"),
    ("matches: [{method: get}]", "matches[0].method", "did you mean 'GET'?"),
    ("matches: [{headers: [{name: 'a b', value: x}]}]", "matches[0].headers[0].name", "no name of a header"),
    ("matches: [{headers: [{name: a}]}]", "matches[0].headers[0]", "'value' is required"),
    ("matches: [{headers: [{name: a, type: RegularExpression, value: '['}]}]", "matches[0].headers[0].value", "RE2"),
    ("matches: [{queryParams: [{name: a, value: ''}]}]", "matches[0].queryParams[0].value", "an empty value"),
    ("backendRefs: [{name: a}]", "backendRefs[0]", "'port' is required for a Service"),
    ("backendRefs: [{name: a, port: 80, weight: -1}]", "backendRefs[0].weight", "found -1"),
    (f"filters: [{{type: RequestRedirect, requestRedirect: {{port: 1}}}}], {TO}", "backendRefs", "beside a filter of type RequestRedirect"),
    ("filters: [{type: Nothing}]", "filters[0].type", "expected one of"),
    ("filters: [{}]", "filters[0]", "'type' is required"),
    ("filters: [{type: URLRewrite}]", "filters[0]", "'urlRewrite' is required"),
    ("filters: [{type: URLRewrite, urlRewrite: {}, cors: {}}]", "filters[0].cors", "is for filters of type CORS"),
    ("filters: [{type: URLRewrite, urlRewrite: {}}, {type: URLRewrite, urlRewrite: {}}]", "filters[1]", "given twice"),
    ("filters: [{type: URLRewrite, urlRewrite: {}}, {type: RequestRedirect, requestRedirect: {}}]", "filters[0]", "exclude each other"),
    ("filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: \"x\\ny\"}]}}]",
     "filters[0].requestHeaderModifier.set[0].value", "no control characters"),
    ("filters: [{type: RequestMirror, requestMirror: {}}]", "filters[0].requestMirror", "'backendRef' is required"),
    ("filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 1, fraction: {numerator: 1}}}]",
     "filters[0].requestMirror.fraction", "beside 'percent'"),
    ("filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 2, denominator: 1}}}]",
     "filters[0].requestMirror.fraction.numerator", "more than all"),
    ("filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1, weight: 1}}}]",
     "filters[0].requestMirror.backendRef.weight", "unknown field"),
    ("filters: [{type: RequestRedirect, requestRedirect: {statusCode: 304}}]", "filters[0].requestRedirect.statusCode", "expected 301"),
    ("filters: [{type: RequestRedirect, requestRedirect: {scheme: ftp}}]", "filters[0].requestRedirect.scheme", "expected one of"),
    (f"matches: [{{path: {{type: Exact, value: /a}}}}], filters: [{{type: URLRewrite, urlRewrite: {{{PREFIX_MATCH}}}}}]",
     "filters[0]", "exactly one match, by PathPrefix"),
    (f"matches: [{{}}, {{}}], filters: [{{type: RequestRedirect, requestRedirect: {{{PREFIX_MATCH}}}}}]",
     "filters[0]", "exactly one match, by PathPrefix"),
    ("filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath}}}]",
     "filters[0].urlRewrite.path", "type ReplaceFullPath goes with 'replaceFullPath'"),
    ("filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /a, replacePrefixMatch: /b}}}]",
     "filters[0].urlRewrite.path.replacePrefixMatch", "type ReplaceFullPath goes with 'replaceFullPath'"),
    ("filters: [{type: CORS, cors: {allowOrigins: ['*', 'http://a']}}]", "filters[0].cors.allowOrigins", "nothing to name beside"),
    ("filters: [{type: CORS, cors: {allowOrigins: ['a.b']}}]", "filters[0].cors.allowOrigins[0]", "expected '*' or an origin"),
    ("filters: [{type: CORS, cors: {allowMethods: [X]}}]", "filters[0].cors.allowMethods[0]", "expected one of"),
    ("filters: [{type: CORS, cors: {maxAge: 0}}]", "filters[0].cors.maxAge", "from 1"),
    (f"timeouts: {{request: 1s, backendRequest: 2s}}, {TO}", "timeouts.backendRequest", "longer than 'request'"),
    (f"timeouts: {{request: 1.5s}}, {TO}", "timeouts.request", "no fractions"),
    (f"timeouts: {{request: 5}}, {TO}", "timeouts.request", "expected a duration such as 500ms, 10s or 1h30m"),
    (f"retry: {{codes: [200]}}, {TO}", "retry.codes[0]", "from 400 to 599"),
    (f"retry: {{codes: ['500']}}, {TO}", "retry.codes[0]", "expected a whole number"),
    (f"retry: {{backoff: 1us}}, {TO}", "retry.backoff", "expected a duration"),
])  # fmt: skip
def test_a_mistake_in_a_rule_names_its_field(text: str, field: str, message: str) -> None:
    check("HTTPRoute", f"{{rules: [{{{text}}}]}}", f"{RULE}.{field}", message)


def check(kind: str, spec: str, field: str, message: str) -> None:
    head = f"apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r, namespace: shop}}\n"
    objects, problems = objects_from_yaml(f"{head}spec: {spec}\n")
    assert [problem.field for problem in problems] == [field]
    assert message in problems[0].message
    # It is handed on, so that its status can say so, but never for use.
    assert [obj.problems for obj in objects] == [problems]
