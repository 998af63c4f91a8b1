"""nftables rules as data: each statement knows its text, as ``nft list`` prints it, and its expressions, as the kernel runs them.

Pure. `mesh.linux.nft_apply` carries tables into the kernel and compares them with what is there. Covered is what the mesh writes
itself, not the language.

    Rule((daddr(ip_network("10.0.0.0/8")), tcp_dport(80), counter(), redirect(15001)), "why this rule is there")
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from mesh.linux.netlink import attribute
from mesh.model.address import IpAddress, SocketAddress

INET: Final = 1
"""NFPROTO_INET: one table for IPv4 and IPv6."""

# Numbers of linux/netfilter/nf_tables.h. Attribute types are given where they are used, by the name they have there.
_VERDICT_REGISTER: Final = 0
_REGISTER: Final = 1
_NETWORK_HEADER: Final = 1
_TRANSPORT_HEADER: Final = 2
_META_MARK, _META_IIFNAME, _META_OIFNAME, _META_SKUID, _META_NFPROTO, _META_L4PROTO = 3, 6, 7, 10, 15, 16
_CT_STATE, _CT_MARK, _CT_ZONE = 0, 3, 17
_CT_DIRECTION_ORIGINAL: Final = 0
_CMP_EQ, _CMP_NEQ = 0, 1
_NF_DROP, _NF_ACCEPT, _NFT_JUMP, _NFT_GOTO, _NFT_RETURN = 0, 1, -3, -4, -5
_NAT_SNAT, _NAT_DNAT = 0, 1
_NUMGEN_RANDOM: Final = 1
_REJECT_TCP_RESET: Final = 1
_CT_STATES: Final = {"invalid": 1, "established": 2, "related": 4, "new": 8}
_TCP_FLAGS: Final = {"fin": 0x01, "syn": 0x02, "rst": 0x04, "ack": 0x10}
_PRIORITIES: Final = {("prerouting", -100): "dstnat", ("postrouting", 100): "srcnat"}
_PRIORITIES_ANYWHERE: Final = {-300: "raw", -150: "mangle", 0: "filter"}

UNNAMED_MAP: Final = b"__map%d\0"
"""Asks the kernel to name a map; it answers with ``__map0`` and so on."""


@dataclass(frozen=True, slots=True)
class Expression:
    """One instruction of a rule: its name and its attributes as (type, encoded value)."""

    name: str
    attributes: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Statement:
    """A part of a rule. ``family`` and ``protocol`` (0: any) are tests that must come before it; a rule makes each only once.

    ``choices`` are the elements of the unnamed map that a lookup of this statement needs, by index.
    """

    text: str
    expressions: tuple[Expression, ...]
    family: int = 0
    protocol: int = 0
    choices: tuple[SocketAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """Statements from left to right, and a comment (at most 127 bytes) that stays on the rule in the kernel."""

    statements: tuple[Statement, ...]
    comment: str = ""

    @property
    def text(self) -> str:
        parts = [statement.text for statement in self.statements]
        if self.comment:
            parts.append(f'comment "{self.comment}"')
        return " ".join(parts)

    def expressions(self) -> tuple[Expression, ...]:
        """Everything in order, with the tests that statements need put before the first that needs them."""
        family = protocol = 0
        out: list[Expression] = []
        for statement in self.statements:
            if statement.family and statement.family != family:
                family = statement.family
                out += (_load_meta(_META_NFPROTO), _compare(bytes([family])))
            if statement.protocol and statement.protocol != protocol:
                protocol = statement.protocol
                out += (_load_meta(_META_L4PROTO), _compare(bytes([protocol])))
            out += statement.expressions
        return tuple(out)


class ChainType(Enum):
    NAT = "nat"
    FILTER = "filter"
    ROUTE = "route"
    """A filter on output after which a changed mark is routed anew."""


class HookPoint(Enum):
    """Values are the kernel's numbers for families ip, ip6 and inet."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


