"""Carry nftables tables into the kernel, in the calling thread's network namespace, and compare them with what is there.

A table of ours is replaced as a whole and in one transaction: packets meet the old rules or the new ones, never a part of either.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from mesh.linux.netlink import BatchRefused, Message, NetfilterSocket, attribute, parse_attributes
from mesh.linux.nft import INET, UNNAMED_MAP, AddressSet, Chain, Expression, Hook, Rule, Table, choice_key, choice_value
from mesh.model.address import IpAddress, SocketAddress, ip_from_bytes

# NFT_MSG_* of linux/netfilter/nf_tables.h.
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE, _GETRULE = 0, 1, 2, 3, 4, 6, 7
_NEWSET, _GETSET, _NEWSETELEM, _GETSETELEM, _DELSETELEM = 9, 10, 12, 13, 14
_NLM_F_CREATE: Final = 0x400
_NLM_F_APPEND: Final = 0x800
_COMMENT_LIMIT: Final = 128
_ANONYMOUS_CONSTANT_MAP: Final = 0x1 | 0x2 | 0x8
_TYPE_INTEGER, _TYPE_IPV4, _TYPE_IPV6, _TYPE_PORT = 4, 7, 8, 13
_CONCATENATED: Final = 6
"""nft's data types are numbered in six bits; joined ones are written side by side."""
_NATIVE_KEY_BIG_VALUE: Final = bytes([0, 4]) + struct.pack("=I", 1) + bytes([1, 4]) + struct.pack("=I", 2)
"""User data by which ``nft list`` knows the byte order of a map's keys and values."""
_POLICY_ACCEPT: Final = 1
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2
_ELEMENTS_PER_MESSAGE: Final = 512
"""An attribute's length has 16 bits."""


class NftRefused(Exception):
    """The kernel refused a transaction, so nothing was changed. The text says which rule and why."""


def replace_tables(tables: Sequence[Table], *, absent: Sequence[str] = (), family: int = INET) -> None:
    """Make these tables exactly as given, whatever was in tables of their names, and remove those of ``family`` named in ``absent``.
    Raises NftRefused, OSError."""
    batch = _Batch()
    for name in absent:
        batch.delete_table(family, name)
    for table in tables:
        batch.delete_table(table.family, table.name)
        batch.add_table(table)
    _transact(batch.messages)


SetElements: TypeAlias = Mapping[IpAddress, str]
"""Addresses in a table's sets, each with the comment on its element."""


def read_sets(table: Table) -> dict[IpAddress, str]:
    """The elements of all sets of a table. Raises OSError (ENOENT: table or set is not there)."""
    found: dict[IpAddress, str] = {}
    with NetfilterSocket() as sock:
        for addresses in table.sets:
            for element in _read_elements(sock, table, _text(addresses.name)):
                found[ip_from_bytes(dict(parse_attributes(element[1]))[1])] = _read_comment(element.get(6, b""))
    return found


_NONE: Final[SetElements] = MappingProxyType({})


def change_sets(table: Table, *, remove: Iterable[IpAddress] = (), add: SetElements = _NONE) -> None:
    """Change the sets' elements in one transaction. What is removed must be there; what is added may be there with the same comment:
    to change one, remove and add it. Raises NftRefused, OSError."""
    batch = _Batch()
    removed = dict.fromkeys(remove, "")
    for addresses in table.sets:
        batch.change_elements(table, addresses, removed, _DELSETELEM)
    for addresses in table.sets:
        batch.change_elements(table, addresses, add, _NEWSETELEM)
    _transact(batch.messages)


def delete_tables(names: Iterable[str], family: int = INET) -> None:
    """Remove tables and all that is in them; those that are not there are fine. Raises NftRefused, OSError."""
    batch = _Batch()
    for name in names:
        batch.delete_table(family, name)
    _transact(batch.messages)


def list_tables(family: int = INET) -> list[str]:
    """The names of all tables of a family. Raises OSError."""
    with NetfilterSocket() as sock:
        return _read_tables(sock, family)


def find_differences(tables: Sequence[Table], *, absent: Sequence[str] = (), family: int = INET) -> list[str]:
    """What is not in the kernel as given, one sentence each; nothing when the tables are in place, and no table of ``family`` named in
    ``absent`` is there. Counters' values do not count.

    Rules are compared by what they do, not by what they are called: every expression and its attributes. Raises OSError.
    """
    found: list[str] = []
    with NetfilterSocket() as sock:
        for table in tables:
            if table.name in _read_tables(sock, table.family):
                found += (f"table {table.name}: {difference}" for difference in _differences_in(sock, table))
            else:
                found.append(f"table {table.name} is missing")
        there = _read_tables(sock, family) if absent else ()
        found += (f"table {name} is not wanted" for name in absent if name in there)
    return found


