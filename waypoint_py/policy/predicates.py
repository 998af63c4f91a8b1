"""One attribute of a policy as a test of a request or a connection, compiled once.

Where a value can be read in a narrower and a wider way, a policy that denies takes the wider one and a policy that allows the narrower
(the other way round for what it must not be): what nobody thought of is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from mesh.authz.match import Networks
from mesh.model.address import InvalidAddress, parse_cidr
from mesh.model.l7.matching import Exact, TextMatch
from mesh.model.l7.policy import Attribute, Predicate
from waypoint_py.client_hello import Hidden
from waypoint_py.policy.facts import Facts, Json, TokenFacts
from waypoint_py.policy.texts import BadPattern, Paths, Texts

Hits: TypeAlias = Callable[[Facts], bool]
Test: TypeAlias = tuple[Hits, bool]
"""Whether the attribute is among the values, and whether it must be."""

HTTP_ONLY: Final = frozenset(
    {
        Attribute.HOST,
        Attribute.METHOD,
        Attribute.PATH,
        Attribute.HEADER,
        Attribute.AUTH_PRINCIPAL,
        Attribute.AUDIENCE,
        Attribute.PRESENTER,
        Attribute.CLAIM,
    }
)
"""What a connection without HTTP in it has nothing of."""


class Uncompilable(ValueError):
    """A predicate that cannot be evaluated: its policy counts as unreadable."""


def compile_predicate(predicate: Predicate, *, allows: bool) -> Test:
    """``allows``: for a policy that allows, which must not hit more than is surely meant. Raises Uncompilable."""
    make = _COMPILERS.get(predicate.attribute)
    if make is None:
        return _unknown(allows)
    if not (predicate.texts or predicate.paths or predicate.cidrs or predicate.ports):
        raise Uncompilable(f"{predicate.attribute.value} without values")
    try:
        return make(predicate, predicate.negated is allows), not predicate.negated
    except (BadPattern, InvalidAddress, UnicodeEncodeError) as exc:
        raise Uncompilable(f"{predicate.attribute.value}: {exc}") from exc


def cost(predicate: Predicate) -> int:
    """The cheap ones first: most tests fail, and the first that fails is the last one asked."""
    return _COSTS.get(predicate.attribute, 9)


def _unknown(allows: bool) -> Test:
    # Nobody knows what it restricts: an ALLOW must not match by it, and a DENY must not be held off by it.
    return (lambda facts: False, True) if allows else (lambda facts: True, True)


# Each makes the test whether the attribute hits; ``generous``: in doubt it does.


def _principal(predicate: Predicate, generous: bool) -> Hits:
    among = _str_texts(predicate)
    return lambda facts: among.hit(facts.peer.principal)


def _namespace(predicate: Predicate, generous: bool) -> Hits:
    among = _str_texts(predicate)
    return lambda facts: among.hit(facts.peer.namespace)


def _service_account(predicate: Predicate, generous: bool) -> Hits:
    among = _str_texts(predicate)
    return lambda facts: among.hit(f"{facts.peer.namespace}/{facts.peer.service_account}")


def _trust_domain(predicate: Predicate, generous: bool) -> Hits:
    among = _str_texts(predicate)
    return lambda facts: among.hit(facts.peer.trust_domain)


def _source_ip(predicate: Predicate, generous: bool) -> Hits:
    among = _networks(predicate)
    return lambda facts: among.hit(facts.connection.peer_address.ip)


def _remote_ip(predicate: Predicate, generous: bool) -> Hits:
    among = _networks(predicate)
    return lambda facts: among.hit(facts.remote_ip())


def _destination_ip(predicate: Predicate, generous: bool) -> Hits:
    among = _networks(predicate)
    return lambda facts: among.hit(facts.connection.destination.ip)


def _destination_port(predicate: Predicate, generous: bool) -> Hits:
    among = frozenset(predicate.ports)
    return lambda facts: facts.connection.destination.port in among


def _sni(predicate: Predicate, generous: bool) -> Hits:
    """Names in TLS, as hosts, have no case, and mean the same with a dot at their end. Of a name that nobody could read anything is true
    that refuses: it may be the one that is meant."""
    among = Texts(predicate.texts, str, ignore_case=True)

    def hits(facts: Facts) -> bool:
        name = facts.sni
        if name is None:
            return False
        if isinstance(name, Hidden):
            return generous
        return among.hit(name) or (generous and name.endswith(".") and among.hit(name[:-1]))

    return hits


def _host(predicate: Predicate, generous: bool) -> Hits:
    """A port, and a dot at the end, make no other host to who serves it: a DENY is not to be got round by them. An ALLOW takes the host as
    it is written, as in Istio."""
    among = Texts(predicate.texts, str.encode, ignore_case=True)

    def hits(facts: Facts) -> bool:
        if facts.request is None:
            return False
        host = facts.request.authority.lower()
        return among.hit(host) or (generous and (bare := _bare(host)) != host and among.hit(bare))

    return hits


def _bare(host: bytes) -> bytes:
    name, colon, port = host.rpartition(b":")
    return (name if colon and (port.isdigit() or not port) else host).rstrip(b".")


def _method(predicate: Predicate, generous: bool) -> Hits:
    among = Texts(predicate.texts, str.encode)
    return lambda facts: facts.request is not None and among.hit(facts.request.method)


def _path(predicate: Predicate, generous: bool) -> Hits:
    # A path is never absent from a request: presence (``*``) may stand among the texts, as for every other attribute.
    paths = Paths(predicate.paths, generous=generous)
    if not predicate.texts:
        return lambda facts: paths.hit(facts.path)
    among = Texts(predicate.texts, str.encode)
    return lambda facts: paths.hit(facts.path) or among.hit(facts.path)


def _header(predicate: Predicate, generous: bool) -> Hits:
    """A header that comes several times: in doubt one of its values is enough, otherwise all of them, or all joined, must hit. An
    application may look at any of them, and a second ``x-role`` must not hide the first from a DENY."""
    if len(predicate.key) != 1:
        raise Uncompilable("request.headers without a name")
    name = predicate.key[0].lower().encode()
    among = Texts(predicate.texts, str.encode)

    def hits(facts: Facts) -> bool:
        values = facts.find_headers(name)
        if len(values) <= 1:
            return bool(values) and among.hit(values[0])
        return among.hit(b",".join(values)) or (any if generous else all)(map(among.hit, values))

    return hits


def _auth_principal(predicate: Predicate, generous: bool) -> Hits:
    """Exact values are compared as issuer and subject where the policy must not hit too much: ``a/b`` with subject ``c`` and ``a`` with
    subject ``b/c`` are written alike, and an issuer chooses its subjects."""
    exact = frozenset(match.value for match in predicate.texts if isinstance(match, Exact) and not match.ignore_case)
    pairs = frozenset(value.rpartition("/")[::2] for value in exact)
    others: list[TextMatch] = [match for match in predicate.texts if not isinstance(match, Exact) or match.ignore_case]
    among = Texts(others, str)

    def hits(facts: Facts) -> bool:
        claims = facts.claims
        if claims is None or (principal := claims.principal) is None:
            return False
        return (claims.issuer, claims.subject) in pairs or (generous and principal in exact) or among.hit(principal)

    return hits


def _audience(predicate: Predicate, generous: bool) -> Hits:
    among = _str_texts(predicate)
    return lambda facts: facts.claims is not None and any(map(among.hit, facts.claims.audiences))


def _presenter(predicate: Predicate, generous: bool) -> Hits:
    among = _str_texts(predicate)
    return lambda facts: facts.claims is not None and facts.claims.presenter is not None and among.hit(facts.claims.presenter)


def _claim(predicate: Predicate, generous: bool) -> Hits:
    if not predicate.key:
        raise Uncompilable("request.auth.claims without a name")
    key = predicate.key
    among = _str_texts(predicate)

    def hits(facts: Facts) -> bool:
        return facts.claims is not None and any(map(among.hit, _texts_of(facts.claims, key)))

    return hits


def _texts_of(claims: TokenFacts, key: tuple[str, ...]) -> Iterable[str]:
    """A claim's texts: itself, or its elements. Numbers and truth values are no texts, as in Istio."""
    found: Json = claims.find_claim(key)
    if isinstance(found, str):
        return (found,)
    return (element for element in found if isinstance(element, str)) if isinstance(found, list) else ()