@dataclass(frozen=True, slots=True)
class Hook:
    """Makes a chain a base chain. Its policy is always accept: what a mesh does not know is not its to drop."""

    type: ChainType
    point: HookPoint
    priority: int

    @property
    def text(self) -> str:
        point = self.point.name.lower()
        name = _PRIORITIES.get((point, self.priority)) or _PRIORITIES_ANYWHERE.get(self.priority) or str(self.priority)
        return f"type {self.type.value} hook {point} priority {name}; policy accept;"


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    rules: tuple[Rule, ...] = ()
    hook: Hook | None = None


@dataclass(frozen=True, slots=True)
class AddressSet:
    """A named set of addresses of one IP version, which rules refer to and which changes while they stay. Its elements are no part of
    the table's description: `mesh.linux.nft_apply.change_sets` looks after them."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Table:
    """A table that is ours alone: it is always replaced as a whole. Chains that others jump to come first."""

    name: str
    chains: tuple[Chain, ...]
    family: int = INET
    sets: tuple[AddressSet, ...] = ()


def render(tables: Sequence[Table]) -> str:
    """The text that ``nft --stateless list ruleset`` prints for these tables."""
    return "".join(_render_table(table) for table in tables)


# Tests. Every one of them continues the rule when it holds and ends it otherwise.


def l4proto(protocol: int) -> Statement:
    """``meta l4proto tcp``; ``protocol`` is socket.IPPROTO_TCP or IPPROTO_UDP."""
    return Statement(f"meta l4proto {_protocol_name(protocol)}", (), protocol=protocol)


def iifname(name: str, *, negate: bool = False) -> Statement:
    """The interface a packet came in by."""
    return _interface("iifname", _META_IIFNAME, name, negate)


def oifname(name: str, *, negate: bool = False) -> Statement:
    """The interface a packet goes out by."""
    return _interface("oifname", _META_OIFNAME, name, negate)


def mark(value: int, mask: int, *, negate: bool = False) -> Statement:
    """The packet's mark under a mask."""
    return _marked("meta mark", _load_meta(_META_MARK), value, mask, negate)


def ct_mark(value: int, mask: int, *, negate: bool = False) -> Statement:
    """The connection's mark under a mask."""
    return _marked("ct mark", _load_ct(_CT_MARK), value, mask, negate)


def ct_state(*states: str) -> Statement:
    """The connection is in one of ``new``, ``established``, ``related``, ``invalid``."""
    bits = _native(sum(_CT_STATES[state] for state in states))
    return Statement(f"ct state {','.join(states)}", (_load_ct(_CT_STATE), _mask(bits), _compare(bytes(4), negate=True)))


def saddr(address: IpAddress | IPv4Network | IPv6Network, *, negate: bool = False) -> Statement:
    """The packet's source address. Implies its family: the negation holds for packets of that family only."""
    return _address("saddr", 12, 8, address, negate)


def daddr(address: IpAddress | IPv4Network | IPv6Network, *, negate: bool = False) -> Statement:
    """The packet's destination address. Implies its family: the negation holds for packets of that family only."""
    return _address("daddr", 16, 24, address, negate)


def daddr_in(addresses: AddressSet) -> Statement:
    """The packet's destination address is an element of a set of the same table."""
    offset, length = (16, 4) if addresses.version == 4 else (24, 16)
    return Statement(
        f"{_family_name(addresses.version)} daddr @{addresses.name}",
        (
            _load_payload(_NETWORK_HEADER, offset, length),
            Expression("lookup", ((1, addresses.name.encode() + b"\0"), (2, _be32(_REGISTER)))),
        ),
        family=_family(addresses.version),
    )


def skuid(uid: int) -> Statement:
    """The packet was sent by a socket of this network namespace, made by a process of this user. Never true of forwarded packets."""
    return Statement(f"meta skuid {uid}", (_load_meta(_META_SKUID), _compare(_native(uid))))


