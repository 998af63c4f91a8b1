"""Envoy's JWT and RBAC filters as the judge of ours: the same requests, the same statuses, bodies, details and forwarded requests.

Envoy is configured as Istio does it: a provider for each rule, any of them or nothing, and a policy of RBAC for each rule.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesh.http.message import Request
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix, Present, Suffix, TextMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, JwtRule, PolicyAction, PolicyRule, Predicate, RequestAuthentication
from mesh.model.l7.routing import Origin
from mesh.testing.envoy import Config, free_address, http_config, http_filter, running
from tests.corpus.tokens import KEYS, NOW, TokenCase, sign
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import Judge
from waypoint_py.policy.tokens import Passed, Refused, TokenChecker
from waypoint_py.verdict import LocalReply

pytestmark = pytest.mark.interop

HOST = "h.example"
ADDED_BY_ENVOY = {"x-forwarded-proto", "x-request-id", "x-envoy-expected-rq-timeout-ms", "x-id", "host", "content-length", "connection"}


@dataclass(frozen=True)
class Seen:
    """What came of a request. ``forwarded``: what the application saw of it: path and headers, sorted."""

    status: int
    body: str = ""
    challenge: str = ""
    details: str = ""
    forwarded: tuple[str, tuple[tuple[str, str], ...]] | None = None


# The application, and a client that says exactly what it is told to


class _Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write an answer: Nagle's algorithm holds a second one back for 40 ms

    def do_GET(self) -> None:
        seen = json.dumps({"path": self.path, "headers": [[name.lower(), value] for name, value in self.headers.items()]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(seen)))
        self.end_headers()
        self.wfile.write(seen)

    do_OPTIONS = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _application() -> Iterator[SocketAddress]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield SocketAddress(parse_ip("127.0.0.1"), server.server_port)
        server.shutdown()
        thread.join()


def _read_until(sock: socket.socket, data: bytes, end: bytes) -> tuple[bytes, bytes, bytes]:
    while end not in data:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data.partition(end)


def _ask(address: SocketAddress, name: str, method: str, path: str, host: str, headers: tuple[tuple[str, str], ...]) -> Seen:
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}", "connection: close", f"x-id: {name}", *(f"{k}: {v}" for k, v in headers)]
    with socket.create_connection((str(address.ip), address.port), timeout=30) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        head, _, body = _read_until(sock, b"", b"\r\n\r\n")
        length = next(int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(body) < length:
            body += sock.recv(65536)
    first, *rest = head.decode("latin-1").split("\r\n")
    answered = {key.lower(): value for key, _, value in (line.partition(": ") for line in rest)}
    status = int(first.split()[1])
    if status == 200:
        seen = json.loads(body)
        kept = sorted((key, value) for key, value in seen["headers"] if key not in ADDED_BY_ENVOY)
        return Seen(200, forwarded=(seen["path"], tuple(kept)))
    return Seen(status, body.decode(), answered.get("www-authenticate", ""))


@contextmanager
def _envoy(filters: dict[str, list[Config]]) -> Iterator[tuple[dict[str, SocketAddress], Path]]:
    """An Envoy with a listener for each chain of filters, and its access log."""
    addresses = {name: free_address() for name in filters}
    with tempfile.TemporaryDirectory() as directory, _application() as application:
        log = Path(directory, "access.log")
        config = http_config({addresses[name]: chain for name, chain in filters.items()}, application, log)
        with running(config, next(iter(addresses.values()))):
            yield addresses, log


def _details(log: Path, wanted: int) -> dict[str, str]:
    """Details by request; the log is written once in a while."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) >= wanted:
            return {line["id"]: line["details"] for line in map(json.loads, lines)}
        time.sleep(0.1)
    raise AssertionError(f"{len(lines)} of {wanted} requests in Envoy's log")


# Tokens


