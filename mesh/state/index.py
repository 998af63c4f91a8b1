"""Secondary indices: values by what they can be looked up by, kept true by one mutator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from mesh.model.address import IpAddress
from mesh.model.service import Service

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Index(Generic[K, V]):
    """Values by the keys that ``keys`` gives for each; a value may have many keys, a key many values.

    A key with one value, the usual case, costs one entry and no container. Values are told apart by identity: ``replace`` must be
    given the very object that went in.
    """

    __slots__ = ("_keys", "_many", "_one")

    def __init__(self, keys: Callable[[V], Iterable[K]]) -> None:
        self._keys = keys
        self._one: dict[K, V] = {}
        self._many: dict[K, dict[int, V]] = {}

    def replace(self, old: V | None, new: V | None) -> None:
        """Take ``old`` out and put ``new`` in; None for nothing."""
        before = {*self._keys(old)} if old is not None else set()
        after = {*self._keys(new)} if new is not None else set()
        if old is not None:
            for key in before:
                if new is not None and key in after:  # most changes of a value are of none of its keys
                    self._exchange(key, old, new)
                else:
                    self._discard(key, old)
        if new is not None:
            for key in after - before if before else after:
                self._add(key, new)

    def find(self, key: K) -> tuple[V, ...]:
        """All values with this key, in no order that means anything."""
        one = self._one.get(key)
        if one is not None:
            return (one,)
        many = self._many.get(key)
        return tuple(many.values()) if many is not None else ()

    def __len__(self) -> int:
        """How many keys have a value."""
        return len(self._one) + len(self._many)

    def _add(self, key: K, value: V) -> None:
        many = self._many.get(key)
        if many is not None:
            many[id(value)] = value
        elif (one := self._one.pop(key, None)) is not None:
            self._many[key] = {id(one): one, id(value): value}
        else:
            self._one[key] = value

    def _exchange(self, key: K, old: V, new: V) -> None:
        many = self._many.get(key)
        if many is None:
            self._one[key] = new
        else:
            del many[id(old)]
            many[id(new)] = new

    def _discard(self, key: K, value: V) -> None:
        many = self._many.get(key)
        if many is None:
            del self._one[key]
            return
        del many[id(value)]
        if len(many) == 1:
            del self._many[key]
            (self._one[key],) = many.values()


class CidrIndex:
    """Services by the address ranges of their virtual addresses, found in one look-up per prefix length in use."""

    __slots__ = ("_by_prefix", "_lengths")

    def __init__(self) -> None:
        self._by_prefix: Index[_Prefix, Service] = Index(_prefixes)
        self._lengths: dict[tuple[str, int], Counter[int]] = {}
        """How many ranges have so many host bits, by network and IP version."""

    def replace(self, old: Service | None, new: Service | None) -> None:
        """Take ``old`` out and put ``new`` in; None for nothing."""
        self._by_prefix.replace(old, new)
        for network, version, host_bits, _ in set(_prefixes(old)) if old is not None else ():
            lengths = self._lengths[network, version]
            lengths[host_bits] -= 1
            if not lengths[host_bits]:
                del lengths[host_bits]
        for network, version, host_bits, _ in set(_prefixes(new)) if new is not None else ():
            self._lengths.setdefault((network, version), Counter())[host_bits] += 1

    def find(self, network: str, ip: IpAddress) -> Iterator[tuple[int, Service]]:
        """Every service with a range around this address, with the prefix length of that range."""
        version, value = ip.version, int(ip)
        for host_bits in self._lengths.get((network, version), ()):
            for service in self._by_prefix.find((network, version, host_bits, value >> host_bits)):
                yield ip.max_prefixlen - host_bits, service


_Prefix = tuple[str, int, int, int]
"""Network, IP version, host bits, leading bits."""


def _prefixes(service: Service) -> Iterator[_Prefix]:
    for vip in service.cidr_addresses:
        host_bits = vip.cidr.max_prefixlen - vip.cidr.prefixlen
        yield vip.network, vip.cidr.version, host_bits, int(vip.cidr.network_address) >> host_bits