def tcp_dport(port: int, *, negate: bool = False) -> Statement:
    return _port("tcp", socket.IPPROTO_TCP, port, negate)


def udp_dport(port: int, *, negate: bool = False) -> Statement:
    return _port("udp", socket.IPPROTO_UDP, port, negate)


def udp_sport(port: int) -> Statement:
    return Statement(f"udp sport {port}", (_load_payload(_TRANSPORT_HEADER, 0, 2), _compare(_be16(port))), protocol=socket.IPPROTO_UDP)


def tcp_flags(value: Sequence[str], mask: Sequence[str]) -> Statement:
    """Of the flags in ``mask`` exactly those in ``value`` are set; ``fin``, ``syn``, ``rst``, ``ack``."""
    bits, masked = (bytes([sum(_TCP_FLAGS[flag] for flag in flags)]) for flags in (value, mask))
    return Statement(
        f"tcp flags {','.join(value)} / {','.join(mask)}",
        (_load_payload(_TRANSPORT_HEADER, 13, 1), _mask(masked), _compare(bits)),
        protocol=socket.IPPROTO_TCP,
    )


# Actions.


def counter() -> Statement:
    return Statement("counter", (Expression("counter"),))


def accept() -> Statement:
    return Statement("accept", (_verdict(_NF_ACCEPT),))


def drop() -> Statement:
    return Statement("drop", (_verdict(_NF_DROP),))


def return_() -> Statement:
    return Statement("return", (_verdict(_NFT_RETURN),))


def jump(chain: str) -> Statement:
    return Statement(f"jump {chain}", (_verdict(_NFT_JUMP, chain),))


def goto(chain: str) -> Statement:
    return Statement(f"goto {chain}", (_verdict(_NFT_GOTO, chain),))


def reject_with_tcp_reset() -> Statement:
    """Only in filter chains, not in nat ones."""
    return Statement("reject with tcp reset", (Expression("reject", ((1, _be32(_REJECT_TCP_RESET)),)),), protocol=socket.IPPROTO_TCP)


def set_ct_mark(value: int, mask: int) -> Statement:
    """Replace the bits ``mask`` of the connection's mark."""
    keep = 0xFFFFFFFF & ~mask
    return Statement(
        f"ct mark set ct mark & {keep | value:#010x} | {value:#010x}",
        (
            _load_ct(_CT_MARK),
            _bitwise(_native(keep), _native(value)),
            Expression("ct", ((2, _be32(_CT_MARK)), (4, _be32(_REGISTER)))),
        ),
    )


def set_ct_zone(zone: int) -> Statement:
    """Have conntrack look for the packet's connection in this zone. Only in chains that come before conntrack (priority raw)."""
    return Statement(
        f"ct zone set {zone}",
        (_immediate(_REGISTER, struct.pack("=H", zone)), Expression("ct", ((2, _be32(_CT_ZONE)), (4, _be32(_REGISTER))))),
    )


def set_ct_original_zone(zone: int) -> Statement:
    """The same for the direction only in which the connection is opened: what comes back is looked for where all else is, and so neither
    direction is taken for another connection between the same addresses and ports."""
    return Statement(
        f"ct original zone set {zone}",
        (
            _immediate(_REGISTER, struct.pack("=H", zone)),
            Expression("ct", ((2, _be32(_CT_ZONE)), (3, bytes([_CT_DIRECTION_ORIGINAL])), (4, _be32(_REGISTER)))),
        ),
    )


def set_mark_from_ct() -> Statement:
    """Copy the connection's mark to the packet."""
    return Statement("meta mark set ct mark", (_load_ct(_CT_MARK), Expression("meta", ((2, _be32(_META_MARK)), (3, _be32(_REGISTER))))))


def redirect(port: int) -> Statement:
    """Deliver to this port of this host instead. Only after a test of TCP or UDP, and in nat chains."""
    return Statement(f"redirect to :{port}", (_immediate(_REGISTER, _be16(port)), Expression("redir", ((1, _be32(_REGISTER)),))))