def _jwt_filter(rules: tuple[JwtRule, ...]) -> Config:
    providers = {f"origins-{index}": _provider(rule) for index, rule in enumerate(rules)}
    named = [{"provider_name": name} for name in providers]
    missing: Config = {"allow_missing": {}}
    if len(named) > 1:
        either = [{"requires_any": {"requirements": [each, missing]}} for each in named]
        missing = {"requires_all": {"requirements": either}}
    requires = {"requires_any": {"requirements": [*named, missing]}}
    config = {"providers": providers, "rules": [{"match": {"prefix": "/"}, "requires": requires}], "bypass_cors_preflight": True}
    return http_filter("envoy.filters.http.jwt_authn", config, "jwt_authn.v3.JwtAuthentication")


def _provider(rule: JwtRule) -> Config:
    spaces = {"space_delimited_claims": ["scope", "permission", *rule.space_delimited]}
    return {
        "issuer": rule.issuer,
        "audiences": list(rule.audiences),
        "local_jwks": {"inline_string": rule.jwks},
        "forward": rule.forward_token,
        "from_headers": [{"name": header.name, "value_prefix": header.prefix} for header in rule.from_headers],
        "from_params": list(rule.from_params),
        "from_cookies": list(rule.from_cookies),
        "forward_payload_header": rule.payload_header,
        "claim_to_headers": [{"header_name": header, "claim_name": claim} for header, claim in rule.claim_headers],
        "payload_in_metadata": "payload",
        "normalize_payload_in_metadata": spaces,
    }


def _request(method: str, path: str, host: str, headers: tuple[tuple[str, str], ...]) -> Request:
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return Request(method.encode(), b"http", host.encode(), path.encode("latin-1"), pairs)


def _seen(reply: LocalReply) -> Seen:
    challenge = next((value.decode() for name, value in reply.headers if name == b"www-authenticate"), "")
    return Seen(reply.status, reply.body.decode(), challenge, reply.details)


@pytest.fixture
def corpus() -> Any:
    """The corpus made now: Envoy's clock can't be set, and what pytest has imported is as old as the whole run by then."""
    spec = importlib.util.find_spec(TokenCase.__module__)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _ours(corpus: Any, case: TokenCase) -> Seen:
    request = _request(case.method, case.path, HOST, case.headers)
    policy = RequestAuthentication(Origin("RequestAuthentication", "ns", "jwt"), rules=corpus.RULES[case.rules])
    outcome = TokenChecker([policy]).check(request, corpus.NOW)
    if isinstance(outcome, Refused):
        return _seen(outcome.reply)
    assert isinstance(outcome, Passed)
    outcome.changes.apply(request)
    headers = sorted((name.decode(), value.decode("latin-1")) for name, value in request.headers)
    return Seen(200, forwarded=(request.path.decode("latin-1"), tuple(headers)), details="via_upstream")


def test_tokens_are_judged_as_envoy_judges_them(corpus: Any) -> None:
    cases = [case for case in corpus.CASES if case.envoy]
    with _envoy({name: [_jwt_filter(rules)] for name, rules in corpus.RULES.items()}) as (addresses, log):
        answers = {case.name: _ask(addresses[case.rules], case.name, case.method, case.path, HOST, case.headers) for case in cases}
        details = _details(log, len(cases))
    different = {}
    for case in cases:
        theirs = answers[case.name]
        # The query, in which a token may be, is not told back by us.
        challenge = theirs.challenge.replace("?" + case.path.partition("?")[2][: 256 - len(case.path.partition("?")[0]) - 1], "")
        theirs = Seen(theirs.status, theirs.body, challenge, details[case.name], theirs.forwarded)
        if (ours := _ours(corpus, case)) != theirs:
            different[case.name] = (ours, theirs)
    assert different == {}


def test_the_cases_that_are_said_to_differ_from_envoy_do(corpus: Any) -> None:
    """If Envoy comes to agree with us, the corpus should say so."""
    cases = [case for case in corpus.CASES if not case.envoy]
    with _envoy({name: [_jwt_filter(rules)] for name, rules in corpus.RULES.items()}) as (addresses, _):
        answers = {case.name: _ask(addresses[case.rules], case.name, case.method, case.path, HOST, case.headers) for case in cases}
    alike = []
    for case in cases:
        ours, theirs = _ours(corpus, case), answers[case.name]
        if (ours.status, ours.body, ours.forwarded) == (theirs.status, theirs.body, theirs.forwarded):
            alike.append(case.name)
    assert alike == []


