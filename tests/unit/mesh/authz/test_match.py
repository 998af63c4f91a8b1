"""The truth table of ztunnel's matching, field by field."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mesh.authz.match import Facts, PreparedRules
from mesh.model.address import parse_cidr, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.policy import Clause, Exact, Match, Prefix, Presence, Rule, ServiceAccountMatch, StringMatch, Suffix


def facts(
    source: str | None = "cluster.local/ns/default/sa/client", *, source_ip: str = "10.0.0.1", ip: str = "10.0.0.2", port: int = 80
) -> Facts:
    identity = SpiffeId.parse(f"spiffe://{source}") if source is not None else None
    return Facts.of(parse_ip(source_ip), identity, parse_ip(ip), port)


def is_true(match: Match, about: Facts) -> bool:
    return PreparedRules([Rule((Clause((match,)),))]).find_match(about) == 0


CLIENT = facts()
OTHER = facts("elsewhere.example/ns/other/sa/stranger", source_ip="192.168.7.7", ip="fd00::2", port=8080)
PLAINTEXT = facts(None)

PRINCIPAL = "cluster.local/ns/default/sa/client"


@pytest.mark.parametrize(
    ("match", "client", "other", "plaintext"),
    [
        (Match(namespaces=(Exact("default"),)), True, False, False),
        (Match(not_namespaces=(Exact("default"),)), False, True, True),
        (Match(namespaces=(Presence(),)), True, True, False),
        (Match(not_namespaces=(Presence(),)), False, False, True),
        (Match(principals=(Exact(PRINCIPAL),)), True, False, False),
        (Match(not_principals=(Exact(PRINCIPAL),)), False, True, True),
        (Match(principals=(Presence(),)), True, True, False),
        (Match(not_principals=(Presence(),)), False, False, True),
        (Match(principals=(Exact(f"spiffe://{PRINCIPAL}"),)), False, False, False),
        (Match(principals=(Prefix("cluster.local/ns/default/"),)), True, False, False),
        (Match(principals=(Suffix("/sa/client"),)), True, False, False),
        (Match(principals=(Exact("nobody"), Suffix("/sa/stranger"))), False, True, False),
        (Match(service_accounts=(ServiceAccountMatch("default", "client"),)), True, False, False),
        (Match(service_accounts=(ServiceAccountMatch("other", "client"),)), False, False, False),
        (Match(not_service_accounts=(ServiceAccountMatch("default", "client"),)), False, True, True),
        (Match(source_ips=(parse_cidr("10.0.0.0/24"),)), True, False, True),
        (Match(not_source_ips=(parse_cidr("10.0.0.0/24"),)), False, True, False),
        (Match(destination_ips=(parse_cidr("fd00::/64"),)), False, True, False),
        (Match(not_destination_ips=(parse_cidr("fd00::/64"),)), True, False, True),
        (Match(destination_ports=(80, 443)), True, False, True),
        (Match(not_destination_ports=(80, 443)), False, True, False),
        # Kinds are joined by AND; within a kind both sides must hold.
        (Match(principals=(Presence(),), destination_ports=(80,)), True, False, False),
        (Match(namespaces=(Presence(),), not_namespaces=(Exact("other"),)), True, False, False),
        (Match(not_principals=(Presence(),), not_destination_ports=(80,)), False, False, False),
        (Match(), False, False, False),
    ],
)
def test_a_match_is_true_for_exactly_whom_it_names(match: Match, client: bool, other: bool, plaintext: bool) -> None:
    assert (is_true(match, CLIENT), is_true(match, OTHER), is_true(match, PLAINTEXT)) == (client, other, plaintext)


def test_every_field_of_a_match_is_looked_at() -> None:
    values: dict[str, object] = {
        "namespaces": Exact("x"),
        "principals": Exact("x"),
        "service_accounts": ServiceAccountMatch("x", "x"),
        "source_ips": parse_cidr("203.0.113.0/24"),
        "destination_ips": parse_cidr("203.0.113.0/24"),
        "destination_ports": 9,
    }
    for field in fields(Match):
        negative = field.name.startswith("not_")
        match = Match(**{field.name: (values[field.name.removeprefix("not_")],)})
        assert is_true(match, CLIENT) is negative, field.name


@pytest.mark.parametrize(
    ("string", "hits", "misses"),
    [
        (Exact("abc"), ["abc"], ["", "ABC", "abcd", "ab"]),
        (Prefix("abc"), ["abc", "abcd"], ["", "ab", "xabc"]),
        (Suffix("abc"), ["abc", "xabc"], ["", "bc", "abcx"]),
        (Presence(), ["abc"], [""]),
        (Prefix(""), ["abc", ""], []),
    ],
)
def test_a_string_match_hits_by_its_kind(string: StringMatch, hits: list[str], misses: list[str]) -> None:
    def hit(value: str) -> bool:
        return is_true(Match(namespaces=(string,)), CLIENT._replace(namespace=value))

    assert [hit(value) for value in hits] == [True] * len(hits)
    assert [hit(value) for value in misses] == [False] * len(misses)


def test_an_empty_prefix_hits_no_principal_of_plaintext_but_its_empty_namespace() -> None:
    assert not is_true(Match(principals=(Prefix(""),)), PLAINTEXT)
    assert not is_true(Match(principals=(Suffix(""),)), PLAINTEXT)
    assert is_true(Match(namespaces=(Prefix(""),)), PLAINTEXT)


@pytest.mark.parametrize(
    ("cidr", "ip", "inside"),
    [
        ("10.0.0.0/24", "10.0.0.255", True),
        ("10.0.0.0/24", "10.0.1.0", False),
        ("10.0.0.7", "10.0.0.7", True),
        ("0.0.0.0/0", "203.0.113.9", True),
        ("0.0.0.0/0", "fd00::1", False),
        ("::/0", "fd00::1", True),
        ("::/0", "10.0.0.1", False),
        ("fd00::/120", "fd00::ff", True),
        ("fd00::/120", "fd00::1ff", False),
        ("::ffff:10.0.0.0/120", "10.0.0.9", True),
        ("::ffff:10.0.0.0/120", "10.0.1.9", False),
        ("::/0", "::1", True),
    ],
)
def test_an_address_is_in_a_range_of_its_own_family_only(cidr: str, ip: str, inside: bool) -> None:
    assert is_true(Match(source_ips=(parse_cidr(cidr),)), facts(source_ip=ip)) is inside


def test_several_ranges_of_several_lengths_are_all_looked_at() -> None:
    match = Match(source_ips=tuple(parse_cidr(text) for text in ("10.1.0.0/16", "10.2.0.0/16", "192.0.2.1", "fd00::/8")))
    inside = ("10.1.2.3", "10.2.255.255", "192.0.2.1", "fdff::1")
    outside = ("10.3.0.0", "192.0.2.2", "fe80::1")
    assert [is_true(match, facts(source_ip=ip)) for ip in (*inside, *outside)] == [True] * 4 + [False] * 3


YES = Match(destination_ports=(80,))
NO = Match(destination_ports=(81,))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], None),
        ([Rule()], 0),
        ([Rule((Clause(),))], 0),
        ([Rule((Clause((Match(),)),))], None),
        ([Rule((Clause((Match(), YES)),))], 0),
        ([Rule((Clause((NO, YES)),))], 0),
        ([Rule((Clause((NO,)), Clause((YES,))))], None),
        ([Rule((Clause((YES,)), Clause((YES,))))], 0),
        ([Rule((Clause((YES,)), Clause()))], 0),
        ([Rule((Clause((NO,)),)), Rule((Clause((YES,)),)), Rule()], 1),
    ],
)
def test_rules_are_or_clauses_are_and_matches_are_or(rules: list[Rule], expected: int | None) -> None:
    assert PreparedRules(rules).find_match(CLIENT) == expected