def masquerade() -> Statement:
    return Statement("masquerade", (Expression("masq"),))


def snat(address: IpAddress) -> Statement:
    family = _family(address.version)
    return Statement(
        f"snat {_family_name(address.version)} to {address}",
        (_immediate(_REGISTER, address.packed), _nat(_NAT_SNAT, family, None)),
        family=family,
    )


def dnat(endpoint: SocketAddress) -> Statement:
    """Deliver to this address and port instead. Only after a test of TCP or UDP."""
    version = endpoint.ip.version
    family, port_register = _family(version), _REGISTER + 1
    return Statement(
        f"dnat {_family_name(version)} to {endpoint}",
        (
            _immediate(_REGISTER, endpoint.ip.packed),
            _immediate(port_register, _be16(endpoint.port)),
            _nat(_NAT_DNAT, family, port_register),
        ),
        family=family,
    )


def dnat_to_random(endpoints: Sequence[SocketAddress]) -> Statement:
    """Deliver to one of the endpoints, chosen anew for every connection. At least one; all of one family (ValueError)."""
    versions = {endpoint.ip.version for endpoint in endpoints}
    if len(versions) != 1:
        raise ValueError("dnat_to_random needs endpoints, all of one address family")
    if len(endpoints) == 1:
        return dnat(endpoints[0])
    (version,) = versions
    family = _family(version)
    # The map's value fills registers from the first on: after an IPv4 address its port is in the second of 32 bits, number 9, after
    # an IPv6 address in the second of 128 bits (the kernel reports it by this number, not as the fifth of 32 bits).
    port_register = 9 if version == 4 else 2
    listed = ", ".join(f"{index} : {endpoint.ip} . {endpoint.port}" for index, endpoint in enumerate(endpoints))
    return Statement(
        f"dnat {_family_name(version)} to numgen random mod {len(endpoints)} map {{ {listed} }}",
        (
            Expression("numgen", ((1, _be32(_REGISTER)), (2, _be32(len(endpoints))), (3, _be32(_NUMGEN_RANDOM)))),
            Expression("lookup", ((1, UNNAMED_MAP), (2, _be32(_REGISTER)), (3, _be32(_REGISTER)))),
            _nat(_NAT_DNAT, family, port_register),
        ),
        family=family,
        choices=tuple(endpoints),
    )


def choice_key(index: int) -> bytes:
    """The key of a choice in its map: what numgen leaves in the register."""
    return _native(index)


def choice_value(endpoint: SocketAddress) -> bytes:
    """The value of a choice in its map: address, port, padded to whole registers."""
    return endpoint.ip.packed + _be16(endpoint.port) + b"\0\0"


def _interface(text: str, key: int, name: str, negate: bool) -> Statement:
    encoded = name.encode()
    if not 0 < len(encoded) < 16:
        raise ValueError(f"not an interface name: {name!r}")
    return Statement(f'{text} {_not(negate)}"{name}"', (_load_meta(key), _compare(encoded.ljust(16, b"\0"), negate=negate)))


def _marked(text: str, load: Expression, value: int, mask: int, negate: bool) -> Statement:
    return Statement(
        f"{text} & {mask:#010x} {'!=' if negate else '=='} {value:#010x}",
        (load, _mask(_native(mask)), _compare(_native(value), negate=negate)),
    )


