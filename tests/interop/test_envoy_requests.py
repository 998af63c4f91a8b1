"""The same bytes to a waypoint and to Envoy: paths, headers, framing and versions. What differs is in a table, with the reason."""

from __future__ import annotations

import pytest

from mesh.model.l7.waypoint import PathNormalization
from tests.interop.beside_envoy import Case, Http2Case, Outcome, compare, request, told

pytestmark = pytest.mark.interop

NONE, BASE, MERGE, DECODE = PathNormalization

# Paths

PATHS = {
    "/app/../admin": ("/app/../admin", "/admin", "/admin", "/admin"),
    "/app//": ("/app//", "/app//", "/app/", "/app/"),
    "/app/%2f": ("/app/%2f", "/app/%2f", "/app/%2f", "/app/"),
    "/app%2f/": ("/app%2f/", "/app%2f/", "/app%2f/", "/app/"),
    "/xyz%30..//abc": ("/xyz%30..//abc", "/xyz0..//abc", "/xyz0../abc", "/xyz0../abc"),
    "/app/%2E./admin": ("/app/%2E./admin", "/admin", "/admin", "/admin"),
    "/app\\admin": ("/app\\admin", "/app/admin", "/app/admin", "/app/admin"),
    "/app/\\/\\/\\admin": ("/app/\\/\\/\\admin", "/app//////admin", "/app/admin", "/app/admin"),
    "/%2Fapp%5cadmin%5Cabc": ("/%2Fapp%5cadmin%5Cabc", "/%2Fapp%5cadmin%5Cabc", "/%2Fapp%5cadmin%5Cabc", "/app/admin/abc"),
    "/%5Capp%2f%5c%2F%2e%2e%2fadmin%5c\\abc": (
        "/%5Capp%2f%5c%2F%2e%2e%2fadmin%5c\\abc",
        "/%5Capp%2f%5c%2F..%2fadmin%5c/abc",
        "/%5Capp%2f%5c%2F..%2fadmin%5c/abc",
        "/app/admin/abc",
    ),
    "/app//../admin": ("/app//../admin", "/app/admin", "/app/admin", "/app/admin"),
    "/app//../../admin": ("/app//../../admin", "/admin", "/admin", "/admin"),
}
"""Istio's table: what the application sees in each of the four modes."""
MORE_PATHS = (
    *("/", "//", "///", "/.", "/..", "/./", "/../", "/a/.", "/a/..", "/a/b/..", "/a/./b", "/a/.../b", "/...", "/.a/b", "/..a/b", "/a/b."),
    *("/a/b..", "/a/b/../../..", "/a/..//b", "/a//b/../c", "//a", "//a/../b", "/a//%2e%2e/b", "/a/%2e//b", "/a/%2e%2e/b", "/a/%2E%2E/b"),
    *("/a/.%2e/b", "/%2e%2e", "/%2e", "/a/..;/b", "/a/..;x/b", "/a/.;/b", "/a/;/b", "/a;x=1/b", "/a;/..", "/a/%2e%2e;/b", "/A/../B"),
    *("/app#foo", "/app?q#foo", "/app#/../x", "/a?b=/../c//d", "/a/..?b", "/x?a=http://h/../", "/a?%00", "/?", "/?a", "/a?", "/a??"),
    *("/%00", "/a%00b", "/%252e%252e/x", "/%252f", "/%c0%ae%c0%ae/x", "/%c0%2fadmin", "/a%", "/a%2", "/a%zz", "/a%2x", "/%%341", "/%25"),
    *("\\a", "/\\", "/a\\", "/a\\..\\b", "/~a", "/%7Ea", "/%7ea", "/a%20b", "/a+b", "/[a]", "/a|b", "/{a}", "/a^b", "/a`b", '/a"b', "/<a>"),
    *("/a'b", "/a(b)", "/a*b", "/a@b:c", "/a=b&c", "/a,b", "/a!$", "/%2f..%2fa", "/a%2f..%2fb", "/%5c..%5ca", "/%2F", "/%5C"),
    *("http://web.shop/x/../y", "http://other.host/x"),
    *(f"/admin%{byte:02x}" for byte in range(1, 256)),
)
# A byte that ends strings elsewhere is refused as malformed, with a text and in any mode; by Envoy where it normalises.
ENDS = {"/%00", "/a%00b"}
# Envoy leaves escaped dots before a semicolon for a second pass to find.
DOTS = {"/a/%2e%2e;/b"}
# Of a path that is nothing but slashes Envoy leaves two, and the next proxy one.
SLASHES = {"//", "///", "/\\"}
OTHER_PATHS = {NONE: ENDS, BASE: ENDS | DOTS, MERGE: ENDS | DOTS | SLASHES, DECODE: ENDS | DOTS | SLASHES | {"/%2F", "/%5C"}}