class InstalledRule(NamedTuple):
    """A rule in the kernel. ``text`` as `nft.Rule.text` where it is one of those expected in its chain, else the names of its expressions.
    ``packets`` and ``bytes`` are its counter's, None without one."""

    text: str
    expected: bool
    packets: int | None
    bytes: int | None


class InstalledChain(NamedTuple):
    name: str
    rules: tuple[InstalledRule, ...]


class InstalledTable(NamedTuple):
    name: str
    chains: tuple[InstalledChain, ...]


def read_tables(tables: Sequence[Table]) -> list[InstalledTable]:
    """What the kernel has in tables of these names, with its counters; rules are told by comparing them with the ones given. A table that
    is missing is left out. Raises OSError."""
    found: list[InstalledTable] = []
    with NetfilterSocket() as sock:
        for table in tables:
            if table.name in _read_tables(sock, table.family):
                rules = _read_rules(sock, table)
                known = {chain.name: chain.rules for chain in table.chains}
                chains = (
                    InstalledChain(name, tuple(_told(sock, table, known.get(name, ()), rule) for rule in rules.get(name, ())))
                    for name in _read_chains(sock, table)
                )
                found.append(InstalledTable(table.name, tuple(chains)))
    return found


def _told(sock: NetfilterSocket, table: Table, known: Sequence[Rule], installed: Sequence[_Installed]) -> InstalledRule:
    same = next((rule for rule in known if _same_rule(sock, table, rule, installed)), None)
    text = same.text if same is not None else " ".join(expression.name for expression in installed)
    counter = next((expression.attributes for expression in installed if expression.name == "counter"), None)
    if counter is None:
        return InstalledRule(text, same is not None, None, None)
    packets, size = (int.from_bytes(counter.get(kind, b""), "big") for kind in (_COUNTER_PACKETS, _COUNTER_BYTES))
    return InstalledRule(text, same is not None, packets, size)


def _transact(messages: Sequence[Message]) -> None:
    with NetfilterSocket() as sock:
        try:
            sock.transact(messages)
        except BatchRefused as exc:
            raise NftRefused(str(exc)) from exc


