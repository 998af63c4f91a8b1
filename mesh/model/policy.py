"""L4 authorization policies (`istio.security.Authorization`), parsed so that evaluation can only narrow, never guess.

A policy that could not be parsed whole is still a value: `unreadable` says why, and evaluation denies by it (fail closed; ztunnel
drops the unreadable part and an ALLOW becomes wider).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from mesh.model.address import Cidr


class Scope(Enum):
    """Wire numbers of `istio.security.Scope`."""

    GLOBAL = 0
    NAMESPACE = 1
    WORKLOAD_SELECTOR = 2


class Action(Enum):
    """Wire numbers of `istio.security.Action`."""

    ALLOW = 0
    DENY = 1


@dataclass(frozen=True, slots=True)
class Exact:
    value: str


@dataclass(frozen=True, slots=True)
class Prefix:
    value: str


@dataclass(frozen=True, slots=True)
class Suffix:
    value: str


@dataclass(frozen=True, slots=True)
class Presence:
    """Any non-empty value."""


StringMatch: TypeAlias = Exact | Prefix | Suffix | Presence


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Match:
    """AND over the kinds; within a kind ``(positive empty or any hits) and (negative empty or none hits)``.

    A match with no field set is skipped: it is never true (ztunnel's rule, kept).
    """

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    source_ips: tuple[Cidr, ...] = ()
    not_source_ips: tuple[Cidr, ...] = ()
    destination_ips: tuple[Cidr, ...] = ()
    not_destination_ips: tuple[Cidr, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()


@dataclass(frozen=True, slots=True)
class Clause:
    """OR over matches; no matches is true."""

    matches: tuple[Match, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """AND over clauses; no clauses matches everything. (``Group`` on Istio's side of the proto, ``Rule`` on ztunnel's.)"""

    clauses: tuple[Clause, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """OR over rules; no rules never matches. ``key`` is the xDS resource name, ``namespace/name``."""

    name: str
    namespace: str
    scope: Scope
    action: Action
    rules: tuple[Rule, ...] = ()
    dry_run: bool = False
    unreadable: str | None = None
    """Why the policy could not be read; such a policy denies whatever it applies to."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"