@pytest.mark.parametrize("mode", list(PathNormalization))
def test_paths_are_spelt_alike(mode: PathNormalization) -> None:
    paths = [*PATHS, *MORE_PATHS]
    pair = compare([Case(path, request(path)) for path in paths], paths=mode)
    for path, results in PATHS.items():
        expected = results[list(PathNormalization).index(mode)]
        assert [seen.line for seen in pair.ours[path].seen] == [f"GET {expected}"]
    different = pair.different(logged=False)
    assert set(different) == OTHER_PATHS[mode], told(different)


# Headers, framing, versions

CASES: list[Case] = []
DIFFERENT: dict[str, str] = {}
"""Why a case's outcome is another."""


def case(name: str, raw: bytes, why: str = "", *, method: str = "GET", then: bytes = b"") -> None:
    """``why``: the outcome differs, on purpose."""
    assert name not in {each.name for each in CASES}
    CASES.append(Case(name, raw, method, then))
    if why:
        DIFFERENT[name] = why


def with_headers(name: str, *headers: tuple[str, str], why: str = "") -> None:
    case(name, request("/", *headers), why)


SAID_BY_PROXIES = "only a proxy may say it: a client could deceive the application, or the access log"
ONE_READING = "what readers could understand differently is refused (RFC 9112 sections 2.2, 3.2, 5.1 and 5.2)"
TAKEN_AWAY = "a header whose removal would change what the request may do is not taken for one of this hop"
RIGHT = "Envoy refuses what the standard allows"

# Forwarding headers: nothing is appended, what is there stays
with_headers("forwarded for", ("X-Forwarded-For", "56.5.6.7, 72.9.5.6, 98.1.2.3"))
with_headers("forwarded for, twice", ("X-Forwarded-For", "56.5.6.7"), ("X-Forwarded-For", "10.0.0.1"))
with_headers("forwarded for, one of the cluster", ("X-Forwarded-For", "10.0.0.1"))
with_headers("forwarded for nobody", ("X-Forwarded-For", ""))
for proto in ("https", "http", "HTTPS", "ftp", "wss", "ws"):
    with_headers(f"forwarded proto {proto}", ("X-Forwarded-Proto", proto))
with_headers("forwarded proto of nothing", ("X-Forwarded-Proto", ""), why="an empty scheme is no reason not to find a route")
with_headers("forwarded proto, twice", ("X-Forwarded-Proto", "https"), ("X-Forwarded-Proto", "http"))
with_headers("forwarded", ("X-Forwarded-Host", "evil"), ("X-Forwarded-Port", "99"), ("Forwarded", "for=1.2.3.4;host=x"))
with_headers("others' forwarding", ("Via", "1.1 x"), ("X-Real-Ip", "1.1.1.1"), ("Max-Forwards", "3"))
with_headers("client certificate", ("X-Forwarded-Client-Cert", "By=a;URI=b"))
with_headers("request ID", ("X-Request-Id", "my-own"))
with_headers("request ID of the usual form", ("X-Request-Id", "f2b4b1a0-1111-4222-8333-444455556666"))
with_headers("empty request ID", ("X-Request-Id", ""))
for control in (
    *(
        "internal",
        "external-address",
        "retry-on",
        "retry-grpc-on",
        "max-retries",
        "upstream-rq-timeout-ms",
        "upstream-rq-per-try-timeout-ms",
    ),
    *("upstream-alt-stat-name", "upstream-rq-timeout-alt-response", "upstream-stream-duration-ms", "expected-rq-timeout-ms", "force-trace"),
    *("retriable-status-codes", "retriable-header-names", "hedge-on-per-try-timeout", "ip-tags", "original-url", "decorator-operation"),
    *("downstream-service-cluster", "downstream-service-node", "peer-metadata", "original-dst-host", "overloaded", "degraded"),
):
    with_headers(f"x-envoy-{control}", (f"x-envoy-{control}", "1"))
for control in ("original-path", "attempt-count", "is-timeout-retry"):
    with_headers(f"x-envoy-{control}", (f"x-envoy-{control}", "1"), why=SAID_BY_PROXIES)

