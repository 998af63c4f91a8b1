"""The rule and the route that bring an application's replies back to the agent, in the calling thread's network namespace.

A reply goes to the client's address, which is another host's; marked packets are therefore routed by a table that calls every address
local, and end at the agent's transparent socket. Rules and routes are Istio's. Blocking; pyroute2 runs an event loop inside each call.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mesh.model.ports import INBOUND_CONNECTION_MARK, INBOUND_ROUTE_TABLE, INBOUND_RULE_PRIORITY, MARK_MASK

_FAMILIES: Final[Mapping[int, str]] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_RTN_LOCAL: Final = 2
_RT_SCOPE_HOST: Final = 254
_LOOPBACK: Final = 1
"""The kernel gives ``lo`` this index in every namespace."""
_RULE: Final[Mapping[str, int]] = {
    "priority": INBOUND_RULE_PRIORITY,
    "fwmark": INBOUND_CONNECTION_MARK,
    "fwmask": MARK_MASK,
    "table": INBOUND_ROUTE_TABLE,
}
_ROUTE: Final[Mapping[str, int | str]] = {
    "dst": "default",
    "type": "local",
    "scope": _RT_SCOPE_HOST,
    "oif": _LOOPBACK,
    "table": INBOUND_ROUTE_TABLE,
}


def add_routing(families: Sequence[int]) -> bool:
    """Put rule and route in place; False if they were. Raises OSError."""
    changed = False
    with _conversation() as netlink:
        for family in families:
            if not _routes(netlink, family):
                netlink.route("replace", family=family, **_ROUTE)
                changed = True
            if not _rules(netlink, family):
                netlink.rule("add", family=family, **_RULE)
                changed = True
    return changed


def find_routing_differences(families: Sequence[int]) -> list[str]:
    """What of rule and route is missing, one sentence each. Raises OSError."""
    found: list[str] = []
    with _conversation() as netlink:
        for family in families:
            if not _rules(netlink, family):
                found.append(
                    f"{_FAMILIES[family]} rule is missing: fwmark {INBOUND_CONNECTION_MARK:#x}/{MARK_MASK:#x} lookup {INBOUND_ROUTE_TABLE}"
                )
            if not _routes(netlink, family):
                found.append(f"{_FAMILIES[family]} route is missing: local default dev lo table {INBOUND_ROUTE_TABLE}")
    return found


def remove_routing() -> None:
    """Take away rule and route of both families, also those that an interrupted run left twice. Raises OSError."""
    with _conversation() as netlink:
        for family in _FAMILIES:
            for _ in range(_rules(netlink, family)):
                netlink.rule("delete", family=family, **_RULE)
            if _routes(netlink, family):
                netlink.route("delete", family=family, **_ROUTE)


@contextmanager
def _conversation() -> Iterator[Any]:
    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as exc:
        raise OSError(exc.code, f"policy routing: {exc}") from exc


def _rules(netlink: Any, family: int) -> int:
    """How many rules are ours."""
    return sum(
        rule.get_attr("FRA_PRIORITY") == INBOUND_RULE_PRIORITY
        and rule.get_attr("FRA_FWMARK") == INBOUND_CONNECTION_MARK
        and rule.get_attr("FRA_FWMASK") == MARK_MASK
        and rule.get_attr("FRA_TABLE") == INBOUND_ROUTE_TABLE
        for rule in _dumped(netlink.get_rules, family)
    )


def _routes(netlink: Any, family: int) -> int:
    """How many routes are ours."""
    return sum(
        route["type"] == _RTN_LOCAL and route["dst_len"] == 0 and route.get_attr("RTA_OIF") == _LOOPBACK
        for route in _dumped(netlink.get_routes, family, table=INBOUND_ROUTE_TABLE)
    )


def _dumped(dump: Any, family: int, **filters: int) -> list[Any]:
    try:
        return list(dump(family=family, **filters))
    except NetlinkError as exc:
        # A kernel without IPv6 has no rules of that family; a table that never had a route does not exist.
        if exc.code in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
            return []
        raise
