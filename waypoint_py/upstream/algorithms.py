"""One endpoint of several: round robin, least requests, random, a hash ring, Maglev's table. Each is made for a fixed set of hosts; pure.

What draws gets its dice as an argument; what takes turns remembers whose turn it was.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import Protocol

from mesh.model.l7.destination import MOST_SLOTS, Balance, LoadBalancer, Warmup
from mesh.model.workload import Workload
from waypoint_py.upstream.outlier import Health


@dataclass(slots=True, eq=False)
class Host:
    """One endpoint of a destination, and what is remembered of it for as long as it is one. ``since``: seconds, when it became one."""

    workload: Workload
    port: int
    weight: int
    since: float
    active: int = 0
    """Requests under way."""
    health: Health = field(default_factory=Health)

    @property
    def uid(self) -> str:
        """Its name among the hosts of its destination."""
        return self.workload.uid


class Algorithm(Protocol):
    """``key``: what decides where there is affinity (64 bits). The hosts are never none."""

    def pick(self, rng: random.Random, key: int | None, now: float) -> Host: ...


def make_algorithm(hosts: Sequence[Host], balancer: LoadBalancer, rng: random.Random) -> Algorithm:
    """For these hosts, at least one."""
    if balancer.hash is not None:
        table_size = balancer.hash.table_size
        return Ring(hosts, balancer.hash.minimum_ring_size) if table_size is None else Maglev(hosts, min(table_size, MOST_SLOTS))
    match balancer.simple:
        case Balance.ROUND_ROBIN:
            return RoundRobin(hosts, rng, balancer.warmup)
        case Balance.LEAST_REQUEST:
            return LeastRequest(hosts, balancer.warmup)
        case Balance.RANDOM | Balance.PASSTHROUGH:
            # Passthrough is for addresses as dialled; of a service's endpoints any is as good.
            return Draw(hosts)


def hash_text(text: bytes) -> int:
    """64 bits that are the same in every process and on every machine."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


class Draw:
    """At random, by weight."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = hosts
        weights = [host.weight for host in hosts]
        self._sums = list(accumulate(weights)) if len(set(weights)) > 1 else None

    def pick(self, rng: random.Random, key: int | None, now: float) -> Host:
        if self._sums is None:
            return self._hosts[int(rng.random() * len(self._hosts))]
        return self._hosts[bisect_right(self._sums, int(rng.random() * self._sums[-1]))]


class LeastRequest:
    """The better of two drawn by weight: with fewer requests under way for its weight. Which of the best would send everybody to one."""

    def __init__(self, hosts: Sequence[Host], warmup: Warmup | None) -> None:
        self._draw = Draw(hosts)
        self._alone = len(hosts) == 1
        self._warmup = warmup

    def pick(self, rng: random.Random, key: int | None, now: float) -> Host:
        first = self._draw.pick(rng, key, now)
        if self._alone:
            return first
        second = self._draw.pick(rng, key, now)
        return min(first, second, key=lambda host: (host.active + 1) / (host.weight * warmth(host, self._warmup, now)))


class RoundRobin:
    """In turn, each as often as its weight says, spread evenly (earliest deadline first); beginning anywhere, so that the first host does
    not get the first request of every waypoint."""

    def __init__(self, hosts: Sequence[Host], rng: random.Random, warmup: Warmup | None) -> None:
        self._warmup = warmup
        first = int(rng.random() * len(hosts))
        ordered = (*hosts[first:], *hosts[:first])
        self._turns = [(1.0 / host.weight, number, host) for number, host in enumerate(ordered)]
        heapq.heapify(self._turns)

    def pick(self, rng: random.Random, key: int | None, now: float) -> Host:
        deadline, number, host = self._turns[0]
        pace = host.weight * warmth(host, self._warmup, now)
        heapq.heapreplace(self._turns, (deadline + 1.0 / pace, number, host))
        return host


class Ring:
    """Consistent hashing: each host has points on a circle, and a key belongs to the next. Who comes or goes moves its own share alone."""

    def __init__(self, hosts: Sequence[Host], minimum_size: int) -> None:
        total = sum(host.weight for host in hosts)
        lightest = min(host.weight for host in hosts) / total
        scale = min(math.ceil(lightest * minimum_size) / lightest, MOST_SLOTS)
        points: list[tuple[int, int]] = []
        for number, host in enumerate(hosts):
            name = host.uid.encode()
            copies = max(1, round(scale * host.weight / total))
            points.extend((hash_text(b"%b_%d" % (name, copy)), number) for copy in range(copies))
        points.sort()
        self._at = [at for at, _ in points]
        self._owners = [hosts[number] for _, number in points]

    def __len__(self) -> int:
        """Points."""
        return len(self._at)

    def pick(self, rng: random.Random, key: int | None, now: float) -> Host:
        index = bisect_left(self._at, rng.getrandbits(64) if key is None else key)
        return self._owners[index % len(self._owners)]


class Maglev:
    """Consistent hashing by a table (Eisenbud et al., 2016): even shares and one look-up, for a little more movement when hosts change."""

    def __init__(self, hosts: Sequence[Host], size: int) -> None:
        self._table = _fill([(host, host.weight) for host in hosts], size)

    def __len__(self) -> int:
        """Slots."""
        return len(self._table)

    def pick(self, rng: random.Random, key: int | None, now: float) -> Host:
        return self._table[(rng.getrandbits(64) if key is None else key) % len(self._table)]


def _fill(hosts: Sequence[tuple[Host, int]], size: int) -> list[Host]:
    table: list[Host | None] = [None] * size
    heaviest = max(weight for _, weight in hosts)
    offsets = [hash_text(host.uid.encode()) % size for host, _ in hosts]
    skips = [hash_text(b"%b/skip" % host.uid.encode()) % max(1, size - 1) + 1 for host, _ in hosts]
    # The heaviest takes a slot each round, and who is half as heavy every other: the round of a host's next slot, and how many it has.
    turns = [(-(-heaviest // weight), number, 1) for number, (_, weight) in enumerate(hosts)]
    heapq.heapify(turns)
    for _ in range(size):
        _, number, taken = turns[0]
        host, weight = hosts[number]
        heapq.heapreplace(turns, (-(-(taken + 1) * heaviest // weight), number, taken + 1))
        at = offsets[number]
        while table[at] is not None:
            at = (at + skips[number]) % size
        table[at] = host
        offsets[number] = (at + skips[number]) % size
    return [owner for owner in table if owner is not None]


def warmth(host: Host, warmup: Warmup | None, now: float) -> float:
    """The part of its weight that a host gets while it is new: from ``minimum_percent`` to all of it over ``duration``."""
    if warmup is None or warmup.duration <= 0:
        return 1.0
    age = now - host.since
    if age >= warmup.duration:
        return 1.0
    grown = math.pow(max(0.0, age / warmup.duration), 1.0 / warmup.aggression)
    return max(warmup.minimum_percent / 100.0, grown, 0.01)