# Headers of one hop
OTHERS = (("X-A", "1"), ("Authorization", "Bearer x"), ("X-Forwarded-For", "9.9.9.9"))
for name, value in (
    *(("Connection", "x-a"), ("Connection", "close"), ("Connection", "keep-alive, X-A"), ("Keep-Alive", "timeout=5"), ("Connection", "te")),
    *(("Proxy-Connection", "keep-alive"), ("TE", "trailers"), ("TE", "gzip"), ("TE", "trailers, deflate"), ("Upgrade", "h2c")),
    *(("Proxy-Authorization", "Basic x"), ("Proxy-Authenticate", "Basic"), ("Trailer", "x-t"), ("Connection", "upgrade")),
    *(("Connection", ":path"), ("Connection", "x-forwarded-for")),
):
    with_headers(f"{name}: {value}", (name, value), *OTHERS)
for value in ("content-length", "host", "authorization"):
    with_headers(f"Connection: {value}", ("Connection", value), *OTHERS, why=TAKEN_AWAY)
with_headers(
    "settings of HTTP/2", ("HTTP2-Settings", "AAMAAABk"), why="it belongs to an upgrade of this hop alone (RFC 7540 section 3.2.1)"
)
with_headers("te as an option", ("TE", "trailers"), ("Connection", "TE"))
with_headers("upgrade to h2c", ("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABk"))
with_headers(
    *("unknown upgrade", ("Connection", "Upgrade"), ("Upgrade", "foo/2")),
    why="whoever does not know a protocol answers as if nobody had asked for it (RFC 9110 section 7.8)",
)

# Names and values
with_headers("mixed case", ("X-MiXeD", "Value"))
with_headers("underscore and blanks", ("x_under", "1"), ("X-Tabs", "\ta \t"))
with_headers("empty value", ("X-Empty", ""))
with_headers("beyond ASCII", ("X-Latin", "caf\xe9"))
with_headers("one name, several lines", ("X-A", "1"), ("X-B", "2"), ("X-A", "3"))
with_headers("cookies", ("Cookie", "a=1"), ("Cookie", "b=2"))
with_headers("odd name", ("x!#$%&'*+-.^_`|~", "1"))
with_headers("pseudo-header", (":path", "/x"))
with_headers("blank before the colon", ("X-A ", "1"))
with_headers("NUL", ("X-A", "a\0b"))
with_headers("control character", ("X-A", "a\x01b"))
with_headers("as many as there may be", *[(f"x-{number}", "1") for number in range(95)])
with_headers("too many", *[(f"x-{number}", "1") for number in range(101)])
with_headers("a large one", ("x-a", "y" * 70_000))
case("a large path", request("/" + "y" * 70_000))
case("no colon", b"GET / HTTP/1.1\r\nHost: web.shop\r\nnonsense\r\n\r\n")
case("folded", b"GET / HTTP/1.1\r\nHost: web.shop\r\nX-A: 1\r\n 2\r\n\r\n", ONE_READING)
case("line feeds alone", b"GET / HTTP/1.1\nHost: web.shop\n\n", ONE_READING)
case("an empty line first", b"\r\n" + request(), ONE_READING)
case("two blanks", b"GET  / HTTP/1.1\r\nHost: web.shop\r\n\r\n", ONE_READING)
case("blank in the target", b"GET /a b HTTP/1.1\r\nHost: web.shop\r\n\r\n")

# Versions, hosts, methods, targets
case("HTTP/1.0", request(version="1.0"))
case("HTTP/1.0 to be kept", request("/", ("Connection", "keep-alive"), version="1.0"))
for version in ("1.2", "2.0"):
    case(f"HTTP/{version}", request(version=version), "a version that there is not is a mistake, and no old one")
case("HTTP/0.9", b"GET /\r\n\r\n", "a line without a version is a mistake, and no old one")
case("no host", request(host=None), "the answer is that of any malformed request")
for name, host in (("empty host", ""), ("user information", "a@b"), ("port of letters", "a:b")):
    case(name, request(host=host), ONE_READING)
case("two hosts", request("/", ("Host", "other")), ONE_READING)
for name, host in (("port", "web.shop:80"), ("capitals", "WEB.Shop:8080"), ("IPv6", "[fd00::1]:80"), ("last dot", "web.shop.")):
    case(f"host with {name}", request(host=host))
for name, target in (("absolute", "http://other.example:81/x?y"), ("secure", "https://other.example/x"), ("bare", "http://other.example")):
    case(f"{name} target", request(target))
