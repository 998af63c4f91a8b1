"""VirtualServices: every field is read as it was meant, and every mistake that Istio's webhook refuses names its field."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.kube.directory import DirectoryStore
from mesh.kube.headeredits import HeaderEdits
from mesh.kube.routeactions import GRPC_STATUSES, MirrorTarget, Target, WeightedTarget
from mesh.kube.virtualservice import (
    Delegate,
    HostIndex,
    HttpMatch,
    HttpRule,
    L4Match,
    L4Rule,
    VirtualService,
    covers,
    patterns_of,
    read_virtual_service,
)
from mesh.model.l7.matching import Exact, Prefix, Present, Regex
from mesh.model.l7.routing import Cors, DirectResponse, Fault, HeaderChanges, Redirect, Retry, Rewrite
from mesh.testing.objects import objects_from_yaml

HEAD = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v, namespace: shop}\n"
TO = "route: [{destination: {host: a}}]"


def read(spec: str) -> VirtualService:
    objects, problems = objects_from_yaml(f"{HEAD}spec: {spec}\n")
    assert problems == ()
    (obj,) = objects
    value, problems = read_virtual_service(obj)
    assert problems == ()
    return value


def rule(text: str) -> HttpRule:
    (found,) = read(f"{{hosts: [a], http: [{{{text}}}]}}").http
    return found


def test_a_virtual_service_as_a_whole() -> None:
    vs = read(
        "{hosts: [Reviews, '*.Example.com', 192.0.2.1, '2001:db8::1'], gateways: [mesh, gw, other/gw, gw.other.svc], exportTo: [., other],"
        f" http: [{{{TO}}}], tls: [{{match: [{{sniHosts: [a.example.com]}}], {TO}}}], tcp: [{{{TO}}}]}}"
    )
    assert vs.hosts == ("reviews", "*.example.com", "192.0.2.1", "2001:db8::1")
    assert (vs.gateways, vs.export_to, vs.for_mesh) == (("mesh", "gw", "other/gw", "gw.other.svc"), (".", "other"), True)
    assert (len(vs.http), len(vs.tls), len(vs.tcp)) == (1, 1, 1)


@pytest.mark.parametrize(("gateways", "for_mesh"), [("[]", True), ("[mesh]", True), ("[gw]", False), ("[gw, mesh]", True)])
def test_without_gateways_it_is_for_the_mesh(gateways: str, for_mesh: bool) -> None:
    assert read(f"{{hosts: [a], gateways: {gateways}, http: [{{{TO}}}]}}").for_mesh is for_mesh


@pytest.mark.parametrize(("text", "match"), [
    ("name: m", HttpMatch(name="m")),
    ("uri: {exact: /a}", HttpMatch(uri=Exact("/a"))),
    ("uri: {prefix: /a}, ignoreUriCase: true", HttpMatch(uri=Prefix("/a"), ignore_case=True)),
    ("uri: {prefix: ''}", HttpMatch(uri=Prefix(""))),
    ("uri: {regex: '/a.*'}", HttpMatch(uri=Regex("/a.*"))),
    ("uri: {}", HttpMatch(uri=Present())),
    ("scheme: {exact: http}, method: {regex: GET|HEAD}, authority: {prefix: a.}",
     HttpMatch(scheme=Exact("http"), method=Regex("GET|HEAD"), authority=Prefix("a."))),
    ("headers: {x-a: {exact: '1'}, x-b: {prefix: b}, x-c: {regex: c+}, x-d: {}, x-e: {regex: '*'}, ':method': {exact: PUT},"
     " x-f: {exact: ''}}",
     HttpMatch(headers={
         "x-a": Exact("1"), "x-b": Prefix("b"), "x-c": Regex("c+"), "x-d": Present(), "x-e": Present(), ":method": Exact("PUT"),
         "x-f": Exact(""),
     })),
    ("withoutHeaders: {x-a: {regex: '*'}, x-b: {exact: y}}", HttpMatch(without_headers={"x-a": Present(), "x-b": Exact("y")})),
    ("queryParams: {Q: {exact: x}, r: {}, s: {prefix: p}}", HttpMatch(query={"Q": Exact("x"), "r": Present(), "s": Prefix("p")})),
    ("port: 80", HttpMatch(port=80)),
    ("sourceLabels: {a: b}, sourceNamespace: n, gateways: [mesh], statPrefix: s",
     HttpMatch(source_labels={"a": "b"}, source_namespace="n", gateways=("mesh",))),
])  # fmt: skip
def test_every_kind_of_match(text: str, match: HttpMatch) -> None:
    assert rule(f"match: [{{{text}}}], {TO}").matches == (match,)


def test_a_redirect_in_full() -> None:
    found = rule("redirect: {uri: /b, authority: b, scheme: https, port: 8443, redirectCode: 308}").redirect
    assert found == Redirect(308, "https", "b", 8443, path="/b")


@pytest.mark.parametrize(("text", "redirect"), [
    ("{uri: /b}", Redirect(301, path="/b")),
    ("{derivePort: FROM_REQUEST_PORT}", Redirect(request_port=True)),
    ("{derivePort: FROM_PROTOCOL_DEFAULT}", Redirect()),
    ("{port: 80}", Redirect()),
    ("{port: 443, scheme: https}", Redirect(scheme="https")),
    ("{port: 443}", Redirect(port=443)),
    ("{port: 80, scheme: https}", Redirect(scheme="https", port=80)),
    ("{authority: b, redirectCode: 304}", Redirect(304, authority="b")),
])  # fmt: skip
def test_a_port_that_is_the_schemes_own_is_not_said(text: str, redirect: Redirect) -> None:
    assert rule(f"redirect: {text}").redirect == redirect


def test_a_prefix_is_redirected_where_it_is_what_is_matched() -> None:
    found = rule("match: [{uri: {prefix: /a}}], redirect: {prefixRewrite: /b}").redirect
    assert found == Redirect(prefix="/b")


@pytest.mark.parametrize(("text", "response"), [
    ("{status: 503}", DirectResponse(503)),
    ("{status: 200, body: {string: \"h\\u00e9\"}}", DirectResponse(200, "hé".encode())),
    ("{status: 200, body: {bytes: AAEC}}", DirectResponse(200, b"\x00\x01\x02")),
])  # fmt: skip
def test_a_direct_response(text: str, response: DirectResponse) -> None:
    assert rule(f"directResponse: {text}").direct_response == response


@pytest.mark.parametrize(("text", "rewrite"), [
    ("{uri: /b, authority: b}", Rewrite(prefix="/b", authority="b")),
    (r"{uriRegexRewrite: {match: '/(\w+)/(.*)', rewrite: '/\2/\1'}}", Rewrite(regex=r"/(\w+)/(.*)", substitution=r"/\2/\1")),
    ("{authority: b}", Rewrite(authority="b")),
])  # fmt: skip
def test_a_rewrite(text: str, rewrite: Rewrite) -> None:
    assert rule(f"rewrite: {text}, {TO}").rewrite == rewrite


def test_destinations_with_weights_and_headers() -> None:
    found = rule(
        "route: [{destination: {host: a, subset: v1, port: {number: 80}}, weight: 90, headers: {request: {set: {B: x, a: y}, add: {c: z},"
        " remove: [D]}, response: {add: {e: '%RESP(x)% 100%%'}}}}, {destination: {host: b.other.svc.cluster.local}, weight: 10}]"
    ).targets
    edits = HeaderEdits(HeaderChanges((("a", "y"), ("b", "x")), (("c", "z"),), ("d",)), HeaderChanges(add=(("e", "%RESP(x)% 100%%"),)))
    assert found == (WeightedTarget(Target("a", "v1", 80), 90, edits), WeightedTarget(Target("b.other.svc.cluster.local"), 10))


@pytest.mark.parametrize(("text", "authority"), [
    ("{request: {set: {Host: x}}}", "x"),
    ("{request: {set: {':authority': x}}}", "x"),
    ("{request: {add: {host: x}}}", "x"),
    ("{request: {set: {a: b}}}", ""),
])  # fmt: skip
def test_the_host_header_is_the_authority(text: str, authority: str) -> None:
    edits = rule(f"headers: {text}, {TO}").headers
    assert edits is not None
    assert edits.authority == authority
    assert all(name != "host" for name, _ in (*edits.request.set, *edits.request.add))


@pytest.mark.parametrize(("text", "retry"), [
    ("{attempts: 0}", Retry(attempts=0)),
    ("{attempts: 3}", Retry(attempts=3)),
    ("{attempts: 3, perTryTimeout: 1.5s, backoff: 1s, retryRemoteLocalities: true, retryIgnorePreviousHosts: false}",
     Retry(3, per_try_timeout=1.5, backoff_base=1.0, backoff_max=10.0, remote_localities=True, previous_hosts=True)),
    ("{attempts: 1, retryOn: 'reset, 503,5xx,409'}", Retry(1, ("reset", "5xx", "retriable-status-codes"), (503, 409))),
    ("{attempts: 1, retryOn: 'retriable-status-codes,503'}", Retry(1, ("retriable-status-codes",), (503,))),
])  # fmt: skip
def test_retries(text: str, retry: Retry) -> None:
    assert rule(f"retries: {text}, {TO}").retry == retry


@pytest.mark.parametrize(("text", "fault"), [
    ("{delay: {fixedDelay: 5s, percentage: {value: 0.1}}}", Fault(5.0, 0.1)),
    ("{delay: {fixedDelay: 5s, percent: 10}}", Fault(5.0, 10.0)),
    ("{delay: {fixedDelay: 5s, percent: 10, percentage: {value: 1}}}", Fault(5.0, 1.0)),
    ("{delay: {fixedDelay: 5s}}", Fault(5.0, 0.0)),
    ("{abort: {httpStatus: 400, percentage: {value: 100}}}", Fault(status=400, abort_percent=100.0)),
    ("{abort: {grpcStatus: NOT_FOUND, percentage: {value: 50}}, delay: {fixedDelay: 1ms, percentage: {value: 2}}}",
     Fault(0.001, 2.0, None, GRPC_STATUSES["NOT_FOUND"], 50.0)),
    ("{abort: {httpStatus: 400}}", Fault(status=400)),
])  # fmt: skip
def test_a_fault_without_a_percentage_never_happens(text: str, fault: Fault) -> None:
    assert rule(f"fault: {text}, {TO}").fault == fault


def test_grpc_statuses_have_their_numbers() -> None:
    assert (GRPC_STATUSES["OK"], GRPC_STATUSES["NOT_FOUND"], GRPC_STATUSES["UNAUTHENTICATED"]) == (0, 5, 16)


@pytest.mark.parametrize(("text", "percent"), [
    ("mirror: {host: b}", None),
    ("mirror: {host: b}, mirrorPercentage: {value: 0.5}", 0.5),
    ("mirror: {host: b}, mirrorPercent: 20", 20.0),
    ("mirror: {host: b}, mirror_percent: 20", 20.0),
    ("mirror: {host: b}, mirror_percent: 20, mirrorPercentage: {value: 3}", 3.0),
    ("mirror: {host: b}, mirrorPercent: 0", 0.0),
])  # fmt: skip
def test_the_share_that_is_mirrored_in_all_its_spellings(text: str, percent: float | None) -> None:
    found = rule(f"{text}, {TO}")
    assert (found.mirror, found.mirror_percent) == (Target("b"), percent)


def test_several_mirrors() -> None:
    found = rule(
        f"mirrors: [{{destination: {{host: b}}}}, {{destination: {{host: c, port: {{number: 1}}}}, percentage: {{value: 7}}}}], {TO}"
    )
    assert found.mirrors == (MirrorTarget(Target("b")), MirrorTarget(Target("c", port=1), 7.0))


@pytest.mark.parametrize(("text", "cors"), [
    ("{allowOrigins: [{exact: 'http://a'}, {regex: 'http://.*'}], allowMethods: [GET, '*'], allowHeaders: [X, '*'], exposeHeaders: [Y],"
     " maxAge: 24h, allowCredentials: true, unmatchedPreflights: IGNORE}",
     Cors((Exact("http://a"), Regex("http://.*")), ("GET", "*"), ("X", "*"), ("Y",), 86400, True, False)),
    ("{allowOrigin: ['http://a']}", Cors((Exact("http://a"),))),
    ("{allowOrigins: [{prefix: 'http://'}], unmatchedPreflights: UNSPECIFIED}", Cors((Prefix("http://"),))),
    ("{unmatchedPreflights: FORWARD}", Cors(())),
])  # fmt: skip
def test_cors(text: str, cors: Cors) -> None:
    assert rule(f"corsPolicy: {text}, {TO}").cors == cors


def test_timeouts_names_and_delegates() -> None:
    assert rule(f"name: n, timeout: 1h2m3.5s, {TO}").timeout == 3723.5
    assert rule(f"name: n, {TO}").name == "n"
    assert rule("delegate: {name: d, namespace: other}").delegate == Delegate("d", "other")
    assert read("{http: [{match: [{uri: {prefix: /a}}], route: [{destination: {host: a}}]}]}").hosts == ()


def test_connections() -> None:
    vs = read(
        "{hosts: [a.b, '*.c'], tls: [{match: [{sniHosts: [a.b, x.c], destinationSubnets: [10.0.0.0/8], port: 443, sourceLabels: {a: b},"
        " gateways: [mesh], sourceNamespace: n}], route: [{destination: {host: a}, weight: 1}, {destination: {host: b}, weight: 0}]}],"
        " tcp: [{match: [{port: 1}], route: [{destination: {host: a}}]}]}"
    )
    tls = L4Match(("a.b", "x.c"), ("10.0.0.0/8",), 443, {"a": "b"}, ("mesh",), "n")
    assert vs.tls == (L4Rule((tls,), (WeightedTarget(Target("a"), 1), WeightedTarget(Target("b")))),)
    assert vs.tcp == (L4Rule((L4Match(port=1),), (WeightedTarget(Target("a")),)),)


HTTP = "spec.http[0]"


@pytest.mark.parametrize(("spec", "field", "message"), [
    ("{}", "spec", "one of 'http', 'tls' and 'tcp'"),
    ("{hosts: [a]}", "spec", "is required"),
    ("{hosts: [a], https: []}", "spec.https", "did you mean 'http'?"),
    (f"{{hosts: ['*'], http: [{{{TO}}}]}}", "spec.hosts[0]", "'*' is for gateways"),
    (f"{{hosts: ['*'], gateways: [gw, mesh], http: [{{{TO}}}]}}", "spec.hosts[0]", "'*' is for gateways"),
    (f"{{hosts: [a.*.c], http: [{{{TO}}}]}}", "spec.hosts[0]", "expected a hostname"),
    (f"{{hosts: [''], http: [{{{TO}}}]}}", "spec.hosts[0]", "expected a hostname"),
    (f"{{hosts: [a.b, a.b], http: [{{{TO}}}]}}", "spec.hosts[1]", "given twice"),
    (f"{{hosts: [x.a.b, c.d, '*.b'], http: [{{{TO}}}]}}", "spec.hosts[2]", "'x.a.b' and '*.b' overlap"),
    (f"{{hosts: ['*.a.b', '*.b'], http: [{{{TO}}}]}}", "spec.hosts[1]", "'*.a.b' and '*.b' overlap"),
    (f"{{hosts: ['*.b', a.b], http: [{{{TO}}}]}}", "spec.hosts[1]", "overlap"),
    (f"{{hosts: [a], gateways: ['a/b/c'], http: [{{{TO}}}]}}", "spec.gateways[0]", "'namespace/name'"),
    (f"{{hosts: [a], gateways: ['/b'], http: [{{{TO}}}]}}", "spec.gateways[0]", "'namespace/name'"),
    (f"{{hosts: [a], exportTo: ['*', b], http: [{{{TO}}}]}}", "spec.exportTo", "everybody"),
    (f"{{hosts: [a], exportTo: [., shop], http: [{{{TO}}}]}}", "spec.exportTo[1]", "named already"),
    (f"{{hosts: [a], exportTo: ['~'], http: [{{{TO}}}]}}", "spec.exportTo[0]", "expected '*', '.'"),
    # A delegate is all a VirtualService without hosts can be.
    (f"{{gateways: [mesh], http: [{{{TO}}}]}}", "spec.gateways", "delegate"),
    (f"{{http: [{{{TO}}}], tcp: [{{{TO}}}]}}", "spec.tcp", "delegate"),
    ("{http: [{delegate: {name: d}}]}", "spec.http[0].delegate", "can't delegate further"),
    # Connections.
    (f"{{hosts: [a.b], tls: [{{{TO}}}]}}", "spec.tls[0]", "'match' is required"),
    (f"{{hosts: [a.b], tls: [{{match: [{{port: 1}}], {TO}}}]}}", "spec.tls[0].match[0]", "'sniHosts' is required"),
    (f"{{hosts: [a.b], tls: [{{match: [{{sniHosts: [c.d]}}], {TO}}}]}}", "spec.tls[0].match[0].sniHosts[0]", "none of the Virtual"),
    (f"{{hosts: [a.b], tls: [{{match: [{{sniHosts: ['*.b']}}], {TO}}}]}}", "spec.tls[0].match[0].sniHosts[0]", "none of the Virtual"),
    ("{hosts: [a.b], tcp: [{}]}", "spec.tcp[0]", "'route' is required"),
    ("{hosts: [a.b], tcp: [{route: []}]}", "spec.tcp[0].route", "needs a destination"),
    (f"{{hosts: [a.b], tcp: [{{match: [{{sourceSubnet: 10.0.0.0/8}}], {TO}}}]}}", "spec.tcp[0].match[0].sourceSubnet", "not supported"),
    (f"{{hosts: [a.b], tcp: [{{match: [{{destinationSubnets: [x]}}], {TO}}}]}}", "spec.tcp[0].match[0].destinationSubnets[0]", "not an IP"),
    (f"{{hosts: [a.b], tcp: [{{match: [{{sniHosts: [a.b]}}], {TO}}}]}}", "spec.tcp[0].match[0].sniHosts", "unknown field"),
    ("{hosts: [a.b], tcp: [{route: [{destination: {host: a}, weight: 0}, {destination: {host: b}}]}]}", "spec.tcp[0].route", "no dest"),
])  # fmt: skip
def test_a_mistake_in_the_whole_names_its_field(spec: str, field: str, message: str) -> None:
    check(spec, field, message)


@pytest.mark.parametrize(("text", "field", "message"), [
    ("name: n", "", "a route, a redirect or a directResponse"),
    ("route: []", "", "a route, a redirect or a directResponse"),
    (f"redirect: {{uri: /a}}, {TO}", "route", "beside 'redirect'"),
    (f"directResponse: {{status: 200}}, {TO}", "route", "beside 'directResponse'"),
    ("redirect: {uri: /a}, directResponse: {status: 200}", "directResponse", "beside 'redirect'"),
    ("redirect: {uri: /a}, fault: {abort: {httpStatus: 500}}", "fault", "beside 'redirect'"),
    ("directResponse: {status: 200}, fault: {abort: {httpStatus: 500}}", "fault", "beside 'directResponse'"),
    ("redirect: {uri: /a}, rewrite: {uri: /b}", "rewrite", "beside 'redirect'"),
    ("directResponse: {status: 200}, rewrite: {uri: /b}", "rewrite", "beside 'directResponse'"),
    (f"delegate: {{name: d}}, {TO}", "route", "beside 'delegate'"),
    ("delegate: {name: d}, redirect: {uri: /a}", "redirect", "beside 'delegate'"),
    ("delegate: {}", "delegate", "'name' is required"),
    # Matches.
    (f"match: [{{urii: {{exact: /}}}}], {TO}", "match[0].urii", "did you mean 'uri'?"),
    (f"match: [{{uri: {{exact: /, prefix: /}}}}], {TO}", "match[0].uri.prefix", "beside 'exact'"),
    (f"match: [{{uri: {{regex: ''}}}}], {TO}", "match[0].uri.regex", "an empty regular expression"),
    (f"match: [{{uri: {{regex: '*'}}}}], {TO}", "match[0].uri.regex", "not a regular expression of RE2"),
    (f"match: [{{uri: {{regex: '(?=a)'}}}}], {TO}", "match[0].uri.regex", "not a regular expression of RE2"),
    (f"match: [{{uri: {{regex: '(a)\\1'}}}}], {TO}", "match[0].uri.regex", "not a regular expression of RE2"),
    (f"match: [{{uri: {{regex: '{'a' * 1025}'}}}}], {TO}", "match[0].uri.regex", "at most 1024"),
    (f"match: [{{method: {{prefix: ''}}}}], {TO}", "match[0].method.prefix", "an empty prefix"),
    (f"match: [{{headers: {{X-A: {{exact: a}}}}}}], {TO}", "match[0].headers.X-A", "in lower case: 'x-a'"),
    (f"match: [{{headers: {{'a b': {{exact: a}}}}}}], {TO}", 'match[0].headers["a b"]', "no name of a header"),
    (f"match: [{{headers: {{':other': {{exact: a}}}}}}], {TO}", 'match[0].headers[":other"]', "no name of a header"),
    (f"match: [{{withoutHeaders: {{X: {{exact: a}}}}}}], {TO}", "match[0].withoutHeaders.X", "in lower case"),
    (f"match: [{{headers: {{'@request.auth.claims.a': {{exact: a}}}}}}], {TO}", 'match[0].headers["@request.auth.claims.a"]', "gateways"),
    (f"match: [{{withoutHeaders: {{'@request.auth.claims[a]': {{exact: a}}}}}}], {TO}",
     'match[0].withoutHeaders["@request.auth.claims[a]"]', "gateways"),
    (f"match: [{{queryParams: {{a: {{prefix: ''}}}}}}], {TO}", "match[0].queryParams.a.prefix", "an empty prefix"),
    (f"match: [{{port: 70000}}], {TO}", "match[0].port", "from 0 to 65535"),
    (f"match: [{{sourceNamespace: A_B}}], {TO}", "match[0].sourceNamespace", "no name of a namespace"),
    # Destinations.
    ("route: [{}]", "route[0]", "'destination' is required"),
    ("route: [{destination: {}}]", "route[0].destination", "'host' is required"),
    ("route: [{destination: {host: '*'}}]", "route[0].destination.host", "expected a hostname"),
    ("route: [{destination: {host: a, subset: A B}}]", "route[0].destination.subset", "name of a subset"),
    ("route: [{destination: {host: a, port: {number: 0}}}]", "route[0].destination.port.number", "from 1"),
    ("route: [{destination: {host: a}, weight: -1}]", "route[0].weight", "found -1"),
    ("route: [{destination: {host: a}}, {destination: {host: b}, weight: 0}]", "route", "no destination has a weight"),
    # Headers.
    (f"headers: {{request: {{set: {{a: '5%'}}}}}}, {TO}", "headers.request.set.a", "'%%'"),
    (f"headers: {{request: {{set: {{a: '%NO_SUCH_OPERATOR%'}}}}}}, {TO}", "headers.request.set.a", "'%%'"),
    (f'headers: {{request: {{set: {{a: "x\\ny"}}}}}}, {TO}', "headers.request.set.a", "control characters"),
    (f"headers: {{request: {{add: {{':path': /x}}}}}}, {TO}", 'headers.request.add[":path"]', "can't be changed"),
    (f"headers: {{request: {{remove: [Host]}}}}, {TO}", "headers.request.remove[0]", "can't be changed"),
    (f"headers: {{response: {{set: {{Host: a}}}}}}, {TO}", "headers.response.set.Host", "can't be changed"),
    (f"headers: {{response: {{remove: [':status']}}}}, {TO}", "headers.response.remove[0]", "can't be changed"),
    (f"headers: {{request: {{set: {{Host: a}}, add: {{':authority': b}}}}}}, {TO}", 'headers.request.add[":authority"]', "already"),
    (f"rewrite: {{authority: a}}, headers: {{request: {{set: {{Host: b}}}}}}, {TO}", "headers.request", "in 'rewrite' already"),
    # Redirect, direct response, rewrite.
    ("redirect: {}", "redirect", "a redirect needs"),
    ('redirect: {uri: "/a\\r\\nx: y"}', "redirect.uri", "has a character that no header can carry"),
    ('redirect: {authority: "a\\nb"}', "redirect.authority", "has a character that no header can carry"),
    ('redirect: {prefixRewrite: "/\\0"}', "redirect.prefixRewrite", "has a character that no header can carry"),
    (f'rewrite: {{uri: "/a b"}}, {TO}', "rewrite.uri", "has a blank"),
    (f'rewrite: {{authority: "a\\tb"}}, {TO}', "rewrite.authority", "has a character that no header can carry"),
    ("redirect: {uri: /a, prefixRewrite: /b}", "redirect.prefixRewrite", "beside 'uri'"),
    ("redirect: {port: 1, derivePort: FROM_REQUEST_PORT}", "redirect.derivePort", "beside 'port'"),
    ("redirect: {uri: /a, scheme: ftp}", "redirect.scheme", "expected one of http, https"),
    ("redirect: {uri: /a, redirectCode: 200}", "redirect.redirectCode", "from 300 to 399"),
    ("match: [{uri: {exact: /a}}], redirect: {prefixRewrite: /b}", "match[0].uri", "by prefix"),
    ("directResponse: {}", "directResponse", "'status' is required"),
    ("directResponse: {status: 199}", "directResponse.status", "from 200 to 599"),
    ("directResponse: {status: 200, body: {string: a, bytes: aaaa}}", "directResponse.body.bytes", "beside 'string'"),
    ("directResponse: {status: 200, body: {bytes: 'a'}}", "directResponse.body.bytes", "base64"),
    (f"rewrite: {{}}, {TO}", "rewrite", "a rewrite needs"),
    (f"rewrite: {{uri: /a, uriRegexRewrite: {{match: a, rewrite: b}}}}, {TO}", "rewrite.uriRegexRewrite", "beside 'uri'"),
    (f"rewrite: {{uriRegexRewrite: {{match: '(', rewrite: b}}}}, {TO}", "rewrite.uriRegexRewrite.match", "not a regular expression"),
    (f"rewrite: {{uriRegexRewrite: {{match: 'a', rewrite: '\\1'}}}}, {TO}", "rewrite.uriRegexRewrite.rewrite", "no group 1"),
    (f"rewrite: {{uriRegexRewrite: {{match: 'a', rewrite: 'b\\'}}}}, {TO}", "rewrite.uriRegexRewrite.rewrite", "written twice"),
    (f"rewrite: {{uriRegexRewrite: {{match: 'a'}}}}, {TO}", "rewrite.uriRegexRewrite", "'rewrite' is required"),
    # Times, retries, faults, mirrors, CORS.
    (f"timeout: 0s, {TO}", "timeout", "at least 1ms"),
    (f"timeout: 0.5ms, {TO}", "timeout", "at least 1ms"),
    (f"timeout: 1.5ms, {TO}", "timeout", "to the millisecond"),
    (f"timeout: -1s, {TO}", "timeout", "expected a duration"),
    (f"timeout: 5, {TO}", "timeout", "expected a duration such as"),
    (f"retries: {{attempts: -1}}, {TO}", "retries.attempts", "found -1"),
    (f"retries: {{attempts: 0, perTryTimeout: 1s}}, {TO}", "retries.perTryTimeout", "without attempts"),
    (f"retries: {{retryOn: 5xx}}, {TO}", "retries.retryOn", "without attempts"),
    (f"retries: {{attempts: 0, retryRemoteLocalities: false}}, {TO}", "retries.retryRemoteLocalities", "without attempts"),
    (f"retries: {{attempts: 1, retryOn: '5xx,whatever'}}, {TO}", "retries.retryOn", "'whatever' is no condition"),
    (f"retries: {{attempts: 1, retryOn: '999'}}, {TO}", "retries.retryOn", "'999' is no condition"),
    (f"retries: {{attempts: 1, backoff: 1us}}, {TO}", "retries.backoff", "at least 1ms"),
    (f"fault: {{}}, {TO}", "fault", "needs a delay or an abort"),
    (f"fault: {{delay: {{exponentialDelay: 1s}}}}, {TO}", "fault.delay.exponentialDelay", "is not supported"),
    (f"fault: {{abort: {{http2Error: x}}}}, {TO}", "fault.abort.http2Error", "is not supported"),
    (f"fault: {{abort: {{httpStatus: 600}}}}, {TO}", "fault.abort.httpStatus", "from 200 to 599"),
    (f"fault: {{abort: {{grpcStatus: NOPE}}}}, {TO}", "fault.abort.grpcStatus", "no status of gRPC"),
    (f"fault: {{abort: {{grpcStatus: OK, httpStatus: 500}}}}, {TO}", "fault.abort.grpcStatus", "beside 'httpStatus'"),
    (f"fault: {{delay: {{fixedDelay: 1s, percentage: {{value: 100.1}}}}}}, {TO}", "fault.delay.percentage.value", "from 0 to 100"),
    (f"fault: {{delay: {{fixedDelay: 1s, percentage: {{value: .nan}}}}}}, {TO}", "fault.delay.percentage.value", "expected a number"),
    (f"fault: {{delay: {{fixedDelay: 1s, percentage: {{value: 0.00001}}}}}}, {TO}", "fault.delay.percentage.value", "at least 0.0001"),
    (f"fault: {{delay: {{fixedDelay: 1s, percent: 101}}}}, {TO}", "fault.delay.percent", "from 0 to 100"),
    (f"mirror: {{host: a}}, mirrors: [{{destination: {{host: a}}}}], {TO}", "mirrors", "beside 'mirror'"),
    (f"mirrors: [{{}}], {TO}", "mirrors[0]", "'destination' is required"),
    (f"mirror: {{host: a}}, mirrorPercent: 101, {TO}", "mirrorPercent", "from 0 to 100"),
    (f"mirror: {{host: a}}, mirrorPercentage: {{value: -1}}, {TO}", "mirrorPercentage.value", "from 0 to 100"),
    (f"corsPolicy: {{allowOrigins: [{{exact: ''}}]}}, {TO}", "corsPolicy.allowOrigins[0]", "an origin that is empty"),
    (f"corsPolicy: {{allowOrigins: [{{}}]}}, {TO}", "corsPolicy.allowOrigins[0]", "an origin that is empty"),
    (f"corsPolicy: {{allowMethods: [get]}}, {TO}", "corsPolicy.allowMethods[0]", "expected one of GET"),
    (f"corsPolicy: {{allowHeaders: ['a b']}}, {TO}", "corsPolicy.allowHeaders[0]", "no name of a header"),
    (f"corsPolicy: {{maxAge: 1.5s}}, {TO}", "corsPolicy.maxAge", "whole seconds"),
    (f"corsPolicy: {{unmatchedPreflights: NEVER}}, {TO}", "corsPolicy.unmatchedPreflights", "expected one of"),
])  # fmt: skip
def test_a_mistake_in_a_route_names_its_field(text: str, field: str, message: str) -> None:
    check(f"{{hosts: [a], http: [{{{text}}}]}}", f"{HTTP}.{field}" if field else HTTP, message)


def test_a_body_is_bounded() -> None:
    check(f"{{hosts: [a], http: [{{directResponse: {{status: 200, body: {{string: {'a' * 1048577}}}}}}}]}}",
          f"{HTTP}.directResponse.body", "1048577 bytes, of at most 1048576")  # fmt: skip


def test_claims_are_matched_at_gateways() -> None:
    """And so are no mistake there, whoever may apply them."""
    read(f"{{hosts: [a], gateways: [gw], http: [{{match: [{{headers: {{'@request.auth.claims.a': {{exact: a}}}}}}], {TO}}}]}}")


def check(spec: str, field: str, message: str) -> None:
    objects, problems = objects_from_yaml(f"{HEAD}spec: {spec}\n")
    assert [problem.field for problem in problems] == [field]
    assert message in problems[0].message
    # It is handed on, so that its status can say so, but never for use.
    assert [obj.problems for obj in objects] == [problems]


@pytest.mark.parametrize(("pattern", "host", "covered", "meet"), [
    ("a.b", "a.b", True, True),
    ("a.b", "c.b", False, False),
    ("*.b", "a.b", True, True),
    ("*.b", "x.a.b", True, True),
    ("*.b", "b", False, False),
    ("*.b", "ab", False, False),
    ("*", "a.b", True, True),
    ("*.b", "*.a.b", True, True),
    ("*.a.b", "*.b", False, True),
    ("a.b", "*.b", False, True),
    ("*.b", "*.c", False, False),
])  # fmt: skip
def test_wildcards_cover_any_depth_but_not_the_domain_itself(pattern: str, host: str, covered: bool, meet: bool) -> None:
    assert covers(pattern, host) is covered
    assert (pattern in patterns_of(host)) is covered
    index = HostIndex([host, "elsewhere"])
    assert (list(index.covered_by(pattern)) == [host, "elsewhere"][: 2 if pattern == "*" else 1]) is covered
    assert (host in index.meeting(pattern)) is meet
    assert (pattern in HostIndex([pattern]).meeting(host)) is meet


def test_a_file_gone_bad_keeps_the_last_good_version_and_names_line_and_field(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    good = f"{HEAD}spec:\n  hosts: [a]\n  http:\n  - timeout: 1s\n    {TO}\n"
    (tmp_path / "n.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
    file.write_text(good)
    store = DirectoryStore([tmp_path])
    store.load()
    before = store.find("VirtualService", "shop", "v")
    file.write_text(good.replace("1s", "soon") + "# longer\n")
    store.load()
    assert store.find("VirtualService", "shop", "v") is before
    assert [(str(problem.file), problem.line, problem.field) for problem in store.problems] == [("v.yaml", 7, "spec.http[0].timeout")]
    file.write_text(good.replace("1s", "25ms") + "# longer still\n")
    store.load()
    assert store.problems == ()
    assert store.find("VirtualService", "shop", "v") is not before
