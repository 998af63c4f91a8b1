"""AuthorizationPolicy at a waypoint: every source, operation and condition, what absence means, and which rule is named."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.http.message import Headers, Request
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix, Present, Regex, Suffix, TextMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, ExtAuthzGrpc, ExtAuthzHttp, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Origin
from waypoint_py.client_hello import HIDDEN, ServerName
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import Consultation, Judge, Judgement, Judges
from waypoint_py.policy.facts import TokenFacts

A = Attribute
CLIENT = SpiffeId("cluster.local", "shop", "web")
GATEWAY = SpiffeId("cluster.local", "istio-ingress", "gateway")


def connection(peer: SpiffeId = CLIENT, ip: str = "10.0.0.7", destination: str = "10.96.0.1:80") -> Connection:
    return Connection(peer, SocketAddress(parse_ip(ip), 40000), SocketAddress.parse(destination), None, None, None)


def request(
    path: str = "/", method: str = "GET", authority: str = "api.shop", headers: Headers | None = None, **attributes: Any
) -> Request:
    return Request(method.encode(), b"http", authority.encode(), path.encode("latin-1"), headers or [], **attributes)


def token(issuer: str = "https://id", subject: str = "sub", **claims: Any) -> TokenFacts:
    audiences = claims.pop("aud", ())
    return TokenFacts(issuer, subject, tuple(audiences), claims.get("azp"), claims)


def policy(
    action: PolicyAction = PolicyAction.ALLOW, *rules: PolicyRule, name: str = "p", targets: tuple[str, ...] = (), **more: Any
) -> AuthorizationPolicy:
    return AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", name), action, targets, rules, **more)


def pattern(value: str) -> TextMatch:
    """As the control plane reads a value of a policy."""
    if value == "*":
        return Present(non_empty=True)
    if value.endswith("*"):
        return Prefix(value[:-1])
    return Suffix(value[1:]) if value.startswith("*") else Exact(value)


def texts(attribute: Attribute, *values: str, key: tuple[str, ...] = (), negated: bool = False) -> Predicate:
    return Predicate(attribute, negated=negated, key=key, texts=tuple(map(pattern, values)))


def cidrs(attribute: Attribute, *values: str) -> Predicate:
    return Predicate(attribute, cidrs=values)


def paths(*values: str, kind: PathKind = PathKind.EXACT, negated: bool = False) -> Predicate:
    return Predicate(A.PATH, negated=negated, paths=tuple(PathMatch(kind, value) for value in values))


def allows(predicate: Predicate, *, req: Request | None = None, conn: Connection | None = None, claims: TokenFacts | None = None) -> bool:
    judge = Judge([policy(PolicyAction.ALLOW, PolicyRule(conditions=(predicate,)))], trusts_forwarded=lambda peer: peer == GATEWAY)
    return judge.judge(req or request(), conn or connection(), claims).reply is None


MATCHES = [
    # sources
    (texts(A.PRINCIPAL, "cluster.local/ns/shop/sa/web"), {}, True),
    (texts(A.PRINCIPAL, "cluster.local/ns/shop/sa/we"), {}, False),
    (texts(A.PRINCIPAL, "*/ns/shop/sa/web"), {}, True),
    (texts(A.PRINCIPAL, "*web"), {}, True),
    (texts(A.PRINCIPAL, "cluster.local/*"), {}, True),
    (texts(A.PRINCIPAL, "other.domain/*"), {}, False),
    (texts(A.PRINCIPAL, "*"), {}, True),
    (texts(A.NAMESPACE, "shop"), {}, True),
    (texts(A.NAMESPACE, "sh*"), {}, True),
    (texts(A.NAMESPACE, "*op"), {}, True),
    (texts(A.NAMESPACE, "ns"), {}, False),
    (Predicate(A.NAMESPACE, texts=(Regex("s.*p"),)), {}, True),
    (texts(A.SERVICE_ACCOUNT, "shop/web"), {}, True),
    (texts(A.SERVICE_ACCOUNT, "shop/we"), {}, False),
    (texts(A.SERVICE_ACCOUNT, "other/web"), {}, False),
    (texts(A.TRUST_DOMAIN, "cluster.local"), {}, True),
    (texts(A.TRUST_DOMAIN, "*.local"), {}, True),
    (texts(A.TRUST_DOMAIN, "cluster*"), {}, True),
    (texts(A.TRUST_DOMAIN, "local"), {}, False),
    (cidrs(A.SOURCE_IP, "10.0.0.7"), {}, True),
    (cidrs(A.SOURCE_IP, "10.0.0.0/29"), {}, True),
    (cidrs(A.SOURCE_IP, "10.0.1.0/24"), {}, False),
    (cidrs(A.SOURCE_IP, "fd00::/8"), {"conn": connection(ip="fd00::7")}, True),
    (cidrs(A.SOURCE_IP, "fd00::/8"), {}, False),
    (cidrs(A.SOURCE_IP, "::ffff:10.0.0.0/125"), {}, True),
    (cidrs(A.REMOTE_IP, "10.0.0.7"), {"req": request(headers=[(b"x-forwarded-for", b"1.2.3.4")])}, True),
    (cidrs(A.REMOTE_IP, "1.2.3.4"), {"req": request(headers=[(b"x-forwarded-for", b"1.2.3.4")])}, False),
    (
        cidrs(A.REMOTE_IP, "1.2.3.4"),
        {"req": request(headers=[(b"x-forwarded-for", b"9.9.9.9, 1.2.3.4")]), "conn": connection(GATEWAY)},
        True,
    ),
    (
        cidrs(A.REMOTE_IP, "9.9.9.9"),
        {"req": request(headers=[(b"x-forwarded-for", b"9.9.9.9, 1.2.3.4")]), "conn": connection(GATEWAY)},
        False,
    ),
    (cidrs(A.REMOTE_IP, "fd00::1"), {"req": request(headers=[(b"x-forwarded-for", b"fd00::1")]), "conn": connection(GATEWAY)}, True),
    (cidrs(A.REMOTE_IP, "10.0.0.7"), {"req": request(headers=[(b"x-forwarded-for", b"no address")]), "conn": connection(GATEWAY)}, True),
    (cidrs(A.REMOTE_IP, "10.0.0.7"), {"req": request(headers=[(b"x-forwarded-for", b"\xff")]), "conn": connection(GATEWAY)}, True),
    (cidrs(A.REMOTE_IP, "10.0.0.7"), {"conn": connection(GATEWAY)}, True),
    # operations
    (texts(A.HOST, "api.shop"), {}, True),
    (texts(A.HOST, "API.Shop"), {"req": request(authority="aPi.sHOP")}, True),
    (texts(A.HOST, "api.shop:*"), {"req": request(authority="api.shop:80")}, True),
    (texts(A.HOST, "*.SHOP"), {}, True),
    (texts(A.HOST, "*"), {}, True),
    (texts(A.HOST, "*"), {"req": request(authority="")}, False),
    (texts(A.METHOD, "GET"), {}, True),
    (texts(A.METHOD, "get"), {}, False),
    (texts(A.METHOD, "P*"), {"req": request(method="POST")}, True),
    (Predicate(A.DESTINATION_PORT, ports=(80,)), {}, True),
    (Predicate(A.DESTINATION_PORT, ports=(8080,)), {}, False),
    (paths("/a"), {"req": request("/a")}, True),
    (paths("/a"), {"req": request("/a?b=/c")}, True),
    (paths("/a"), {"req": request("/a/")}, False),
    (paths("/A"), {"req": request("/a")}, False),
    (paths("/pkg.Svc/Method"), {"req": request("/pkg.Svc/Method", "POST")}, True),
    (paths("/a", kind=PathKind.PREFIX), {"req": request("/abc")}, True),
    (paths("/a", kind=PathKind.SEGMENTS), {"req": request("/abc")}, False),
    (paths("/a", kind=PathKind.SEGMENTS), {"req": request("/a/b")}, True),
    (paths(".*/end", kind=PathKind.REGEX), {"req": request("/x/end")}, True),
    (paths(".*/end", kind=PathKind.REGEX), {"req": request("/x/end/")}, False),
    (texts(A.PATH, "*"), {}, True),
    (texts(A.PATH, "*.txt"), {"req": request("/a.txt?b")}, True),
    (Predicate(A.PATH, paths=(PathMatch(PathKind.EXACT, "/Ab", ignore_case=True),)), {"req": request("/aB")}, True),
    # conditions
    (texts(A.HEADER, "v", key=("x-a",)), {"req": request(headers=[(b"x-a", b"v")])}, True),
    (texts(A.HEADER, "v", key=("X-A",)), {"req": request(headers=[(b"x-a", b"v")])}, True),
    (texts(A.HEADER, "V", key=("x-a",)), {"req": request(headers=[(b"x-a", b"v")])}, False),
    (texts(A.HEADER, "v,w", key=("x-a",)), {"req": request(headers=[(b"x-a", b"v"), (b"x-a", b"w")])}, True),
    (texts(A.HEADER, "*", key=("x-a",)), {"req": request(headers=[(b"x-a", b"")])}, False),
    (texts(A.HEADER, "*", key=("x-a",)), {"req": request(headers=[(b"x-a", b"\xff")])}, True),
    (texts(A.HEADER, "*", key=("x-a",)), {}, False),
    (texts(A.HEADER, "GET", key=(":method",)), {}, True),
    (texts(A.HEADER, "api.shop", key=("host",)), {}, True),
    (texts(A.HEADER, "websocket", key=("upgrade",)), {"req": request(upgrade=b"websocket")}, True),
    (texts(A.HEADER, "5", key=("content-length",)), {"req": request(content_length=5)}, True),
    (texts(A.HEADER, "100-continue", key=("expect",)), {"req": request(expect_continue=True)}, True),
    (cidrs(A.DESTINATION_IP, "10.96.0.0/16"), {}, True),
    (cidrs(A.DESTINATION_IP, "10.0.0.0/16"), {}, False),
    (texts(A.SNI, "*"), {}, False),
    (texts(A.AUTH_PRINCIPAL, "https://id/sub"), {"claims": token()}, True),
    (texts(A.AUTH_PRINCIPAL, "https://id/*"), {"claims": token()}, True),
    (texts(A.AUTH_PRINCIPAL, "*/sub"), {"claims": token()}, True),
    (texts(A.AUTH_PRINCIPAL, "*"), {"claims": token()}, True),
    (texts(A.AUTH_PRINCIPAL, "*"), {}, False),
    (texts(A.AUTH_PRINCIPAL, "*"), {"claims": token(subject="")}, False),
    (texts(A.AUTH_PRINCIPAL, "https://id/a/b"), {"claims": token("https://id/a", "b")}, True),
    (texts(A.AUTH_PRINCIPAL, "https://id/a/b"), {"claims": token("https://id", "a/b")}, False),
    (texts(A.AUDIENCE, "x"), {"claims": token(aud=("y", "x"))}, True),
    (texts(A.AUDIENCE, "x"), {"claims": token()}, False),
    (texts(A.PRESENTER, "app"), {"claims": token(azp="app")}, True),
    (texts(A.PRESENTER, "app"), {"claims": token()}, False),
    (texts(A.CLAIM, "g", key=("groups",)), {"claims": token(groups=["f", "g"])}, True),
    (texts(A.CLAIM, "g", key=("groups",)), {"claims": token(groups="g")}, True),
    (texts(A.CLAIM, "v", key=("a", "b")), {"claims": token(a={"b": "v"})}, True),
    (texts(A.CLAIM, "v", key=("a.b",)), {"claims": token(**{"a.b": "v"})}, True),
    (texts(A.CLAIM, "v", key=("a", "b")), {"claims": token(a="v")}, False),
    (texts(A.CLAIM, "1", key=("n",)), {"claims": token(n=1)}, False),
    (texts(A.CLAIM, "*", key=("a",)), {"claims": token(a={"b": "v"})}, False),
]


@pytest.mark.parametrize(("predicate", "facts", "expected"), MATCHES, ids=lambda value: str(value) if isinstance(value, Predicate) else "")
def test_a_predicate_hits_what_it_names_and_its_negation_hits_the_rest(predicate: Predicate, facts: dict[str, Any], expected: bool) -> None:
    negated = Predicate(
        predicate.attribute, not predicate.negated, predicate.key, predicate.texts, predicate.paths, predicate.cidrs, predicate.ports
    )
    assert allows(predicate, **facts) is expected
    if predicate.texts != (Exact("https://id/a/b"),):  # read narrowly by an ALLOW, both ways: below
        assert allows(negated, **facts) is not expected


def test_a_subject_with_slashes_cannot_pretend_to_be_of_another_issuer() -> None:
    impostor = token("https://id", "a/b")
    written = texts(A.AUTH_PRINCIPAL, "https://id/a/b")
    denies = Judge([policy(PolicyAction.DENY, PolicyRule(conditions=(written,)))])
    assert not allows(written, claims=impostor)
    assert not allows(texts(A.AUTH_PRINCIPAL, "https://id/a/b", negated=True), claims=impostor)
    assert denies.judge(request(), connection(), impostor).reply is not None


@pytest.mark.parametrize("values", [(b"v", b"w"), (b"w", b"v")])
def test_a_second_value_of_a_header_hides_the_first_from_no_policy(values: tuple[bytes, ...]) -> None:
    asked = request(headers=[(b"x-role", value) for value in values])
    named, others = texts(A.HEADER, "v", key=("x-role",)), texts(A.HEADER, "v", key=("x-role",), negated=True)
    for predicate in (named, others):
        rule = PolicyRule(conditions=(predicate,))
        assert Judge([policy(PolicyAction.ALLOW, rule)]).judge(asked, connection(), None).reply is not None
        assert Judge([policy(PolicyAction.DENY, rule)]).judge(asked, connection(), None).reply is not None
    assert allows(texts(A.HEADER, "v", "w", key=("x-role",)), req=asked)


TEMPLATES = ("/allow/admin/{**}", "/foo/{*}/bar/{**}", "/store/{**}/cart")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *((path, True) for path in ("/allow/admin/", "/allow/admin/temp", "/allow/admin/temp.txt", "/allow/admin/foo/temp.txt")),
        *((path, True) for path in ("/foo/buzz/bar/bat.txt", "/foo/buzz/bar/bat/fuzz.txt", "/foo/buzz/bar/bat")),
        *((path, True) for path in ("/store//cart", "/store/foo/cart", "/store/foo/bar/cart", "/foo/a=b/bar/")),
        *((path, False) for path in ("/allow/admin", "/allow/admin?param=value", "/allow", "/allow/user/", "/foo/bar/bat.txt")),
        *((path, False) for path in ("/foo//bar/bat.txt", "/store/cart", "/allow/adminx/", "/foo/bar")),
    ],
)
def test_a_path_template_matches_as_istio_says(path: str, expected: bool) -> None:
    assert allows(paths(*TEMPLATES, kind=PathKind.TEMPLATE), req=request(path)) is expected
    rule = PolicyRule(operations=((paths(*TEMPLATES, kind=PathKind.TEMPLATE),),))
    assert (Judge([policy(PolicyAction.DENY, rule)]).judge(request(path), connection(), None).reply is not None) is expected


@pytest.mark.parametrize("path", ["/foo/\xff/bar/", '/foo/"/bar/', "/foo/[/bar/x|y"])
def test_a_template_lets_nothing_odd_in_and_nothing_odd_past(path: str) -> None:
    template = paths("/foo/{*}/bar/{**}", kind=PathKind.TEMPLATE)
    assert not allows(template, req=request(path))
    assert Judge([policy(PolicyAction.DENY, PolicyRule(conditions=(template,)))]).judge(request(path), connection(), None).reply is not None


CROWD = tuple(PolicyRule(operations=((paths(f"/crowd/{number}"),),)) for number in range(20))


@pytest.mark.parametrize(
    "predicate",
    [
        Predicate(A.PATH, paths=(PathMatch(PathKind.EXACT, "/A/b", ignore_case=True), PathMatch(PathKind.EXACT, "/other"))),
        Predicate(A.PATH, paths=(PathMatch(PathKind.PREFIX, "/A", ignore_case=True),)),
        Predicate(A.PATH, paths=(PathMatch(PathKind.REGEX, "/a/."),)),
        Predicate(A.PATH, paths=(PathMatch(PathKind.TEMPLATE, "/{*}/b"), PathMatch(PathKind.EXACT, "/other"))),
        Predicate(A.PATH, paths=(PathMatch(PathKind.TEMPLATE, "/a/{*}"), PathMatch(PathKind.EXACT, "/other"))),
        Predicate(A.PATH, paths=(PathMatch(PathKind.SEGMENTS, "/a"),)),
        Predicate(A.PATH, paths=(PathMatch(PathKind.EXACT, "/other"),), texts=(Suffix("b"),)),
        Predicate(A.METHOD, texts=(Exact("get", ignore_case=True),)),
        Predicate(A.PRINCIPAL, texts=(Exact("cluster.local/NS/shop/sa/web", ignore_case=True), Exact("other"))),
        Predicate(A.PRINCIPAL, texts=(Exact("other"), Suffix("/web"))),
        texts(A.NAMESPACE, "shop", "other"),
        texts(A.SERVICE_ACCOUNT, "shop/web"),
        Predicate(A.DESTINATION_PORT, ports=(81, 80)),
    ],
)
def test_a_rule_is_found_in_a_crowd_however_it_is_written(predicate: Predicate) -> None:
    for rule in (PolicyRule(sources=((predicate,),)), PolicyRule(operations=((predicate,),)), PolicyRule(conditions=(predicate,))):
        assert judge(policy(PolicyAction.ALLOW, *CROWD, rule, *CROWD), req=request("/a/b")).policy == "ns[shop]-policy[p]-rule[20]"


def judge(*policies: AuthorizationPolicy, req: Request | None = None, claims: TokenFacts | None = None) -> Judgement:
    return Judge(policies).judge(req or request(), connection(), claims)


HIT = PolicyRule(operations=((texts(A.METHOD, "GET"),),))
MISS = PolicyRule(operations=((texts(A.METHOD, "POST"),),))
ALLOW, DENY, AUDIT, CUSTOM = PolicyAction.ALLOW, PolicyAction.DENY, PolicyAction.AUDIT, PolicyAction.CUSTOM


def test_without_policies_everything_is_let_through() -> None:
    assert judge().reply is None


def test_a_denial_is_403_and_names_policy_and_rule() -> None:
    judgement = judge(policy(DENY, MISS, HIT, name="d"), policy(ALLOW, HIT))
    reply = judgement.reply
    assert reply is not None
    assert (reply.status, reply.body, reply.flags) == (403, b"RBAC: access denied", ())
    assert reply.details == "rbac_access_denied_matched_policy[ns[shop]-policy[d]-rule[1]]"
    assert reply.policy == judgement.policy == "ns[shop]-policy[d]-rule[1]"
    assert "denied by ns[shop]-policy[d]-rule[1]" in judgement.because


def test_an_allow_that_matches_is_named() -> None:
    judgement = judge(policy(ALLOW, MISS, name="a"), policy(ALLOW, MISS, HIT, name="b"))
    assert (judgement.reply, judgement.policy) == (None, "ns[shop]-policy[b]-rule[1]")


def test_an_allow_that_does_not_match_denies_the_rest() -> None:
    reply = judge(policy(ALLOW, MISS)).reply
    assert reply is not None
    assert reply.details == "rbac_access_denied_matched_policy[none]"
    assert reply.policy == ""


@pytest.mark.parametrize(
    ("rules", "allowed"), [((), False), ((PolicyRule(),), True)], ids=["no rules at all", "a rule that restricts nothing"]
)
def test_an_allow_without_rules_allows_nothing_and_an_empty_rule_everything(rules: tuple[PolicyRule, ...], allowed: bool) -> None:
    assert (judge(policy(ALLOW, *rules)).reply is None) is allowed


def test_a_deny_without_rules_denies_nothing() -> None:
    assert judge(policy(DENY)).reply is None


def test_an_audit_policy_marks_and_decides_nothing() -> None:
    judgement = judge(policy(AUDIT, HIT, name="seen"), policy(AUDIT, MISS, name="unseen"))
    assert (judgement.reply, judgement.audited) == (None, ("ns[shop]-policy[seen]-rule[0]",))


@pytest.mark.parametrize("action", list(PolicyAction))
def test_a_policy_that_could_not_be_read_denies_and_says_why(action: PolicyAction) -> None:
    broken = policy(action, HIT, unreadable="spec.rules[0]: no such field")
    judgement = judge(broken, policy(ALLOW, PolicyRule(), name="all"))
    assert judgement.reply is not None
    assert "spec.rules[0]: no such field" in judgement.because
    assert Judge([broken]).judge_connection(connection()).reply is not None


@pytest.mark.parametrize(
    "predicate",
    [
        Predicate(A.NAMESPACE, texts=(Regex("("),)),
        Predicate(A.SOURCE_IP, cidrs=("10.0.0.0/99",)),
        Predicate(A.HEADER, texts=(Exact("v"),)),
        Predicate(A.CLAIM, texts=(Exact("v"),)),
        Predicate(A.METHOD),
        Predicate(A.PATH, paths=(PathMatch(PathKind.TEMPLATE, "/a{*}"),)),
    ],
)
def test_a_policy_that_cannot_be_compiled_denies(predicate: Predicate) -> None:
    assert judge(policy(DENY, PolicyRule(conditions=(predicate,))), policy(ALLOW, PolicyRule(), name="all")).reply is not None


@pytest.mark.parametrize("negated", [False, True])
def test_an_unknown_key_opens_nothing(negated: bool) -> None:
    unknown = Predicate(A.UNKNOWN, negated=negated, key=("destination.user",), texts=(Exact("x"),))
    assert judge(policy(ALLOW, PolicyRule(conditions=(unknown,)))).reply is not None
    assert judge(policy(DENY, PolicyRule(operations=HIT.operations, conditions=(unknown,)))).reply is not None
    assert judge(policy(DENY, PolicyRule(operations=MISS.operations, conditions=(unknown,)))).reply is None


def test_parts_of_a_rule_must_all_be_true_and_of_alternatives_one() -> None:
    rule = PolicyRule(
        sources=((texts(A.NAMESPACE, "x"),), (texts(A.NAMESPACE, "shop"), texts(A.PRINCIPAL, "*web"))),
        operations=((texts(A.METHOD, "GET"), paths("/b")), (paths("/a"),)),
        conditions=(texts(A.HEADER, "v", key=("h",)),),
    )
    assert judge(policy(ALLOW, rule), req=request("/a", headers=[(b"h", b"v")])).reply is None
    assert judge(policy(ALLOW, rule), req=request("/b", headers=[(b"h", b"v")])).reply is None
    assert judge(policy(ALLOW, rule), req=request("/b", "POST", headers=[(b"h", b"v")])).reply is not None
    assert judge(policy(ALLOW, rule), req=request("/a")).reply is not None


def test_a_deny_of_requests_without_token_holds_until_there_is_one() -> None:
    rule = PolicyRule(sources=((texts(A.AUTH_PRINCIPAL, "*", negated=True),),))
    assert judge(policy(DENY, rule)).reply is not None
    assert judge(policy(DENY, rule), claims=token()).reply is None


# Dry run


def test_a_dry_run_is_reported_and_enforced_never() -> None:
    judgement = judge(policy(DENY, HIT, name="d", dry_run=True), policy(ALLOW, MISS, name="a", dry_run=True))
    assert judgement.reply is None
    assert [(verdict.denies, verdict.policy) for verdict in judgement.dry_run] == [(True, "ns[shop]-policy[d]-rule[0]"), (True, "")]


def test_a_dry_run_allow_that_matches_says_so() -> None:
    judgement = judge(policy(ALLOW, HIT, name="a", dry_run=True), policy(ALLOW, MISS, name="real"))
    assert judgement.reply is not None
    assert [(verdict.denies, verdict.policy) for verdict in judgement.dry_run] == [(False, "ns[shop]-policy[a]-rule[0]")]


def test_a_dry_run_that_could_not_be_read_only_says_so() -> None:
    judgement = judge(policy(DENY, unreadable="odd", dry_run=True))
    assert judgement.reply is None
    assert "odd" in judgement.dry_run[0].because


@pytest.mark.parametrize("authority", ["secret.example:80", "Secret.Example.", "secret.example.:8080", "secret.example:"])
def test_a_deny_of_a_host_is_not_got_round_by_a_port_or_a_dot(authority: str) -> None:
    named = PolicyRule(operations=((texts(A.HOST, "secret.example"),),))
    suffix = PolicyRule(operations=((texts(A.HOST, "*.example"),),))
    others = PolicyRule(operations=((texts(A.HOST, "secret.example", negated=True),),))
    asked = request(authority=authority)
    assert judge(policy(DENY, named), req=asked).reply is not None
    assert judge(policy(DENY, suffix), req=asked).reply is not None
    assert judge(policy(DENY, others), req=asked).reply is not None, "as it is written it is another"
    assert judge(policy(ALLOW, named), req=asked).reply is not None
    assert judge(policy(ALLOW, others), req=asked).reply is not None


# Connections


def on_connection(*policies: AuthorizationPolicy, sni: ServerName = None) -> Judgement:
    return Judge(policies).judge_connection(connection(), sni)


def test_an_allow_that_asks_for_http_is_gone_on_a_connection() -> None:
    rule = PolicyRule(sources=((texts(A.NAMESPACE, "shop"),),), operations=((texts(A.METHOD, "GET"),),))
    assert on_connection(policy(ALLOW, rule)).reply is not None
    assert on_connection(policy(ALLOW, rule, PolicyRule(sources=rule.sources))).policy == "ns[shop]-policy[p]-rule[1]"


def test_a_deny_that_asks_for_http_denies_more_on_a_connection() -> None:
    rule = PolicyRule(sources=((texts(A.NAMESPACE, "shop"),),), operations=((texts(A.METHOD, "POST"),),))
    other = PolicyRule(sources=((texts(A.NAMESPACE, "other"),),), operations=((texts(A.METHOD, "POST"),),))
    assert on_connection(policy(DENY, rule)).reply is not None
    assert on_connection(policy(DENY, other)).reply is None
    assert on_connection(policy(AUDIT, rule)).audited == ("ns[shop]-policy[p]-rule[0]",)


@pytest.mark.parametrize(
    "predicate",
    [
        texts(A.PRINCIPAL, "*web"),
        cidrs(A.SOURCE_IP, "10.0.0.7"),
        cidrs(A.REMOTE_IP, "10.0.0.7"),
        cidrs(A.DESTINATION_IP, "10.96.0.1"),
        Predicate(A.DESTINATION_PORT, ports=(80,)),
        texts(A.SERVICE_ACCOUNT, "shop/web"),
        texts(A.TRUST_DOMAIN, "cluster.local"),
        texts(A.SNI, "*.shop"),
    ],
)
def test_what_a_connection_knows_is_judged_on_it(predicate: Predicate) -> None:
    assert on_connection(policy(ALLOW, PolicyRule(conditions=(predicate,))), sni="api.shop").reply is None
    assert on_connection(policy(DENY, PolicyRule(conditions=(predicate,))), sni="api.shop").reply is not None


def test_a_name_in_tls_that_nobody_could_read_is_in_doubt_the_one_that_is_refused() -> None:
    named = PolicyRule(conditions=(texts(A.SNI, "secret.example"),))
    others = PolicyRule(conditions=(texts(A.SNI, "open.example", negated=True),))
    for rule in (named, others):
        assert on_connection(policy(DENY, rule), sni=HIDDEN).reply is not None
    assert on_connection(policy(ALLOW, named), sni=HIDDEN).reply is not None
    assert on_connection(policy(ALLOW, PolicyRule(conditions=(texts(A.SNI, "x", negated=True),))), sni=HIDDEN).reply is not None
    assert on_connection(policy(DENY, named), sni=None).reply is None


@pytest.mark.parametrize("sni", ["secret.example", "secret.example."])
def test_a_name_in_tls_has_no_case_and_a_dot_hides_it_from_no_deny(sni: str) -> None:
    assert on_connection(policy(DENY, PolicyRule(conditions=(texts(A.SNI, "Secret.Example"),))), sni=sni).reply is not None
    allowed = on_connection(policy(ALLOW, PolicyRule(conditions=(texts(A.SNI, "Secret.Example"),))), sni=sni).reply is None
    assert allowed == (not sni.endswith("."))


# Services


def test_policies_are_for_the_services_they_name_or_for_all() -> None:
    judges = Judges([policy(DENY, HIT, name="one", targets=("shop/a", "shop/a")), policy(DENY, MISS, name="all")])
    verdicts = {
        service: [judges.judge_of(service).judge(request(method=method), connection(), None).reply is None for method in ("GET", "POST")]
        for service in ("shop/a", "shop/b", "")
    }
    assert verdicts == {"shop/a": [False, False], "shop/b": [True, False], "": [True, False]}
    assert judges.judge_of("shop/b") is judges.judge_of("shop/c")


# CUSTOM

HTTP = ExtAuthzHttp("auth", "auth.svc", 8000)
GRPC = ExtAuthzGrpc("auth", "auth.svc", 9000)


def consult(*policies: AuthorizationPolicy, method: str = "GET") -> Consultation | Judgement | None:
    return Judge(policies).find_authorizer(request(method=method), connection())


def test_a_custom_policy_that_matches_names_its_authorizer() -> None:
    asked = consult(policy(CUSTOM, HIT, name="c", provider=HTTP, provider_name="ext"))
    assert isinstance(asked, Consultation)
    assert (asked.provider, asked.provider_name, asked.policy) == (HTTP, "ext", "ns[shop]-policy[c]-rule[0]")
    assert consult(policy(CUSTOM, HIT, provider=HTTP, provider_name="ext"), method="POST") is None
    assert consult(policy(DENY, HIT)) is None


def test_an_unknown_provider_denies_what_its_rules_match() -> None:
    refused = consult(policy(CUSTOM, HIT, name="c", provider_name="nobody"))
    assert isinstance(refused, Judgement)
    assert refused.reply is not None
    assert (refused.reply.status, refused.reply.body) == (403, b"RBAC: access denied")
    assert "'nobody'" in refused.because
    assert consult(policy(CUSTOM, HIT, name="c", provider_name="nobody"), method="POST") is None


def test_several_providers_for_one_service_deny_what_either_matches() -> None:
    policies = (
        policy(CUSTOM, HIT, name="c", provider=HTTP, provider_name="one"),
        policy(CUSTOM, MISS, name="d", provider=GRPC, provider_name="two"),
    )
    assert isinstance(consult(*policies), Judgement)
    assert isinstance(consult(*policies, method="POST"), Judgement)
    assert consult(*policies, method="PUT") is None


def test_one_provider_in_several_policies_is_asked_once() -> None:
    policies = [policy(CUSTOM, HIT, name=name, provider=HTTP, provider_name="one") for name in ("c", "d")]
    assert isinstance(consult(*policies), Consultation)


def test_connections_are_shown_to_grpc_authorizers_alone() -> None:
    http = Judge([policy(CUSTOM, HIT, provider=HTTP, provider_name="one")])
    grpc = Judge([policy(CUSTOM, MISS, provider=GRPC, provider_name="two")])
    unknown = Judge([policy(CUSTOM, MISS, provider_name="three")])
    assert http.find_connection_authorizer(connection()) is None
    undeclared = http.find_connection_authorizer(connection(), declared=False)
    assert isinstance(undeclared, Judgement), "whoever has a choice could get round the authorizer by what it says first"
    assert undeclared.reply is not None
    assert "declare the port" in undeclared.because
    assert isinstance(grpc.find_connection_authorizer(connection(), declared=False), Consultation)
    elsewhere = policy(CUSTOM, PolicyRule(sources=((cidrs(A.SOURCE_IP, "1.2.3.4"),),)), provider=HTTP, provider_name="one")
    assert Judge([elsewhere]).find_connection_authorizer(connection(), declared=False) is None
    assert isinstance(grpc.find_connection_authorizer(connection()), Consultation)
    assert isinstance(unknown.find_connection_authorizer(connection()), Judgement)