# Policies

A = Attribute


def _text(match: TextMatch, *, ignore_case: bool = False) -> Config:
    fold = {"ignore_case": True} if ignore_case else {}
    match match:
        case Exact():
            return {"exact": match.value, **fold}
        case Prefix():
            return {"prefix": match.value, **fold}
        case Suffix():
            return {"suffix": match.value, **fold}
        case Present():
            return {"safe_regex": {"regex": ".+"}}
    raise AssertionError(match)


def _path(match: PathMatch) -> Config:
    if match.kind is PathKind.TEMPLATE:
        matcher = {
            "@type": "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
            "path_template": match.value.replace("{**}", "**").replace("{*}", "*"),
        }
        return {"uri_template": {"name": "uri-template", "typed_config": matcher}}
    kind = "exact" if match.kind is PathKind.EXACT else "prefix"
    return {"url_path": {"path": {kind: match.value}}}


def _header(name: str, match: TextMatch, *, ignore_case: bool = False) -> Config:
    return {"header": {"name": name, "string_match": _text(match, ignore_case=ignore_case)}}


def _cidr(text: str) -> Config:
    address, _, length = text.partition("/")
    return {"address_prefix": address, "prefix_len": int(length or "32")}


def _claim(path: list[str], value: Config) -> Config:
    steps = [{"key": key} for key in ("payload", *path)]
    return {"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": steps, "value": value}}


def _claim_text(path: list[str], match: TextMatch) -> Config:
    one_of = {"or_match": {"value_matchers": [{"string_match": _text(match)}, {"list_match": {"one_of": {"string_match": _text(match)}}}]}}
    return _claim(path, one_of)


def _auth_principal(match: TextMatch) -> Config:
    if isinstance(match, Exact):
        issuer, _, subject = match.value.rpartition("/")
        both = [_claim(["iss"], {"string_match": {"exact": issuer}}), _claim(["sub"], {"string_match": {"exact": subject}})]
    else:
        assert isinstance(match, Present)
        both = [_claim([name], {"string_match": {"safe_regex": {"regex": ".+"}}}) for name in ("iss", "sub")]
    return {"and_ids": {"ids": both}}


def _permission(predicate: Predicate) -> Config:
    match predicate.attribute:
        case A.PATH:
            each = [_path(match) for match in predicate.paths]
        case A.METHOD:
            each = [_header(":method", match) for match in predicate.texts]
        case A.HOST:
            each = [_header(":authority", match, ignore_case=True) for match in predicate.texts]
        case A.DESTINATION_PORT:
            each = [{"destination_port": port} for port in predicate.ports]
        case A.DESTINATION_IP:
            each = [{"destination_ip": _cidr(cidr)} for cidr in predicate.cidrs]
        case _:
            raise AssertionError(predicate)
    found: Config = {"or_rules": {"rules": each}}
    return {"not_rule": found} if predicate.negated else found


def _principal(predicate: Predicate) -> Config:
    match predicate.attribute:
        case A.HEADER:
            each = [_header(predicate.key[0], match) for match in predicate.texts]
        case A.SOURCE_IP:
            each = [{"direct_remote_ip": _cidr(cidr)} for cidr in predicate.cidrs]
        case A.REMOTE_IP:
            each = [{"remote_ip": _cidr(cidr)} for cidr in predicate.cidrs]
        case A.AUTH_PRINCIPAL:
            each = [_auth_principal(match) for match in predicate.texts]
        case A.AUDIENCE:
            each = [_claim_text(["aud"], match) for match in predicate.texts]
        case A.PRESENTER:
            each = [_claim_text(["azp"], match) for match in predicate.texts]
        case A.CLAIM:
            each = [_claim_text(list(predicate.key), match) for match in predicate.texts]
        case _:
            raise AssertionError(predicate)
    found: Config = {"or_ids": {"ids": each}}
    return {"not_id": found} if predicate.negated else found