class _Batch:
    """Collects the messages of one transaction, in the order in which they refer to each other."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._maps = 0

    def delete_table(self, family: int, name: str) -> None:
        """Deleting what does not exist is an error, creating what exists is none: so create, then delete."""
        self._say(_NEWTABLE, family, attribute(1, _text(name)) + attribute(2, _be32(0)), f"add table {name}", _NLM_F_CREATE)
        self._say(_DELTABLE, family, attribute(1, _text(name)), f"delete table {name}")

    def add_table(self, table: Table) -> None:
        name = _text(table.name)
        self._say(_NEWTABLE, table.family, attribute(1, name) + attribute(2, _be32(0)), f"add table {table.name}", _NLM_F_CREATE)
        for chain in table.chains:
            body = attribute(1, name) + attribute(3, _text(chain.name)) + _hook_attributes(chain.hook)
            self._say(_NEWCHAIN, table.family, body, f"add chain {table.name} {chain.name}", _NLM_F_CREATE)
        for addresses in table.sets:
            self._add_set(table, addresses)
        for chain in table.chains:
            for rule in chain.rules:
                self._add_rule(table, chain, rule)

    def _add_rule(self, table: Table, chain: Chain, rule: Rule) -> None:
        maps = [self._add_map(table, statement.choices) for statement in rule.statements if statement.choices]
        encoded = b"".join(attribute(1, _encode(expression, maps)) for expression in rule.expressions())
        body = attribute(1, _text(table.name)) + attribute(2, _text(chain.name)) + attribute(4, encoded)
        if rule.comment:
            body += attribute(7, _comment(rule.comment))
        self._say(_NEWRULE, table.family, body, f"add rule {table.name} {chain.name} {rule.text}", _NLM_F_CREATE | _NLM_F_APPEND)

    def _add_map(self, table: Table, choices: Sequence[SocketAddress]) -> int:
        """An unnamed map that lives and dies with its rule; its number within the transaction."""
        self._maps += 1
        first = choices[0].ip
        value_type = (_TYPE_IPV4 if first.version == 4 else _TYPE_IPV6) << _CONCATENATED | _TYPE_PORT
        what = f"add map {table.name} of {len(choices)} endpoints"
        names = attribute(1, _text(table.name)) + attribute(2, UNNAMED_MAP)
        body = names + attribute(3, _be32(_ANONYMOUS_CONSTANT_MAP)) + attribute(4, _be32(_TYPE_INTEGER)) + attribute(5, _be32(4))
        body += attribute(6, _be32(value_type)) + attribute(7, _be32(len(choice_value(choices[0]))))
        body += attribute(9, attribute(1, _be32(len(choices)))) + attribute(10, _be32(self._maps)) + attribute(13, _NATIVE_KEY_BIG_VALUE)
        self._say(_NEWSET, table.family, body, what, _NLM_F_CREATE)
        elements = [_element(index, choice) for index, choice in enumerate(choices)]
        for start in range(0, len(elements), _ELEMENTS_PER_MESSAGE):
            part = b"".join(attribute(1, element) for element in elements[start : start + _ELEMENTS_PER_MESSAGE])
            self._say(_NEWSETELEM, table.family, names + attribute(4, _be32(self._maps)) + attribute(3, part), what, _NLM_F_CREATE)
        return self._maps

    def _add_set(self, table: Table, addresses: AddressSet) -> None:
        self._maps += 1
        names = attribute(1, _text(table.name)) + attribute(2, _text(addresses.name))
        body = names + attribute(3, _be32(0)) + _key_attributes(addresses) + attribute(10, _be32(self._maps))
        self._say(_NEWSET, table.family, body, f"add set {table.name} {addresses.name}", _NLM_F_CREATE)

    def change_elements(self, table: Table, addresses: AddressSet, elements: SetElements, kind: int) -> None:
        names = attribute(1, _text(table.name)) + attribute(2, _text(addresses.name))
        encoded = [
            attribute(1, attribute(1, attribute(1, ip.packed)) + (attribute(6, _comment(comment)) if comment else b""))
            for ip, comment in elements.items()
            if ip.version == addresses.version
        ]
        what = f"{'add to' if kind == _NEWSETELEM else 'remove from'} set {table.name} {addresses.name}"
        for start in range(0, len(encoded), _ELEMENTS_PER_MESSAGE):
            part = b"".join(encoded[start : start + _ELEMENTS_PER_MESSAGE])
            self._say(kind, table.family, names + attribute(3, part), what, _NLM_F_CREATE if kind == _NEWSETELEM else 0)

    def _say(self, kind: int, family: int, body: bytes, text: str, flags: int = 0) -> None:
        self.messages.append(Message(kind, flags, family, body, text))


def _encode(expression: Expression, maps: list[int]) -> bytes:
    """An expression as an element of a rule's list; a lookup in an unnamed map takes the next of the rule's ``maps``."""
    attributes = [*expression.attributes]
    if _looks_in_unnamed(expression):
        attributes.append((4, _be32(maps.pop(0))))
    data = b"".join(attribute(kind, value) for kind, value in attributes)
    return attribute(1, _text(expression.name)) + attribute(2, data)


def _looks_in_unnamed(expression: Expression) -> bool:
    return expression.name == "lookup" and (1, UNNAMED_MAP) in expression.attributes


def _key_attributes(addresses: AddressSet) -> bytes:
    kind, length = (_TYPE_IPV4, 4) if addresses.version == 4 else (_TYPE_IPV6, 16)
    return attribute(4, _be32(kind)) + attribute(5, _be32(length))


def _hook_attributes(hook: Hook | None) -> bytes:
    if hook is None:
        return b""
    place = attribute(1, _be32(hook.point.value)) + attribute(2, struct.pack("!i", hook.priority))
    return attribute(4, place) + attribute(5, _be32(_POLICY_ACCEPT)) + attribute(7, _text(hook.type.value))


def _element(index: int, endpoint: SocketAddress) -> bytes:
    return attribute(1, attribute(1, choice_key(index))) + attribute(2, attribute(1, choice_value(endpoint)))


def _comment(text: str) -> bytes:
    """The user data in which nft keeps the comment of a rule or an element: type 0, length, text with NUL."""
    encoded = _text(text)
    if len(encoded) > _COMMENT_LIMIT:
        raise ValueError(f"a comment has at most {_COMMENT_LIMIT - 1} bytes: {text!r}")
    return bytes([0, len(encoded)]) + encoded


def _read_comment(data: bytes) -> str:
    """The text in user data; ``""`` where there is none, or something that is not ours."""
    return data[2 : 2 + data[1]].rstrip(b"\0").decode("utf-8", "replace") if len(data) > 2 and data[0] == 0 else ""


def _differences_in(sock: NetfilterSocket, table: Table) -> Iterator[str]:
    chains = _read_chains(sock, table)
    rules = _read_rules(sock, table)
    sets = _read_sets(sock, table)
    yield from (f"set {each.name} is missing" for each in table.sets if sets.get(each.name) != _key_attributes(each))
    for chain in table.chains:
        if chain.name not in chains:
            yield f"chain {chain.name} is missing"
        elif chains[chain.name] != _hook_attributes(chain.hook):
            yield f"chain {chain.name} is not hooked as {chain.hook.text if chain.hook else 'nothing'}"
        else:
            yield from (f"chain {chain.name}: {difference}" for difference in _differing_rules(sock, table, chain, rules))
    for name in chains.keys() - {chain.name for chain in table.chains}:
        yield f"chain {name} is not ours"


def _differing_rules(
    sock: NetfilterSocket, table: Table, chain: Chain, installed: Mapping[str, Sequence[Sequence[_Installed]]]
) -> Iterator[str]:
    actual = installed.get(chain.name, ())
    for number, rule in enumerate(chain.rules):
        if number >= len(actual):
            yield f"a rule is missing: {rule.text}"
        elif not _same_rule(sock, table, rule, actual[number]):
            yield f"rule {number + 1} is not: {rule.text}"
    if len(actual) > len(chain.rules):
        yield f"{len(actual) - len(chain.rules)} rules too many"


def _same_rule(sock: NetfilterSocket, table: Table, rule: Rule, actual: Sequence[_Installed]) -> bool:
    expected = rule.expressions()
    if [expression.name for expression in expected] != [installed.name for installed in actual]:
        return False
    choices = [statement.choices for statement in rule.statements if statement.choices]
    for wanted, installed in zip(expected, actual, strict=True):
        attributes = dict(wanted.attributes)
        if _looks_in_unnamed(wanted):
            del attributes[1]  # the kernel gave the map its name; what is in it counts
            if _read_map(sock, table, installed.attributes.get(1, b"")) != _elements(choices.pop(0)):
                return False
        # The kernel may report more than was said (counters, defaults), never something else.
        if any(installed.attributes.get(kind) != value for kind, value in attributes.items()):
            return False
    return True


class _Installed(NamedTuple):
    """An expression of a rule as the kernel tells it."""

    name: str
    attributes: dict[int, bytes]


def _read_tables(sock: NetfilterSocket, family: int) -> list[str]:
    return [_name(dict(parse_attributes(body))[1]) for _, body in sock.dump(_GETTABLE, family)]


def _read_chains(sock: NetfilterSocket, table: Table) -> dict[str, bytes]:
    """The chains of a table, each with what `_hook_attributes` would say of it."""
    found: dict[str, bytes] = {}
    for _, body in sock.dump(_GETCHAIN, table.family):
        chain = dict(parse_attributes(body))
        if _name(chain[1]) == table.name:
            hooked = (4, 5, 7) if 4 in chain else ()
            found[_name(chain[3])] = b"".join(attribute(kind, chain.get(kind, b"")) for kind in hooked)
    return found


def _read_rules(sock: NetfilterSocket, table: Table) -> dict[str, list[list[_Installed]]]:
    """The rules of a table by chain, in order."""
    found: dict[str, list[list[_Installed]]] = {}
    for _, body in sock.dump(_GETRULE, table.family, attribute(1, _text(table.name))):
        rule = dict(parse_attributes(body))
        if _name(rule[1]) == table.name:  # kernels before 4.6 do not filter
            expressions = [_installed(element) for _, element in parse_attributes(rule.get(4, b""))]
            found.setdefault(_name(rule[2]), []).append(expressions)
    return found


def _installed(element: bytes) -> _Installed:
    parts = dict(parse_attributes(element))
    return _Installed(_name(parts[1]), dict(parse_attributes(parts.get(2, b""))))


def _read_sets(sock: NetfilterSocket, table: Table) -> dict[str, bytes]:
    """The named sets of a table, each with what `_key_attributes` would say of it."""
    found: dict[str, bytes] = {}
    for _, body in sock.dump(_GETSET, table.family, attribute(1, _text(table.name))):
        parts = dict(parse_attributes(body))
        found[_name(parts[2])] = attribute(4, parts.get(4, b"")) + attribute(5, parts.get(5, b""))
    return found


def _read_map(sock: NetfilterSocket, table: Table, name: bytes) -> dict[bytes, bytes]:
    return {element[1]: element.get(2, b"") for element in _read_elements(sock, table, name)}


def _read_elements(sock: NetfilterSocket, table: Table, name: bytes) -> Iterator[dict[int, bytes]]:
    """The attributes of each element of a set or map; ``name`` with its NUL."""
    for _, body in sock.dump(_GETSETELEM, table.family, attribute(1, _text(table.name)) + attribute(2, name)):
        for _, element in parse_attributes(dict(parse_attributes(body)).get(3, b"")):
            yield dict(parse_attributes(element))


def _elements(choices: Sequence[SocketAddress]) -> dict[bytes, bytes]:
    return {attribute(1, choice_key(index)): attribute(1, choice_value(choice)) for index, choice in enumerate(choices)}


def _text(name: str) -> bytes:
    return name.encode() + b"\0"


def _name(encoded: bytes) -> str:
    return encoded.rstrip(b"\0").decode()


def _be32(number: int) -> bytes:
    return struct.pack("!I", number)
