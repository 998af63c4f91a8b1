"""Whether the rules of a policy are true for a connection: prepared once for a policy, asked for every connection.

Semantics: ztunnel's, described at each kind in `mesh.model.policy`. The preparation turns lists into sets, so
that a policy that names thousands of principals or address ranges costs a connection no more than one that names two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from mesh.model.address import Cidr, IpAddress
from mesh.model.identity import SpiffeId
from mesh.model.policy import Clause, Exact, Match, Prefix, Presence, Rule, ServiceAccountMatch, StringMatch, Suffix


class Facts(NamedTuple):
    """What a match looks at. Without an identity the namespace is empty and there is neither principal nor service account.

    The difference shows only for an empty prefix or suffix: ztunnel lets it hit the namespace of a connection without identity, never
    its principal.
    """

    source_ip: IpAddress
    principal: str | None
    namespace: str
    service_account: tuple[str, str] | None
    destination_ip: IpAddress
    destination_port: int

    @classmethod
    def of(cls, source_ip: IpAddress, source: SpiffeId | None, destination_ip: IpAddress, destination_port: int) -> Facts:
        """The facts of a connection; ``source`` is None for plaintext."""
        if source is None:
            return cls(source_ip, None, "", None, destination_ip, destination_port)
        account = (source.namespace, source.service_account)
        return cls(source_ip, source.principal, source.namespace, account, destination_ip, destination_port)


class PreparedRules:
    """The rules of one policy. No rules never match; a rule without clauses, and a clause without matches, always do."""

    __slots__ = ("_rules",)

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(tuple(_prepare_clause(clause) for clause in rule.clauses) for rule in rules)

    def find_match(self, facts: Facts) -> int | None:
        """The index of the first rule that is true, or None."""
        # Loops rather than any() and all() of generators, here and below: this runs for every rule and connection, at half the cost.
        for index, clauses in enumerate(self._rules):
            for clause in clauses:
                if not _clause_is_true(clause, facts):
                    break
            else:
                return index
        return None


_Hits: TypeAlias = Callable[[Facts], bool]
_Test: TypeAlias = tuple[_Hits, bool]
"""Whether the fact is among the values of a field, and whether it must be. As kinds are joined by AND, each field stands for itself."""
_Clause: TypeAlias = tuple[tuple[_Test, ...], ...] | None
"""Any of these matches, each all of its tests; None is a clause without matches, which is always true."""


def _clause_is_true(clause: _Clause, facts: Facts) -> bool:
    if clause is None:
        return True
    for match in clause:
        for hits, wanted in match:
            if hits(facts) is not wanted:
                break
        else:
            return True
    return False


def _prepare_clause(clause: Clause) -> _Clause:
    if not clause.matches:
        return None
    # A match with no field set is skipped, so a clause of nothing else is false.
    return tuple(tests for match in clause.matches if (tests := tuple(_prepare_match(match))))


def _prepare_match(match: Match) -> Iterator[_Test]:
    # The cheap tests stand first: most matches fail, and a failed test is the last one asked.
    for ports, wanted in ((match.destination_ports, True), (match.not_destination_ports, False)):
        if ports:
            yield _port_test(ports), wanted
    for accounts, wanted in ((match.service_accounts, True), (match.not_service_accounts, False)):
        if accounts:
            yield _service_account_test(accounts), wanted
    for names, wanted in ((match.namespaces, True), (match.not_namespaces, False)):
        if names:
            yield _namespace_test(names), wanted
    for names, wanted in ((match.principals, True), (match.not_principals, False)):
        if names:
            yield _principal_test(names), wanted
    for cidrs, wanted in ((match.source_ips, True), (match.not_source_ips, False)):
        if cidrs:
            yield _source_ip_test(cidrs), wanted
    for cidrs, wanted in ((match.destination_ips, True), (match.not_destination_ips, False)):
        if cidrs:
            yield _destination_ip_test(cidrs), wanted


def _port_test(ports: tuple[int, ...]) -> _Hits:
    among = frozenset(ports)
    return lambda facts: facts.destination_port in among


def _service_account_test(accounts: tuple[ServiceAccountMatch, ...]) -> _Hits:
    among = frozenset((account.namespace, account.service_account) for account in accounts)
    return lambda facts: facts.service_account in among


def _namespace_test(names: tuple[StringMatch, ...]) -> _Hits:
    among = _Strings(names)
    return lambda facts: among.hit(facts.namespace)


def _principal_test(names: tuple[StringMatch, ...]) -> _Hits:
    among = _Strings(names)
    return lambda facts: facts.principal is not None and among.hit(facts.principal)


def _source_ip_test(cidrs: tuple[Cidr, ...]) -> _Hits:
    among = Networks(cidrs)
    return lambda facts: among.hit(facts.source_ip)


def _destination_ip_test(cidrs: tuple[Cidr, ...]) -> _Hits:
    among = Networks(cidrs)
    return lambda facts: among.hit(facts.destination_ip)


class _Strings:
    """Any of several string matches; case-sensitive."""

    __slots__ = ("_exact", "_prefixes", "_presence", "_suffixes")

    def __init__(self, matches: tuple[StringMatch, ...]) -> None:
        self._exact = frozenset(match.value for match in matches if isinstance(match, Exact))
        self._prefixes = tuple(match.value for match in matches if isinstance(match, Prefix))
        self._suffixes = tuple(match.value for match in matches if isinstance(match, Suffix))
        self._presence = any(isinstance(match, Presence) for match in matches)

    def hit(self, value: str) -> bool:
        return (
            value in self._exact or (self._presence and value != "") or value.startswith(self._prefixes) or value.endswith(self._suffixes)
        )


_MAPPED_IPV4 = 0xFFFF
"""The 96 leading bits of ``::ffff:0:0/96`` (RFC 4291 2.5.5.2)."""


class Networks:
    """Any of several address ranges; an address of the other family is in none of them.

    A range of IPv4-mapped IPv6 addresses stands for the IPv4 range: addresses come here unmapped, and a DENY that was written in
    the long form must not be blind to them.
    """

    __slots__ = ("_by_length",)

    def __init__(self, cidrs: tuple[Cidr, ...]) -> None:
        by_length: dict[tuple[int, int], set[int]] = {}
        for cidr in cidrs:
            version, bits, prefix = cidr.version, cidr.max_prefixlen, int(cidr.network_address)
            host_bits = bits - cidr.prefixlen
            if version == 6 and host_bits <= 32 and prefix >> 32 == _MAPPED_IPV4:
                version, prefix = 4, prefix & 0xFFFF_FFFF
            by_length.setdefault((version, host_bits), set()).add(prefix >> host_bits)
        self._by_length = tuple((version, host_bits, frozenset(prefixes)) for (version, host_bits), prefixes in by_length.items())

    def hit(self, ip: IpAddress) -> bool:
        version, value = ip.version, int(ip)
        return any(value >> host_bits in prefixes for of_version, host_bits, prefixes in self._by_length if of_version == version)