_OPERATIONS = (A.PATH, A.METHOD, A.HOST, A.DESTINATION_PORT, A.DESTINATION_IP)


def _rbac_filter(policy: AuthorizationPolicy) -> Config:
    def part(conjunctions: tuple[tuple[Predicate, ...], ...], *, permissions: bool) -> list[Config]:
        if not conjunctions:
            return [{"any": True}]
        if permissions:
            return [{"and_rules": {"rules": list(map(_permission, conjunction))}} for conjunction in conjunctions]
        return [{"and_ids": {"ids": list(map(_principal, conjunction))}} for conjunction in conjunctions]

    policies = {}
    for index, rule in enumerate(policy.rules):
        operations = part(rule.operations, permissions=True)
        sources = part(rule.sources, permissions=False)
        here = [_permission(each) for each in rule.conditions if each.attribute in _OPERATIONS]
        there = [_principal(each) for each in rule.conditions if each.attribute not in _OPERATIONS]
        policies[f"ns[{policy.origin.namespace}]-policy[{policy.origin.name}]-rule[{index}]"] = {
            "permissions": [{"and_rules": {"rules": [{"or_rules": {"rules": operations}}, *here]}}],
            "principals": [{"and_ids": {"ids": [{"or_ids": {"ids": sources}}, *there]}}],
        }
    action = "DENY" if policy.action is PolicyAction.DENY else "ALLOW"
    return http_filter("envoy.filters.http.rbac", {"rules": {"action": action, "policies": policies}}, "rbac.v3.RBAC")


def _texts(attribute: Attribute, *matches: TextMatch, key: str = "", negated: bool = False) -> Predicate:
    return Predicate(attribute, negated, tuple(key.split(".")) if key else (), matches)


def _paths(kind: PathKind, *values: str, negated: bool = False) -> Predicate:
    return Predicate(A.PATH, negated, paths=tuple(PathMatch(kind, value) for value in values))


ANY = Present(non_empty=True)
POLICY_RULES = {
    "method": PolicyRule(operations=((_texts(A.METHOD, Exact("GET"), Prefix("PU")),),)),
    "not-method": PolicyRule(operations=((_texts(A.METHOD, Exact("GET"), negated=True),),)),
    "path": PolicyRule(operations=((_paths(PathKind.EXACT, "/a", "/b/c"),), (_paths(PathKind.PREFIX, "/pre"),))),
    "not-path": PolicyRule(operations=((_paths(PathKind.PREFIX, "/a", negated=True), _texts(A.METHOD, Exact("GET"))),)),
    "template": PolicyRule(
        operations=((_paths(PathKind.TEMPLATE, "/allow/admin/{**}", "/foo/{*}/bar/{**}", "/store/{**}/cart"),),),
    ),
    "host": PolicyRule(operations=((_texts(A.HOST, Exact("API.shop"), Suffix(".Example"), Prefix("port:")),),)),
    "header": PolicyRule(conditions=(_texts(A.HEADER, Exact("v"), Suffix("x"), key="x-h"),)),
    "not-header": PolicyRule(conditions=(_texts(A.HEADER, Exact("v"), key="x-h", negated=True),)),
    "header-present": PolicyRule(conditions=(_texts(A.HEADER, ANY, key="x-h"),)),
    "source-ip": PolicyRule(sources=((Predicate(A.SOURCE_IP, cidrs=("127.0.0.0/8",)),),), operations=((_paths(PathKind.EXACT, "/a"),),)),
    "destination-ip": PolicyRule(conditions=(Predicate(A.DESTINATION_IP, True, cidrs=("127.0.0.1",)),)),
    "principal": PolicyRule(sources=((_texts(A.AUTH_PRINCIPAL, Exact("a/s")),),)),
    "any-principal": PolicyRule(sources=((_texts(A.AUTH_PRINCIPAL, ANY),),)),
    "no-principal": PolicyRule(sources=((_texts(A.AUTH_PRINCIPAL, ANY, negated=True),),)),
    "audience": PolicyRule(conditions=(_texts(A.AUDIENCE, Exact("x"), Prefix("pre"), key=""),)),
    "presenter": PolicyRule(conditions=(_texts(A.PRESENTER, Exact("app")),)),
    "claim": PolicyRule(conditions=(_texts(A.CLAIM, Exact("v"), key="c"),)),
    "not-claim": PolicyRule(conditions=(_texts(A.CLAIM, Exact("v"), key="c", negated=True),)),
    "nested-claim": PolicyRule(conditions=(_texts(A.CLAIM, Exact("v"), key="n.m"),)),
    "scope": PolicyRule(conditions=(_texts(A.CLAIM, Exact("read"), key="scope"),)),
    "everything": PolicyRule(),
}