case("target with a query alone", request("http://other.example?x=1"), RIGHT)
case("target with user information", request("http://u:p@other.example/"), ONE_READING)
case("target of another scheme", request("ftp://other.example/"))
case("target *", request("*", method="OPTIONS"), RIGHT, method="OPTIONS")
for method in ("HEAD", "TRACE", "OPTIONS", "POST", "PURGE"):
    case(f"method {method}", request(method=method), method=method)
case("method get", request(method="get"), RIGHT)
case("method that is no token", request(method="G(T"))
case("CONNECT", request("web.shop:80", method="CONNECT"), "it is refused, not looked for: a waypoint is nobody's way to elsewhere")
for method in ("GET", "DELETE", "PATCH"):
    case(f"{method} with a body", request(method=method, body=b"x"), method=method)

# Framing
CHUNKED = ("Transfer-Encoding", "chunked")


def posted(name: str, *headers: tuple[str, str], body: bytes = b"", why: str = "") -> None:
    """``body``: as it is framed."""
    case(name, request("/", *headers, method="POST") + body, why, method="POST")


posted("length 0", ("Content-Length", "0"))
posted("chunked", CHUNKED, body=b"3\r\nabc\r\n0\r\n\r\n")
posted("chunked with extension", CHUNKED, body=b"3;a=b\r\nabc\r\n0\r\n\r\n")
posted("chunked with trailers", CHUNKED, ("TE", "trailers"), body=b"3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n")
posted("chunked in capitals", ("Transfer-Encoding", "Chunked"), body=b"0\r\n\r\n")
posted("coding identity", ("Transfer-Encoding", "identity"))
posted("coding gzip", ("Transfer-Encoding", "gzip, chunked"), body=b"0\r\n\r\n")
posted("length and chunked", CHUNKED, ("Content-Length", "5"), body=b"0\r\n\r\n")
posted("lengths that differ", ("Content-Length", "1"), ("Content-Length", "2"), body=b"x")
posted("lengths that agree", *[("Content-Length", "1")] * 2, body=b"x", why=RIGHT)
for length in ("1, 1", "+1", "-1", "0x1", ""):
    posted(f"length {length!r}", ("Content-Length", length), body=b"x")
posted(
    "chunk of no size", CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n", why="the request had begun upstream: it ends with nothing but the status"
)
case("expects 100", request("/", ("Expect", "100-continue"), ("Content-Length", "3"), method="POST"), method="POST", then=b"abc")
case("expects something else", request("/", ("Expect", "x"), method="POST", body=b"abc"), "417: RFC 9110 section 10.1.1", method="POST")
GRPC = (("content-type", "application/grpc"), ("te", "trailers"))
case("gRPC to HTTP", request("/a.B/C", *GRPC, method="POST", body=b"\0" * 5), "it goes in HTTP/2 whatever the port declares", method="POST")


def test_requests_are_read_and_sent_on_alike() -> None:
    pair = compare(CASES)
    different = pair.different(logged=False)
    assert set(different) == set(DIFFERENT), told({name: pair for name, pair in different.items() if name not in DIFFERENT})
    # Which mistake it was each says in its own words, beyond the first.
    for name in set(pair.ours) - set(DIFFERENT):
        ours, theirs = pair.ours[name], pair.theirs[name]
        assert (ours.flags, ours.details.partition(".")[0]) == (theirs.flags, theirs.details.partition(".")[0]), name


