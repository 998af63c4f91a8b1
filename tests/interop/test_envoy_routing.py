"""Routing decisions beside Envoy's: the same routes, the same requests, the same outcome.

Routes are written as ours and translated to Envoy's as Istio would. Deliberate differences are not in the corpus, but named where they are
decided: a redirect's scheme without port drops a port that the client wrote, and among several destinations the destination's header
changes come last.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mesh.http.message import Headers, Request, Response
from mesh.model.address import SocketAddress
from mesh.model.l7.matching import (
    Exact,
    HeaderMatch,
    PathKind,
    PathMatch,
    Prefix,
    Present,
    QueryMatch,
    Regex,
    RouteMatch,
    Suffix,
    TextMatch,
)
from mesh.model.l7.routing import (
    Cors,
    Destination,
    DirectResponse,
    Forward,
    HeaderChanges,
    Origin,
    Redirect,
    Rewrite,
    Route,
    WeightedDestination,
)
from mesh.telemetry.operators import DEFAULT_TEXT_FORMAT, InvalidFormat, compile_format, compile_header_value
from mesh.testing.envoy import command, free_address, running
from tests.corpus.facts import Known
from waypoint_py.routing.actions import Chosen, answer, change_reply, change_request, change_response, choose
from waypoint_py.routing.cors import allow_response, answer_preflight, find_allowed_origin
from waypoint_py.routing.match import compile_routes

pytestmark = pytest.mark.interop

ORIGIN = Origin("VirtualService", "shop", "a")
TYPE = "type.googleapis.com/envoy.extensions.filters"
PORT = 85
"""The service's, as redirects know it."""
OVERWRITE = {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


# Our routes as Envoy's.


def string_match(match: TextMatch) -> dict[str, Any]:
    if isinstance(match, Present):
        return {"safe_regex": {"regex": ".+"}}
    if isinstance(match, Regex):
        return {"safe_regex": {"regex": match.value}}
    kind = {Exact: "exact", Prefix: "prefix", Suffix: "suffix"}[type(match)]
    return {kind: match.value, "ignore_case": match.ignore_case}


def header_match(match: HeaderMatch) -> dict[str, Any]:
    how: dict[str, Any] = {"present_match": True} if match.match == Present() else {"string_match": string_match(match.match)}
    if match.invert and match.match != Present():
        how["treat_missing_header_as_empty"] = not match.absent_fails
    return {"name": match.name, "invert_match": match.invert, **how}


def route_match(match: RouteMatch) -> dict[str, Any]:
    path = match.path or PathMatch(PathKind.PREFIX, "/")
    kinds = {PathKind.EXACT: "path", PathKind.PREFIX: "prefix", PathKind.SEGMENTS: "path_separated_prefix"}
    found: dict[str, Any] = {}
    if path.kind is PathKind.REGEX:
        found["safe_regex"] = {"regex": path.value}
    else:
        found[kinds[path.kind]] = path.value.removesuffix("/") if path.kind is PathKind.SEGMENTS else path.value
        found["case_sensitive"] = not path.ignore_case
    special = [
        HeaderMatch(f":{name}", text) for name, text in (("method", match.method), ("authority", match.authority)) if text is not None
    ]
    found["headers"] = [header_match(each) for each in (*special, *match.headers)]
    found["query_parameters"] = [
        {"name": each.name, **({"present_match": True} if each.match == Present() else {"string_match": string_match(each.match)})}
        for each in match.query
    ]
    return found


def header_changes(prefix: str, changes: HeaderChanges) -> dict[str, Any]:
    added = [{"header": {"key": name, "value": value}, **OVERWRITE} for name, value in changes.set]
    added += [{"header": {"key": name, "value": value}} for name, value in changes.add]
    return {f"{prefix}_headers_to_add": added, f"{prefix}_headers_to_remove": list(changes.remove)}


def route_action(route: Route) -> dict[str, Any]:
    action = route.action
    if isinstance(action, DirectResponse):
        return {"direct_response": {"status": action.status, "body": {"inline_bytes": _base64(action.body)} if action.body else {}}}
    if isinstance(action, Redirect):
        codes = {301: "MOVED_PERMANENTLY", 302: "FOUND", 303: "SEE_OTHER", 307: "TEMPORARY_REDIRECT", 308: "PERMANENT_REDIRECT"}
        port = action.port or (PORT if action.request_port else 0)
        fields = {
            "response_code": codes[action.status],
            "scheme_redirect": action.scheme,
            "host_redirect": action.authority,
            "port_redirect": 0 if (port, action.scheme or "http") in ((80, "http"), (443, "https")) else port,
            "path_redirect": action.path,
            "prefix_rewrite": action.prefix,
        }
        return {"redirect": {key: value for key, value in fields.items() if value}}
    fields = {"cluster": action.destinations[0].destination.hostname}
    if (rewrite := action.rewrite) is not None:
        if rewrite.prefix:
            fields["prefix_rewrite"] = rewrite.prefix
        if rewrite.regex is not None:
            fields["regex_rewrite"] = {"pattern": {"regex": rewrite.regex}, "substitution": rewrite.substitution}
        if rewrite.authority:
            fields["host_rewrite_literal"] = rewrite.authority
    return {"route": fields}


def _base64(body: bytes) -> str:
    import base64

    return base64.b64encode(body).decode()


def envoy_routes(routes: Sequence[Route]) -> list[dict[str, Any]]:
    found = []
    for route in routes:
        common = {**route_action(route), **header_changes("request", route.request), **header_changes("response", route.response)}
        if route.cors is not None:
            policy = {
                "@type": f"{TYPE}.http.cors.v3.CorsPolicy",
                "allow_origin_string_match": [string_match(each) for each in route.cors.origins],
                "allow_methods": ",".join(route.cors.methods),
                "allow_headers": ",".join(route.cors.headers),
                "expose_headers": ",".join(route.cors.expose),
                "max_age": "" if route.cors.max_age is None else str(route.cors.max_age),
                "allow_credentials": route.cors.credentials,
                "forward_not_matching_preflights": route.cors.forward_unmatched,
            }
            common["typed_per_filter_config"] = {"envoy.filters.http.cors": policy}
        found += [{"match": route_match(match), **common} for match in route.matches or (RouteMatch(),)]
    return found


def bootstrap(listen: SocketAddress, routes: Sequence[Route], application: SocketAddress, log_format: str | None = None) -> dict[str, Any]:
    manager: dict[str, Any] = {
        "@type": f"{TYPE}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "routing",
        "generate_request_id": False,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": envoy_routes(routes)}]},
        "http_filters": [
            {"name": "envoy.filters.http.cors", "typed_config": {"@type": f"{TYPE}.http.cors.v3.Cors"}},
            {"name": "router", "typed_config": {"@type": f"{TYPE}.http.router.v3.Router", "suppress_envoy_headers": False}},
        ],
    }
    if log_format is not None:
        log = {"@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog", "path": "/dev/null"}
        manager["access_log"] = [
            {"name": "file", "typed_config": {**log, "log_format": {"text_format_source": {"inline_string": log_format}}}}
        ]
    filters = [{"name": "hcm", "typed_config": manager}]
    endpoints = {
        "application": [{"lb_endpoints": [{"endpoint": {"address": _address(application)}}]}],
        "nobody": [],
    }
    clusters = [
        {"name": name, "type": "STATIC", "load_assignment": {"cluster_name": name, "endpoints": each}} for name, each in endpoints.items()
    ]
    listener = {"name": "in", "address": _address(listen), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def _address(address: SocketAddress) -> dict[str, Any]:
    return {"socket_address": {"address": str(address.ip), "port_value": address.port}}


# An application that answers with the request as it came.


@pytest.fixture(scope="module")
def application() -> Iterator[SocketAddress]:
    address = free_address()
    with socket.create_server((str(address.ip), address.port)) as listener:
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        yield address


def _serve(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection:
        waiting = b""
        while data := connection.recv(65536):
            waiting += data
            while b"\r\n\r\n" in waiting:
                head, _, waiting = waiting.partition(b"\r\n\r\n")
                connection.sendall(b"HTTP/1.1 200 OK\r\nserver: app\r\nx-app: 1\r\ncontent-length: %d\r\n\r\n%b" % (len(head), head))


Answer = tuple[int, Headers, bytes]


def ask(address: SocketAddress, request: Request) -> Answer:
    """Envoy's answer: status, headers (names in lower case) and body."""
    lines = [b"%b %b HTTP/1.1" % (request.method, request.path), b"host: " + request.authority]
    lines += [b"%b: %b" % pair for pair in request.headers]
    with socket.create_connection((str(address.ip), address.port), 10) as connection:
        connection.sendall(b"\r\n".join([*lines, b"", b""]))
        raw = b""
        # Not to its end: Envoy closes a second late.
        while not _is_whole(raw) and (data := connection.recv(65536)):
            raw += data
    return _parsed(raw)


def _is_whole(raw: bytes) -> bool:
    if b"\r\n\r\n" not in raw:
        return False
    _, headers, body = _parsed(raw)
    return len(body) == int(dict(headers)[b"content-length"])


def _parsed(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    pairs = [line.partition(b":") for line in lines]
    return int(status.split()[1]) if status.startswith(b"HTTP") else 0, [(name.lower(), value.strip()) for name, _, value in pairs], body


def of(headers: Headers, *names: bytes) -> Headers:
    return sorted(pair for pair in headers if pair[0] in names)


def asked(path: str, *headers: tuple[str, str], method: str = "GET", authority: str = "b") -> Request:
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    return Request(method.encode(), b"http", authority.encode(), path.encode(), pairs)


# Matching.


def named(name: str, *matches: RouteMatch) -> Route:
    return Route(ORIGIN, DirectResponse(200, name.encode()), matches=matches)


def path(kind: PathKind, value: str, ignore_case: bool = False) -> PathMatch:
    return PathMatch(kind, value, ignore_case)


def with_header(match: TextMatch, *, invert: bool = False, where: str = "/h", absent_fails: bool = False) -> RouteMatch:
    return RouteMatch(path=path(PathKind.EXACT, where), headers=(HeaderMatch("v", match, invert, absent_fails),))


MATCHED = (
    named("exact", RouteMatch(path=path(PathKind.EXACT, "/exact"))),
    named("exact in any case", RouteMatch(path=path(PathKind.EXACT, "/CASE", True))),
    named("regex", RouteMatch(path=path(PathKind.REGEX, "/re/[a-z]+"))),
    named("regex of two", RouteMatch(path=path(PathKind.REGEX, "/one|/two"))),
    named("query", RouteMatch(path=path(PathKind.SEGMENTS, "/q"), query=(QueryMatch("a", Exact("1")), QueryMatch("b", Prefix("x"))))),
    named("query present", RouteMatch(path=path(PathKind.SEGMENTS, "/q"), query=(QueryMatch("p", Present()),))),
    named("query empty", RouteMatch(path=path(PathKind.SEGMENTS, "/q"), query=(QueryMatch("e", Exact("")),))),
    named("segments", RouteMatch(path=path(PathKind.SEGMENTS, "/seg"))),
    named("prefix in any case", RouteMatch(path=path(PathKind.PREFIX, "/PRE", True))),
    named("header exact", with_header(Exact("a"))),
    named("header in any case", with_header(Exact("B", ignore_case=True))),
    named("header prefix", with_header(Prefix("pre"))),
    named("header suffix", with_header(Suffix("post"))),
    named("header regex", with_header(Regex("r[0-9]+"))),
    named("header joined", with_header(Exact("c,d"))),
    named("header empty", with_header(Exact(""))),
    named("header present", with_header(Present())),
    named("without exact", with_header(Exact("a"), invert=True, where="/w1")),
    named("without regex", with_header(Regex(".*"), invert=True, where="/w2", absent_fails=True)),
    named("without", with_header(Present(), invert=True, where="/w3")),
    named("method", RouteMatch(path=path(PathKind.SEGMENTS, "/m"), method=Exact("PUT"))),
    named("authority", RouteMatch(path=path(PathKind.SEGMENTS, "/m"), authority=Exact("host:80"))),
    named("path header", RouteMatch(headers=(HeaderMatch(":path", Exact("/p?q=1")),))),
    named("host header", RouteMatch(path=path(PathKind.SEGMENTS, "/m"), headers=(HeaderMatch("host", Prefix("special")),))),
    named("rest of m", RouteMatch(path=path(PathKind.PREFIX, "/m"))),
)
VALUES = ("a", "b", "B", "pre", "prefix", "xpost", "r12", "rx", "c,d", "c", "d", "")
MATCH_CORPUS = [
    *[
        asked(each)
        for each in ("/exact", "/exact/", "/exact?q", "/Exact", "/case", "/CaSe", "/cases", "/re/abc", "/re/ABC", "/re/abc/", "/x/re/a")
    ],
    *[
        asked(each)
        for each in (
            "/one",
            "/two",
            "/onetwo",
            "/seg",
            "/seg/",
            "/segx",
            "/seg/x",
            "/Seg",
            "/pre",
            "/PREx",
            "/",
            "/none",
            "/p?q=1",
            "/p?q=2",
        )
    ],
    *[
        asked("/q?" + each)
        for each in ("a=1&b=xy", "b=x&a=1", "a=1", "a=2&a=1&b=x", "a=1&a=2&b=x", "a=%31&b=x", "%61=1&b=x", "p", "p=1", "P", "e", "e=")
    ],
    *[asked("/q?" + each) for each in ("", "&&a=1&&b=x", "a=1&b=%78", "a=1=1&b=x", "a==1&b=x")],
    *[
        asked(where, *[("v", value) for value in values])
        for where in ("/h", "/w1", "/w2", "/w3")
        for values in [(), *[(v,) for v in VALUES]]
    ],
    *[asked(where, ("v", one), ("v", two)) for where in ("/h", "/w1") for one, two in itertools.permutations(("a", "c", "d", "z", ""), 2)],
    *[
        asked("/m/x", method=method, authority=host)
        for method in ("PUT", "POST")
        for host in ("b", "host", "host:80", "HOST:80", "special.x")
    ],
]


def test_the_same_route_is_found(application: SocketAddress) -> None:
    listen = free_address()
    table = compile_routes(MATCHED)
    with running(bootstrap(listen, MATCHED, application), listen):
        for request in MATCH_CORPUS:
            matched = table.find(request)
            ours = None if matched is None else matched.route.route.action.body
            status, _, body = ask(listen, request)
            theirs = None if status == 404 else body
            assert ours == theirs, (request.method, request.authority, request.path, request.headers)


# Redirects.

REDIRECTS = (
    Redirect(301, path="/x"),
    Redirect(302, request_port=True),
    Redirect(303, "https"),
    Redirect(307, authority="new"),
    Redirect(308, port=81),
    Redirect(301, "https", port=443),
    Redirect(301, authority="new", port=8080, path="/y"),
    Redirect(301, "https", request_port=True),
    Redirect(301, path="/own?q=own"),
    Redirect(301, prefix="/new"),
    Redirect(302, "https", "new", 8443, prefix="/n/"),
)


def test_redirects_lead_to_the_same_place(application: SocketAddress) -> None:
    routes = tuple(
        Route(
            ORIGIN, redirect, matches=(RouteMatch(path=path(PathKind.PREFIX, f"/r{number}/")),), response=HeaderChanges(set=(("x-r", "1"),))
        )
        for number, redirect in enumerate(REDIRECTS)
    )
    listen = free_address()
    table = compile_routes(routes)
    with running(bootstrap(listen, routes, application), listen):
        for number, redirect in enumerate(REDIRECTS):
            # A port that the client wrote is kept or not by other rules where the redirect names a scheme, or the scheme's own port.
            hosts = ["b", "b:80", "[fd00::1]", "[fd00::1]:80"] + ["b:8080"] * (redirect.scheme is None)
            for host, rest in itertools.product(hosts, ("foo", "foo/bar?q=1&r=/", "?q")):
                request = asked(f"/r{number}/{rest}", authority=host)
                matched = table.find(request)
                assert matched is not None
                reply = answer(matched.route, request, matched.path, PORT)
                assert reply is not None
                reply = change_reply(reply, matched.route, None, Known(request))
                status, headers, _ = ask(listen, request)
                assert (reply.status, of(reply.headers, b"location", b"x-r")) == (status, of(headers, b"location", b"x-r")), (
                    redirect,
                    host,
                )


# What the application sees, and what the client.


NO_CHANGES = HeaderChanges()


def forwards(match: PathMatch, rewrite: Rewrite | None = None, request: HeaderChanges = NO_CHANGES, **fields: Any) -> Route:
    to = WeightedDestination(Destination("shop", fields.pop("to", "application"), 80))
    return Route(ORIGIN, Forward((to,), rewrite), matches=(RouteMatch(path=match),), request=request, **fields)


CHANGES = HeaderChanges(
    set=(
        ("x-set", "route"),
        ("x-path", "%REQ(:path)% %REQ(host)% %REQ(x-set)%"),
        ("x-kept", ""),
        ("x-kept-too", "%REQ(none)%"),
        ("x-part", "a%REQ(none)%b"),
    ),
    add=(("x-add", "route"), ("x-set", "more"), ("x-length", "%REQ(x-two?host):1%100%%")),
    remove=("x-gone", "x-set"),
)
SENT = (
    forwards(path(PathKind.PREFIX, "/prefix"), Rewrite(prefix="/new")),
    forwards(path(PathKind.PREFIX, "/strip/"), Rewrite(prefix="/")),
    forwards(path(PathKind.PREFIX, "/double"), Rewrite(prefix="/")),
    forwards(path(PathKind.EXACT, "/exact"), Rewrite(prefix="/whole/path")),
    forwards(path(PathKind.REGEX, "/re/[a-z]+"), Rewrite(prefix="/whole/path")),
    forwards(path(PathKind.PREFIX, "/CASE", True), Rewrite(prefix="/lower")),
    forwards(path(PathKind.PREFIX, "/empty"), Rewrite(regex="x*", substitution="-")),
    forwards(path(PathKind.PREFIX, "/swap"), Rewrite(regex="^/swap/([^/]+)(/.*)$", substitution="\\2/of/\\1")),
    forwards(path(PathKind.PREFIX, "/group"), Rewrite(regex="(a)|(b)", substitution="[\\1\\2\\\\\\0]")),
    forwards(path(PathKind.SEGMENTS, "/seg"), Rewrite(prefix="/other")),
    forwards(path(PathKind.PREFIX, "/host"), Rewrite(authority="new.example:81")),
    forwards(path(PathKind.PREFIX, "/headers"), Rewrite(prefix="/h", authority="new"), CHANGES),
)
SENT_CORPUS = [
    asked(each, ("x-set", "client"), ("x-add", "client"), ("x-kept", "client"), ("x-kept-too", "client"), ("x-gone", "1"), ("x-two", "two"))
    for each in (
        *(
            "/prefix",
            "/prefix/a?b",
            "/prefixed?x=/prefix",
            "/strip/a",
            "/strip/?q",
            "/double",
            "/double/a",
            "/exact?q=1",
            "/re/abc?q=1",
            "/cASe/x",
        ),
        *("/emptyxxaxbd?x", "/swap/foo/v1/api?q", "/swap/foo", "/group/ab/ba", "/seg", "/seg/a?b", "/seg/", "/host/a", "/headers/a?b"),
    )
]


def test_the_application_sees_the_same_request(application: SocketAddress) -> None:
    listen = free_address()
    table = compile_routes(SENT)
    with running(bootstrap(listen, SENT, application), listen):
        for request in SENT_CORPUS:
            _, _, echoed = ask(listen, request)
            _, headers, _ = _parsed(echoed + b"\r\n\r\n")
            ours = request.copy()
            matched = table.find(ours)
            assert matched is not None
            chosen = choose(matched.route, random.Random(1))
            assert isinstance(chosen, Chosen)
            change_request(ours, matched.route, chosen.destination, matched.path, Known(ours))
            names = (b"x-set", b"x-add", b"x-path", b"x-kept", b"x-kept-too", b"x-part", b"x-length", b"x-gone", b"x-two")
            names += (b"x-envoy-original-path", b"x-envoy-original-host")
            assert ours.path == echoed.split(b" ")[1]
            assert ours.authority == dict(headers)[b"host"]
            assert of(ours.headers, *names) == of(headers, *names), request.path


RESPONSE = HeaderChanges(set=(("x-app", "route"), ("x-code", "%RESPONSE_CODE%")), add=(("x-more", "%RESP(x-app)%"),), remove=("x-none",))
CORS = Cors((Exact("http://a"), Regex("https://.*\\.a")), ("GET", "PUT"), ("x-a", "x-b"), ("x-e",), 10, True)
ANSWERED = (
    forwards(path(PathKind.PREFIX, "/ok"), response=RESPONSE),
    forwards(path(PathKind.PREFIX, "/nobody"), response=HeaderChanges(set=(("x-r", "1"),)), to="nobody"),
    forwards(path(PathKind.PREFIX, "/cors"), cors=CORS),
)


def test_the_client_sees_the_same_response(application: SocketAddress) -> None:
    listen = free_address()
    table = compile_routes(ANSWERED)
    with running(bootstrap(listen, ANSWERED, application), listen):
        _, headers, _ = ask(listen, request := asked("/ok"))
        matched = table.find(request)
        assert matched is not None
        response = Response(200, [(b"x-app", b"1")])
        change_response(response, matched.route, None, Known(request, [(b"x-app", b"1")], response_code=200))
        names = (b"x-app", b"x-code", b"x-more")
        assert of(response.headers, *names) == of(headers, *names)
        status, headers, body = ask(listen, asked("/nobody"))
        assert (status, body, of(headers, b"x-r")) == (503, b"no healthy upstream", [(b"x-r", b"1")])


CORS_CORPUS = [
    asked(
        "/cors",
        *[("origin", origin)],
        *[("access-control-request-method", "DELETE"), ("access-control-request-headers", "x-z")][:asks],
        method=method,
    )
    for origin in ("http://a", "https://x.a", "http://b", "https://a", "")
    for method in ("OPTIONS", "GET")
    for asks in (0, 2)
]


def test_cross_origin_requests_get_the_same_answer(application: SocketAddress) -> None:
    listen = free_address()
    matched = compile_routes(ANSWERED).find(asked("/cors"))
    assert matched is not None
    cors = matched.route.cors
    assert cors is not None
    with running(bootstrap(listen, ANSWERED, application), listen):
        for request in CORS_CORPUS:
            status, headers, body = ask(listen, request)
            theirs = sorted(pair for pair in headers if pair[0].startswith(b"access-control-"))
            reply = answer_preflight(cors, request)
            if reply is not None:
                assert (status, theirs, body) == (reply.status, sorted(reply.headers), b"")
                continue
            assert body.startswith(request.method)
            response = Response(200, [])
            allowed = find_allowed_origin(cors, request)
            if allowed is not None:
                allow_response(response, cors, allowed)
            assert theirs == sorted(response.headers)


# Operators.

TIMES = (
    "%Y/%m/%dT%H:%M:%S%z %s",
    "%3f %6f %1f",
    "%b %e %j %Ez %Z %p %I %u %w",
    "%a %A %B %h %y %C %D %F %T %R",
    "%E3S %E4Y",
    "%c|%x|%X|%r|%k|%l|%G|%g|%V|%U|%W",
)


def test_times_are_printed_alike(application: SocketAddress) -> None:
    changes = HeaderChanges(
        set=tuple((f"x-{number}", f"%START_TIME({form})%") for number, form in enumerate(TIMES)),
        add=(("x-us", "%START_TIME(%s%6f)%"), ("x-t", "%START_TIME%")),
    )
    routes = (Route(ORIGIN, DirectResponse(200, b"ok"), response=changes),)
    listen = free_address()
    with running(bootstrap(listen, routes, application), listen):
        _, headers, _ = ask(listen, asked("/"))
    found = dict(headers)
    facts = Known(start_time=int(found[b"x-us"]) / 1e6)
    assert found[b"x-t"].decode() == compile_header_value("%START_TIME%").render(facts)
    for number, form in enumerate(TIMES):
        ours = compile_header_value(f"%START_TIME({form})%").render(facts)
        assert ours == found[b"x-%d" % number].decode()


TAKEN = (
    *("%REQ(?x)%", "%REQ(x?)%", "%REQ(:AUTHORITY?X):10%", "%PROTOCOL%", "%PROTOCOL()%", "%%%RESPONSE_CODE%", "100%%", "%START_TIME()%"),
    *("%START_TIME(%s%5f%4f)%", "%START_TIME(%%)%", "%GRPC_STATUS()%", "%GRPC_STATUS(SNAKE_STRING)%", "%FILTER_STATE(a)%", "%RESP(a?b):3%"),
    *("%DYNAMIC_METADATA(a:b)%", "%TRAILER(x)%", "%UPSTREAM_REMOTE_PORT%", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%", "%TRACE_ID%"),
    *("%RESPONSE_FLAGS_LONG%", "%UPSTREAM_CLUSTER_RAW%", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "%REQUEST_TX_DURATION%", "%QUERY_PARAM(x):3%"),
)
REFUSED = (
    *(
        "%REQ%",
        "%REQ()%",
        "%REQ(a?b?c)%",
        "%REQ(a b)%",
        "%REQ(x):%",
        "%REQ(x",
        "%req(x)%",
        "%PROTOCOL(x)%",
        "%PROTOCOL:3%",
        "%BYTES_SENT():3%",
    ),
    *("%RESPONSE_CODE%%", "%FOO%", "% %", "100%", "%START_TIME:4%", "%GRPC_STATUS(BAD)%", "%GRPC_STATUS:3%", "%GRPC_STATUS_NUMBER:3%"),
    *("%FILTER_STATE%", "%TRAILER%"),
)


def is_taken(config: Path, text: str) -> bool:
    config.write_text(json.dumps(bootstrap(free_address(), (), free_address(), log_format=text)))
    return subprocess.run([*command(config), "--mode", "validate"], capture_output=True, check=False, timeout=60).returncode == 0


def test_envoy_takes_the_formats_that_we_take(tmp_path: Path) -> None:
    for text in (*TAKEN, DEFAULT_TEXT_FORMAT):
        compile_format(text)
    assert is_taken(tmp_path / "envoy.json", " ".join((*TAKEN, DEFAULT_TEXT_FORMAT)))


@pytest.mark.parametrize("text", REFUSED)
def test_envoy_refuses_the_formats_that_we_refuse(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidFormat):
        compile_format(text)
    assert not is_taken(tmp_path / "envoy.json", text)