def _bearer(**claims: Any) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {sign(**claims)}"),)


OUTSIDE = ("GET", "/allow/admin/[a]", HOST, ())
TWICE = ("GET", "/", HOST, (("x-h", "v"), ("x-h", "w")))
WITH_PORT = ("GET", "/", "api.shop:80", ())
REQUESTS: list[tuple[str, str, str, tuple[tuple[str, str], ...]]] = [
    *(("GET", path, HOST, ()) for path in ("/", "/a", "/a?b=/c", "/a/", "/b/c", "/prefix", "/pre?x", "/A")),
    *((method, "/a", HOST, ()) for method in ("POST", "PUT", "OPTIONS")),
    *(
        ("GET", f"/foo/{segment}/bar/x", HOST, ())
        for segment in ("a=b", "a%20b", "a*b", "~a", "a:b@c", "a;b", "a'b", "(a)", "a,b", "$&!+", "%2F")
    ),
    *(("GET", f"/allow/admin/{rest}", HOST, ()) for rest in ("a=b/c", "a%20b", "a*b", "a//b")),
    OUTSIDE,
    *(("GET", path, HOST, ()) for path in ("/allow/admin/", "/allow/admin/temp", "/allow/admin/foo/temp.txt", "/allow/admin")),
    *(("GET", path, HOST, ()) for path in ("/allow/admin?param=value", "/foo/buzz/bar/bat", "/foo/bar/bat.txt", "/foo/buzz/bar/")),
    *(("GET", path, HOST, ()) for path in ("/store/foo/cart", "/store/foo/bar/cart", "/store/cart", "/store//cart", "/foo//bar/bat.txt")),
    *(("GET", "/", host, ()) for host in ("api.shop", "API.SHOP", "x.example", "port:80", "example")),
    WITH_PORT,
    *(("GET", "/", HOST, (("x-h", value),)) for value in ("v", "V", "vx", "v,w")),
    TWICE,
    ("GET", "/", HOST, _bearer()),
    ("GET", "/", HOST, _bearer(sub="t")),
    ("GET", "/", HOST, _bearer(sub=None)),
    ("GET", "/", HOST, _bearer(aud="x")),
    ("GET", "/", HOST, _bearer(aud=["y", "prefixed"])),
    ("GET", "/", HOST, _bearer(azp="app")),
    ("GET", "/", HOST, _bearer(c="v")),
    ("GET", "/", HOST, _bearer(c=["u", "v"])),
    ("GET", "/", HOST, _bearer(c=1)),
    ("GET", "/", HOST, _bearer(c={"v": "v"})),
    ("GET", "/", HOST, _bearer(n={"m": "v"})),
    ("GET", "/", HOST, _bearer(n={"m": ["v"]})),
    ("GET", "/", HOST, _bearer(scope="write read")),
    ("GET", "/", HOST, _bearer(scope="readwrite")),
]
JWT = (JwtRule("a", jwks=KEYS),)


