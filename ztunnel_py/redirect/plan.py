"""What a pod's network namespace needs so that its TCP connections and its look-ups of names pass through the agent, as data. Pure.

Tables, chains, order and marks are those of Istio's native nftables backend, with four differences, all but the third so that no living
connection is lost (docs/design/decisions/0004-capture-keeps-connections.md):

- only the packet that opens a connection is redirected;
- releasing a pod empties the nat chains first and removes them only when the last redirected connection has ended;
- a connection that nat is not asked about, because conntrack takes it for an older one, is dropped;
- what the agent connects is tracked apart from what applications and their clients do.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from mesh.linux.nft import (
    Chain,
    ChainType,
    Hook,
    HookPoint,
    Rule,
    Statement,
    Table,
    accept,
    counter,
    ct_mark,
    ct_state,
    daddr,
    drop,
    iifname,
    l4proto,
    mark,
    oifname,
    redirect,
    saddr,
    set_ct_mark,
    set_ct_original_zone,
    set_ct_zone,
    set_mark_from_ct,
    tcp_dport,
    tcp_flags,
    udp_dport,
    udp_sport,
)
from mesh.model.ports import (
    DIALLED_MARK,
    DIALLED_MASK,
    DIALLED_ZONE,
    DNS,
    DOMAIN,
    INBOUND_CONNECTION_MARK,
    INBOUND_HBONE,
    INBOUND_PLAINTEXT,
    MARK_MASK,
    OUTBOUND,
    PROBE_SOURCE_V4,
    PROBE_SOURCE_V6,
    PROXY_DNS_ZONE,
    PROXY_MARK,
)

NAT_TABLE: Final = "istio-ambient-nat"
MANGLE_TABLE: Final = "istio-ambient-mangle"
RAW_TABLE: Final = "istio-ambient-raw"
FILTER_TABLE: Final = "istio-ambient-filter"
"""Ours alone; Istio has none."""
_DSTNAT: Final = -100
_MANGLE: Final = -150
_RAW: Final = -300
_FILTER: Final = 0


@dataclass(frozen=True, slots=True)
class PodCapture:
    """The facts a plan depends on. ``ipv6``: the pod's namespace has IPv6. ``bypass_inbound``: connections to the pod stay as they
    are (annotation ``ambient.istio.io/bypass-inbound-capture``), only its own are captured. ``dns``: its look-ups are captured too."""

    ipv6: bool
    bypass_inbound: bool = False
    dns: bool = False


@dataclass(frozen=True, slots=True)
class RedirectPlan:
    """``tables`` while the pod is captured; ``releasing`` while redirected connections are let go on; ``families`` (AF_INET,
    AF_INET6) need the rule and route that bring the replies of applications back to the agent's transparent sockets. Of `OUR_TABLES`
    those that are not listed must not be there."""

    tables: tuple[Table, ...]
    releasing: tuple[Table, ...]
    families: tuple[int, ...]


OUR_TABLES: Final = (NAT_TABLE, MANGLE_TABLE, RAW_TABLE, FILTER_TABLE)


@dataclass(frozen=True, slots=True)
class _IpVersion:
    loopback: IPv4Address | IPv6Address
    probe: IPv4Address | IPv6Address


_V4: Final = _IpVersion(IPv4Address("127.0.0.1"), IPv4Address(PROBE_SOURCE_V4))
_V6: Final = _IpVersion(IPv6Address("::1"), IPv6Address(PROBE_SOURCE_V6))


def plan_capture(pod: PodCapture) -> RedirectPlan:
    """The rules for a pod."""
    versions = (_V4, _V6) if pod.ipv6 else (_V4,)
    inbound = () if pod.bypass_inbound else tuple(rule for version in versions for rule in _inbound(version))
    outbound = (
        *(_probe_reply(version) for version in versions),
        *(_lookups(versions) if pod.dns else ()),
        Rule((l4proto(socket.IPPROTO_TCP), mark(INBOUND_CONNECTION_MARK, MARK_MASK), counter(), accept()), "the application's replies"),
        *(_own_addresses(version) for version in versions),
        *(_outbound(version) for version in versions),
    )
    others = (_mangle(), _raw(dns=pod.dns))
    return RedirectPlan(
        tables=(_nat(inbound, outbound), *others, _filter(versions, bypass_inbound=pod.bypass_inbound)),
        # The raw table stays as long as what it keeps apart.
        releasing=(_nat((), ()), *others),
        families=(socket.AF_INET, socket.AF_INET6) if pod.ipv6 else (socket.AF_INET,),
    )


def _nat(inbound: tuple[Rule, ...], outbound: tuple[Rule, ...]) -> Table:
    return Table(
        NAT_TABLE,
        (
            Chain("prerouting", inbound, Hook(ChainType.NAT, HookPoint.PREROUTING, _DSTNAT)),
            Chain("output", outbound, Hook(ChainType.NAT, HookPoint.OUTPUT, _DSTNAT)),
        ),
    )


def _mangle() -> Table:
    """Connections that the agent opens to the application are marked, and the replies in them are routed back to the agent's
    transparent socket although they go to the client's address. The output chain must be of type route: another one would set the
    mark but not route anew."""
    opened = Rule(
        (mark(PROXY_MARK, MARK_MASK), counter(), set_ct_mark(INBOUND_CONNECTION_MARK, MARK_MASK)), "connections to the application"
    )
    reply = Rule((ct_mark(INBOUND_CONNECTION_MARK, MARK_MASK), counter(), set_mark_from_ct()), "bring its replies to the agent")
    return Table(
        MANGLE_TABLE,
        (
            Chain("prerouting", (opened,), Hook(ChainType.FILTER, HookPoint.PREROUTING, _MANGLE)),
            Chain("output", (reply,), Hook(ChainType.ROUTE, HookPoint.OUTPUT, _MANGLE)),
        ),
    )


def _raw(*, dns: bool) -> Table:
    """Of what conntrack would take for one connection, what is the agent's has a zone of its own.

    A connection to the application from its client's address has a port that is free in the pod, where nobody knows which ports the client
    uses. Were it one from which the client holds a connection, conntrack would send the agent's SYN the way of that one, back to the agent,
    and end both. With a zone in the direction of the agent's it is new, and its replies are told apart: the client's come from the port of
    the agent. Of a client's connection that is not redirected, while a pod is released, nat changes the port if the application's kernel
    could not tell the two apart. Nor does what the agent connected lead an application's connection past it that has its port soon after.

    A look-up of the application's, which is redirected, outlives in conntrack the socket it was for; were the agent's next socket given
    that port, its look-up would be sent back to the agent."""
    dialled = Rule((mark(DIALLED_MARK, DIALLED_MASK), counter(), set_ct_original_zone(DIALLED_ZONE)), "connections the agent opens")
    mine = Rule((udp_dport(DOMAIN), mark(PROXY_MARK, MARK_MASK), counter(), set_ct_zone(PROXY_DNS_ZONE)), "look-ups of the agent")
    answers = Rule((udp_sport(DOMAIN), mark(PROXY_MARK, MARK_MASK, negate=True), counter(), set_ct_zone(PROXY_DNS_ZONE)), "answers to them")
    return Table(
        RAW_TABLE,
        (
            Chain("prerouting", (answers,) if dns else (), Hook(ChainType.FILTER, HookPoint.PREROUTING, _RAW)),
            Chain("output", (dialled, mine) if dns else (dialled,), Hook(ChainType.FILTER, HookPoint.OUTPUT, _RAW)),
        ),
    )


def _filter(versions: tuple[_IpVersion, ...], *, bypass_inbound: bool) -> Table:
    """Nothing opens a connection past the agent. conntrack takes a SYN for part of the connection that the same addresses and ports had
    before, when that one was ended by a reset of its server less than ten seconds ago (nf_conntrack_tcp_timeout_close) or still seems
    to live; nat is then not asked again, and the new connection goes the way of the old one: in plaintext and without a policy, if
    that was one from before the capture. Its SYN is dropped until conntrack has forgotten; the application's kernel sends it again. A SYN
    that is sent again in the middle of a capture is still a new connection, and passes."""
    inbound = () if bypass_inbound else tuple(_past_the_agent_inwards(version) for version in versions)
    return Table(
        FILTER_TABLE,
        (
            Chain("input", inbound, Hook(ChainType.FILTER, HookPoint.INPUT, _FILTER)),
            Chain("output", tuple(map(_past_the_agent_outwards, versions)), Hook(ChainType.FILTER, HookPoint.OUTPUT, _FILTER)),
        ),
    )


def _past_the_agent_inwards(version: _IpVersion) -> Rule:
    # What was redirected goes to the agent's port by now.
    not_agents = (tcp_dport(INBOUND_HBONE, negate=True), tcp_dport(INBOUND_PLAINTEXT, negate=True))
    ours = (iifname("lo", negate=True), saddr(version.probe, negate=True), *not_agents)
    return Rule((*ours, _opens_connection(), ct_state("established"), counter(), drop()), "connections past the agent")


def _past_the_agent_outwards(version: _IpVersion) -> Rule:
    # What was redirected goes to this host by now.
    ours = (oifname("lo", negate=True), daddr(version.loopback, negate=True), mark(PROXY_MARK, MARK_MASK, negate=True))
    return Rule((*ours, _opens_connection(), ct_state("established"), counter(), drop()), "connections past the agent")


def _lookups(versions: tuple[_IpVersion, ...]) -> Iterator[Rule]:
    not_ours = mark(PROXY_MARK, MARK_MASK, negate=True)
    yield Rule((oifname("lo", negate=True), not_ours, udp_dport(DOMAIN), counter(), redirect(DNS)), "names that the application looks up")
    for version in versions:
        outside = daddr(version.loopback, negate=True)
        yield Rule((outside, tcp_dport(DOMAIN), _opens_connection(), not_ours, counter(), redirect(DNS)), "the same over TCP")


def _inbound(version: _IpVersion) -> tuple[Rule, ...]:
    return (
        Rule((l4proto(socket.IPPROTO_TCP), saddr(version.probe), counter(), accept()), "probes of the kubelet"),
        Rule(
            (
                daddr(version.loopback, negate=True),
                tcp_dport(INBOUND_HBONE, negate=True),
                _opens_connection(),
                mark(PROXY_MARK, MARK_MASK, negate=True),
                counter(),
                redirect(INBOUND_PLAINTEXT),
            ),
            "connections to the application",
        ),
    )


def _probe_reply(version: _IpVersion) -> Rule:
    return Rule((l4proto(socket.IPPROTO_TCP), daddr(version.probe), counter(), accept()), "replies to probes")


def _own_addresses(version: _IpVersion) -> Rule:
    return Rule((oifname("lo"), daddr(version.loopback, negate=True), counter(), accept()), "the pod talks to itself")


def _outbound(version: _IpVersion) -> Rule:
    return Rule(
        (
            daddr(version.loopback, negate=True),
            _opens_connection(),
            mark(PROXY_MARK, MARK_MASK, negate=True),
            counter(),
            redirect(OUTBOUND),
        ),
        "connections the application opens",
    )


def _opens_connection() -> Statement:
    """A SYN without ACK. conntrack begins to work when these rules appear and takes the next packet of an older connection for the
    beginning of one; without this test nat would redirect it in mid-stream and the agent's kernel would answer with a reset."""
    return tcp_flags(("syn",), ("fin", "syn", "rst", "ack"))