def test_a_head_that_takes_too_long_has_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Istio sets no such time, so that a client may hold a connection of Envoy for ever; ours is said to Envoy here."""
    monkeypatch.setattr("waypoint_py.downstream.HEAD_SECONDS", 0.2)
    begun = (Case("line", b"GET / HT"), Case("fields", b"GET / HTTP/1.1\r\nHost: web.shop\r\nX-A: "))
    pair = compare(begun, manages={"request_headers_timeout": "0.2s"})
    assert {outcome.status for outcome in pair.ours.values()} == {408}
    assert not (different := pair.different()), told(different)


# HTTP/2

BY_HTTP2: list[Http2Case] = []
DIFFERENT_BY_HTTP2: dict[str, str] = {}
PSEUDO = ((":method", "GET"), (":scheme", "http"), (":authority", "web.shop"), (":path", "/"))
POST = ((":method", "POST"), *PSEUDO[1:])


def case2(
    name: str, *headers: tuple[str, str], why: str = "", body: bytes = b"", trailers: tuple[tuple[str, str], ...] | None = None
) -> None:
    BY_HTTP2.append(Http2Case(name, headers, body, trailers))
    if why:
        DIFFERENT_BY_HTTP2[name] = why


def with_pseudo(name: str, why: str = "", **changed: str | None) -> None:
    """Pseudo-headers with these values; None: it is left out."""
    fields = {key.removeprefix(":"): value for key, value in PSEUDO} | changed
    case2(name, *[(f":{key}", value) for key, value in fields.items() if value is not None], why=why)


case2("plain", *PSEUDO)
case2("body", *POST, body=b"abc")
case2("body of the length", *POST, ("content-length", "3"), body=b"abc")
case2("body of another length", *POST, ("content-length", "4"), body=b"abc")
case2("length without a body", *POST, ("content-length", "3"))
case2("trailers", *POST, body=b"abc", trailers=(("x-t", "1"),))
case2("pseudo-header in trailers", *POST, body=b"abc", trailers=((":path", "/x"),))
for name, value in (
    *(("connection", "close"), ("connection", "x-a"), ("keep-alive", "timeout=5"), ("proxy-connection", "keep-alive"), ("upgrade", "h2c")),
    *(("transfer-encoding", "chunked"), ("te", "trailers"), ("te", "gzip"), ("te", "trailers, gzip"), ("X-Upper", "1"), ("x-\x7f", "1")),
    *(("x-a", "a\r\nb: c"), ("x-a", "a\0b"), ("x-a", "a\x01b"), ("", "1"), ("x a", "1"), ("x:a", "1")),
    *(("x-a", ""), ("x-latin", "caf\xe9"), ("x-forwarded-for", "1.2.3.4")),
):
    case2(f"{name!r}: {value!r}", *PSEUDO, (name, value))
for value in (" a", "a "):
    case2(f"blank in {value!r}", *PSEUDO, ("x-a", value), why="malformed (RFC 9113 section 8.2.1)")
case2("expects 100", *PSEUDO, ("expect", "100-continue"), why="there is no body to wait for")
case2("settings of HTTP/2", *PSEUDO, ("http2-settings", "AAMAAABk"), why="it belongs to an upgrade of another hop")
case2("host that agrees", *PSEUDO, ("host", "web.shop"))
case2("host that differs", *PSEUDO, ("host", "other"), why="malformed (RFC 9113 section 8.3.1)")
case2("host alone", *PSEUDO[:2], PSEUDO[3], ("host", "web.shop"))
case2("cookies", *PSEUDO, ("cookie", "a=1"), ("cookie", "b=2"))
case2("pseudo-header last", *PSEUDO[:3], ("x-a", "1"), PSEUDO[3])
case2("pseudo-header twice", *PSEUDO, (":path", "/x"))
case2("unknown pseudo-header", *PSEUDO, (":own", "1"))
case2("pseudo-header of a response", *PSEUDO, (":status", "200"))
for name in ("method", "scheme", "path", "authority"):
    with_pseudo(f"no {name}", **{name: None})
    with_pseudo(f"empty {name}", **{name: ""})
with_pseudo("path without slash", path="x")
with_pseudo("path with blank", path="/a b")
with_pseudo("path beyond ASCII", "no path has such bytes", path="/caf\xe9")
with_pseudo("path with fragment", path="/a#b")
with_pseudo("path to be spelt", path="/a/../b")
with_pseudo("absolute path", path="http://x/")
with_pseudo("asterisk", RIGHT, method="OPTIONS", path="*")
with_pseudo("secure", scheme="https")
with_pseudo("other scheme", "a waypoint carries HTTP", scheme="ftp")
with_pseudo("own method", method="PURGE")
with_pseudo("lower method", method="get")
with_pseudo("bad method", method="G T")
with_pseudo("CONNECT", method="CONNECT")
with_pseudo("user information", authority="a@b")
with_pseudo("port", authority="web.shop:80")


def is_refused(outcome: Outcome) -> bool:
    """Whichever way: Envoy ends the connection of most that we answer 400."""
    return not outcome.seen and (outcome.broken or outcome.status == 400)


def test_requests_of_http2_are_read_and_sent_on_alike() -> None:
    pairs = compare(by_http2=BY_HTTP2).different(logged=False)
    different = {name: pair for name, pair in pairs.items() if not all(map(is_refused, pair))}
    assert set(different) == set(DIFFERENT_BY_HTTP2), told(
        {name: pair for name, pair in different.items() if name not in DIFFERENT_BY_HTTP2}
    )