def _str_texts(predicate: Predicate) -> Texts[str]:
    return Texts(predicate.texts, str)


def _networks(predicate: Predicate) -> Networks:
    return Networks(tuple(map(parse_cidr, predicate.cidrs)))


_COMPILERS: Final[dict[Attribute, Callable[[Predicate, bool], Hits]]] = {
    Attribute.PRINCIPAL: _principal,
    Attribute.NAMESPACE: _namespace,
    Attribute.SERVICE_ACCOUNT: _service_account,
    Attribute.TRUST_DOMAIN: _trust_domain,
    Attribute.SOURCE_IP: _source_ip,
    Attribute.REMOTE_IP: _remote_ip,
    Attribute.DESTINATION_IP: _destination_ip,
    Attribute.DESTINATION_PORT: _destination_port,
    Attribute.SNI: _sni,
    Attribute.HOST: _host,
    Attribute.METHOD: _method,
    Attribute.PATH: _path,
    Attribute.HEADER: _header,
    Attribute.AUTH_PRINCIPAL: _auth_principal,
    Attribute.AUDIENCE: _audience,
    Attribute.PRESENTER: _presenter,
    Attribute.CLAIM: _claim,
}

_COSTS: Final = {
    Attribute.METHOD: 0,
    Attribute.DESTINATION_PORT: 0,
    Attribute.NAMESPACE: 1,
    Attribute.TRUST_DOMAIN: 1,
    Attribute.PATH: 2,
    Attribute.PRINCIPAL: 2,
    Attribute.SERVICE_ACCOUNT: 2,
    Attribute.HOST: 3,
}