def _judged(policy: AuthorizationPolicy, method: str, path: str, host: str, headers: tuple[tuple[str, str], ...], port: int) -> Seen:
    request = _request(method, path, host, headers)
    outcome = TokenChecker([RequestAuthentication(Origin("RequestAuthentication", "ns", "jwt"), rules=JWT)]).check(request, NOW)
    assert isinstance(outcome, Passed)
    outcome.changes.apply(request)
    loopback = parse_ip("127.0.0.1")
    peer = SpiffeId("cluster.local", "ns", "sa")
    connection = Connection(peer, SocketAddress(loopback, 1), SocketAddress(loopback, port), None, None, None)
    judgement = Judge([policy]).judge(request, connection, outcome.facts)
    return Seen(200, details="via_upstream") if judgement.reply is None else _seen(judgement.reply)


@pytest.mark.parametrize("action", [PolicyAction.ALLOW, PolicyAction.DENY])
def test_policies_are_judged_as_envoy_judges_them(action: PolicyAction) -> None:
    policies = {
        name: AuthorizationPolicy(Origin("AuthorizationPolicy", "ns", name), action, rules=(rule,)) for name, rule in POLICY_RULES.items()
    }
    different = {}
    with _envoy({name: [_jwt_filter(JWT), _rbac_filter(policy)] for name, policy in policies.items()}) as (addresses, log):
        answers: dict[str, tuple[Seen, Seen]] = {}
        for name, policy in policies.items():
            for index, request in enumerate(REQUESTS):
                theirs = _ask(addresses[name], f"{name}-{index}", *request)
                answers[f"{name}-{index}"] = (_judged(policy, *request, addresses[name].port), theirs)
        details = _details(log, len(answers))
    stricter = set()
    for name, (ours, theirs) in answers.items():
        seen = Seen(theirs.status, theirs.body, theirs.challenge, details[name])
        request = REQUESTS[int(name.rpartition("-")[2])]
        if request in (TWICE, OUTSIDE, WITH_PORT) and ours.status == 403:
            stricter |= {name.rpartition("-")[0]} if ours != seen else set()
        elif ours != seen:
            different[name, request] = (ours, seen)
    assert different == {}
    # Of a header that comes twice Envoy takes either value for it, we the one for which more is refused. And what a path may not hold
    # makes no template of a DENY policy miss it, as a port hides no host from one.
    assert stricter == ({"header"} if action is PolicyAction.ALLOW else {"not-header", "template", "host"})


FORWARDED = (
    *((), ("9.9.9.9",), ("9.9.9.9, 8.8.8.8",), ("8.8.8.8,9.9.9.9",), ("8.8.8.8", "9.9.9.9"), ("9.9.9.9", "8.8.8.8"), ("9.9.9.9 ",)),
    *(("no address",), ("9.9.9.9:80",), ("9.9.9.9, no address",), ("",), ("9.9.9.9,",), ("9.9.9.999",), ("::ffff:9.9.9.9",)),
)


def test_the_address_that_a_gateway_forwards_is_read_as_envoy_reads_it() -> None:
    """Envoy believes whoever sends it, a waypoint only gateways."""
    rule = PolicyRule(sources=((Predicate(A.REMOTE_IP, cidrs=("9.9.9.9/32",)),),))
    policy = AuthorizationPolicy(Origin("AuthorizationPolicy", "ns", "remote"), PolicyAction.DENY, rules=(rule,))
    loopback = parse_ip("127.0.0.1")
    connection = Connection(
        SpiffeId("cluster.local", "ns", "sa"), SocketAddress(loopback, 1), SocketAddress(loopback, 80), None, None, None
    )
    different = {}
    with _envoy({"remote": [_rbac_filter(policy)]}) as (addresses, _):
        for values in FORWARDED:
            headers = tuple(("x-forwarded-for", value) for value in values)
            theirs = _ask(addresses["remote"], "remote", "GET", "/", HOST, headers).status
            request = _request("GET", "/", HOST, headers)
            believed = Judge([policy], trusts_forwarded=lambda peer: True).judge(request, connection, None).reply
            if (200 if believed is None else believed.status) != theirs:
                different[values] = theirs
            assert Judge([policy]).judge(request, connection, None).reply is None
    assert different == {("::ffff:9.9.9.9",): 200}  # the same address in another spelling is the same address
