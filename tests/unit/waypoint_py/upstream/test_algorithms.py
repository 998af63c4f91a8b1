from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mesh.model.l7.destination import MOST_SLOTS, Balance, ConsistentHash, HashSource, LoadBalancer, Warmup
from mesh.model.workload import Workload
from waypoint_py.upstream.algorithms import Algorithm, Host, Maglev, Ring, hash_text, make_algorithm


def hosts(*weights: int, since: float = float("-inf")) -> list[Host]:
    return [Host(Workload(f"uid-{n}", f"w{n}", "shop"), 8080, weight, since) for n, weight in enumerate(weights)]


def shares(algorithm: Algorithm, picks: int, rng: random.Random, now: float = 0.0) -> dict[str, float]:
    counts = Counter(algorithm.pick(rng, None, now).uid for _ in range(picks))
    return {uid: count / picks for uid, count in counts.items()}


def test_round_robin_gives_each_its_turn_and_begins_anywhere() -> None:
    starts = set()
    for seed in range(20):
        rng = random.Random(seed)
        algorithm = make_algorithm(hosts(1, 1, 1), LoadBalancer(simple=Balance.ROUND_ROBIN), rng)
        turns = [algorithm.pick(rng, None, 0.0).uid for _ in range(6)]
        assert sorted(turns[:3]) == ["uid-0", "uid-1", "uid-2"]
        assert turns[:3] == turns[3:]
        starts.add(turns[0])
    assert starts == {"uid-0", "uid-1", "uid-2"}


def test_round_robin_spreads_weights_evenly() -> None:
    rng = random.Random(1)
    algorithm = make_algorithm(hosts(1, 3), LoadBalancer(simple=Balance.ROUND_ROBIN), rng)
    turns = [algorithm.pick(rng, None, 0.0).uid for _ in range(40)]
    assert turns.count("uid-1") == 30
    assert "uid-0 uid-0" not in " ".join(turns)


def test_a_random_choice_goes_by_weight() -> None:
    rng = random.Random(1)
    found = shares(make_algorithm(hosts(1, 9), LoadBalancer(simple=Balance.RANDOM), rng), 5000, rng)
    assert 0.08 < found["uid-0"] < 0.12


def test_least_request_prefers_the_idle_one() -> None:
    rng = random.Random(1)
    two = hosts(1, 1)
    two[0].active = 10
    found = shares(make_algorithm(two, LoadBalancer(), rng), 2000, rng)
    assert found["uid-1"] > 0.7


def test_a_new_host_gets_a_small_part_that_grows() -> None:
    rng = random.Random(1)
    pair = hosts(1, 1)
    pair[1].since = 0.0
    balancer = LoadBalancer(simple=Balance.ROUND_ROBIN, warmup=Warmup(100.0))
    early = shares(make_algorithm(pair, balancer, rng), 1000, rng, now=1.0)
    grown = shares(make_algorithm(pair, balancer, rng), 1000, rng, now=200.0)
    assert early["uid-1"] < 0.15
    assert abs(grown["uid-1"] - 0.5) < 0.01


@given(st.integers(1, 12), st.binary(max_size=20), st.sampled_from([None, 251]))
def test_a_key_stays_with_its_host(count: int, key: bytes, table: int | None) -> None:
    rng = random.Random(1)
    balancer = LoadBalancer(hash=ConsistentHash(HashSource(), table_size=table))
    everybody = hosts(*[1] * count)
    chosen = make_algorithm(everybody, balancer, rng).pick(rng, hash_text(key), 0.0)
    assert make_algorithm(everybody, balancer, rng).pick(rng, hash_text(key), 0.0) is chosen


def test_a_ring_moves_few_keys_when_one_of_ten_goes() -> None:
    rng = random.Random(1)
    balancer = LoadBalancer(hash=ConsistentHash(HashSource(), minimum_ring_size=4096))
    ten = hosts(*[1] * 10)
    full, less = make_algorithm(ten, balancer, rng), make_algorithm(ten[:9], balancer, rng)
    keys = [hash_text(b"%d" % n) for n in range(2000)]
    stayed = [full.pick(rng, key, 0.0) is less.pick(rng, key, 0.0) for key in keys if full.pick(rng, key, 0.0) is not ten[9]]
    assert sum(stayed) / len(stayed) > 0.85


def test_maglev_moves_few_keys_when_one_of_ten_goes() -> None:
    rng = random.Random(1)
    balancer = LoadBalancer(hash=ConsistentHash(HashSource(), table_size=65537))
    ten = hosts(*[1] * 10)
    full, less = make_algorithm(ten, balancer, rng), make_algorithm(ten[:9], balancer, rng)
    keys = [hash_text(b"%d" % n) for n in range(2000)]
    stayed = [full.pick(rng, key, 0.0) is less.pick(rng, key, 0.0) for key in keys if full.pick(rng, key, 0.0) is not ten[9]]
    assert sum(stayed) / len(stayed) > 0.95
    counts = Counter(full.pick(rng, key, 0.0).uid for key in keys)
    assert len(counts) == 10
    assert min(counts.values()) > 120


def test_a_ring_gives_each_about_its_weight() -> None:
    rng = random.Random(1)
    found = shares(make_algorithm(hosts(1, 3), LoadBalancer(hash=ConsistentHash(HashSource())), rng), 5000, rng)
    assert 0.15 < found["uid-0"] < 0.35


def test_a_rule_that_asks_for_millions_of_slots_does_not_stop_the_waypoint_to_make_them() -> None:
    rng = random.Random(1)
    trio = hosts(1, 1, 1)
    ring = make_algorithm(trio, LoadBalancer(hash=ConsistentHash(HashSource(), minimum_ring_size=8 << 20)), rng)
    assert isinstance(ring, Ring)
    assert len(ring) <= MOST_SLOTS + len(trio)
    uneven = make_algorithm(hosts(1, 10**9), LoadBalancer(hash=ConsistentHash(HashSource())), rng)
    assert isinstance(uneven, Ring)
    assert len(uneven) <= MOST_SLOTS + len(trio)
    maglev = make_algorithm(trio, LoadBalancer(hash=ConsistentHash(HashSource(), table_size=4_999_999)), rng)
    assert isinstance(maglev, Maglev)
    assert len(maglev) == MOST_SLOTS


def test_maglev_gives_each_its_weight_however_uneven() -> None:
    rng = random.Random(1)
    balancer = LoadBalancer(hash=ConsistentHash(HashSource(), table_size=65537))
    found = shares(make_algorithm(hosts(1, 3, 4), balancer, rng), 20_000, rng)
    assert [round(found[f"uid-{n}"], 1) for n in range(3)] == [0.1, 0.4, 0.5]
    assert shares(make_algorithm(hosts(10**6, *[1] * 2000), balancer, rng), 1000, rng) == {"uid-0": 1.0}