def _address(text: str, offset_v4: int, offset_v6: int, address: IpAddress | IPv4Network | IPv6Network, negate: bool) -> Statement:
    network = address if isinstance(address, IPv4Network | IPv6Network) else ip_network(address)
    offset = offset_v4 if network.version == 4 else offset_v6
    whole_bytes, bits = divmod(network.prefixlen, 8)
    load: tuple[Expression, ...]
    if bits or not whole_bytes:
        load = (_load_payload(_NETWORK_HEADER, offset, network.max_prefixlen // 8), _mask(network.netmask.packed))
        compared = network.network_address.packed
    else:
        # nft's own economy: only the bytes that count are loaded.
        load = (_load_payload(_NETWORK_HEADER, offset, whole_bytes),)
        compared = network.network_address.packed[:whole_bytes]
    shown = network.network_address if network.prefixlen == network.max_prefixlen else network
    return Statement(
        f"{_family_name(network.version)} {text} {_not(negate)}{shown}",
        (*load, _compare(compared, negate=negate)),
        family=_family(network.version),
    )


def _port(name: str, protocol: int, port: int, negate: bool) -> Statement:
    return Statement(
        f"{name} dport {_not(negate)}{port}",
        (_load_payload(_TRANSPORT_HEADER, 2, 2), _compare(_be16(port), negate=negate)),
        protocol=protocol,
    )


def _load_meta(key: int) -> Expression:
    return Expression("meta", ((2, _be32(key)), (1, _be32(_REGISTER))))


def _load_ct(key: int) -> Expression:
    return Expression("ct", ((2, _be32(key)), (1, _be32(_REGISTER))))


def _load_payload(base: int, offset: int, length: int) -> Expression:
    return Expression("payload", ((1, _be32(_REGISTER)), (2, _be32(base)), (3, _be32(offset)), (4, _be32(length))))


def _compare(value: bytes, *, negate: bool = False) -> Expression:
    operation = _CMP_NEQ if negate else _CMP_EQ
    return Expression("cmp", ((1, _be32(_REGISTER)), (2, _be32(operation)), (3, _data(value))))


def _mask(bits: bytes) -> Expression:
    return _bitwise(bits, bytes(len(bits)))


def _bitwise(keep: bytes, flip: bytes) -> Expression:
    register = _be32(_REGISTER)
    return Expression("bitwise", ((1, register), (2, register), (3, _be32(len(keep))), (4, _data(keep)), (5, _data(flip))))


def _immediate(register: int, value: bytes) -> Expression:
    return Expression("immediate", ((1, _be32(register)), (2, _data(value))))


def _verdict(code: int, chain: str = "") -> Expression:
    verdict = attribute(1, struct.pack("!i", code)) + (attribute(2, chain.encode() + b"\0") if chain else b"")
    return Expression("immediate", ((1, _be32(_VERDICT_REGISTER)), (2, attribute(2, verdict))))


def _nat(kind: int, family: int, port_register: int | None) -> Expression:
    ports = () if port_register is None else ((5, _be32(port_register)),)
    return Expression("nat", ((1, _be32(kind)), (2, _be32(family)), (3, _be32(_REGISTER)), *ports))


def _data(value: bytes) -> bytes:
    return attribute(1, value)


def _be16(number: int) -> bytes:
    return struct.pack("!H", number)


def _be32(number: int) -> bytes:
    return struct.pack("!I", number)


def _native(number: int) -> bytes:
    """Marks, states and numgen's result are in the machine's byte order."""
    return struct.pack("=I", number)


def _family(version: int) -> int:
    return 2 if version == 4 else 10  # NFPROTO_IPV4, NFPROTO_IPV6


def _family_name(version: int) -> str:
    return "ip" if version == 4 else "ip6"


def _protocol_name(protocol: int) -> str:
    return {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}[protocol]


def _not(negate: bool) -> str:
    return "!= " if negate else ""


def _render_table(table: Table) -> str:
    family = {INET: "inet", 2: "ip", 10: "ip6"}[table.family]
    parts = [*(_render_set(addresses) for addresses in table.sets), *(_render_chain(chain) for chain in table.chains)]
    return f"table {family} {table.name} {{\n" + "\n".join(parts) + "}\n"


def _render_set(addresses: AddressSet) -> str:
    return f"\tset {addresses.name} {{\n\t\ttype ipv{addresses.version}_addr\n\t}}\n"


def _render_chain(chain: Chain) -> str:
    lines = ([chain.hook.text] if chain.hook else []) + [rule.text for rule in chain.rules]
    return f"\tchain {chain.name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"
