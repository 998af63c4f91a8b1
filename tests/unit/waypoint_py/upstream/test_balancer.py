from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.http.message import Request
from mesh.model.address import NamespacedHostname, NetworkAddress, SocketAddress
from mesh.model.l7.destination import (
    Balance,
    ConsistentHash,
    DestinationConfig,
    Distribute,
    HashCookie,
    HashHeader,
    HashQuery,
    HashSource,
    LoadBalancer,
    Locality,
    OutlierDetection,
    Subset,
    TrafficPolicy,
)
from mesh.model.l7.routing import Destination
from mesh.model.service import Service, ServicePort
from mesh.model.workload import HealthStatus, PortMapping, Workload
from mesh.model.workload import Locality as Place
from mesh.state.store import Delta, MeshState
from waypoint_py.upstream.balancer import Balancer, NoEndpoint, Wish
from waypoint_py.upstream.levels import share_out
from waypoint_py.upstream.outlier import LocalOutcome
from waypoint_py.upstream.session import Endpoint

KEY = NamespacedHostname("shop", "reviews.shop.svc.cluster.local")
TO = Destination("shop", KEY.hostname, 80)
SERVICE = Service("reviews", "shop", KEY.hostname, (NetworkAddress("", ip_address("10.96.0.1")),), ports=(ServicePort(80, 8080),))
CLIENT = SocketAddress(ip_address("10.0.0.9"), 40000)


def pod(number: int, region: str = "r1", zone: str = "z1", subzone: str = "", **fields: object) -> Workload:
    values: dict[str, object] = {
        "addresses": (ip_address(f"10.0.1.{number}"), ip_address(f"fd00::{number}")),
        "services": {KEY: (PortMapping(80, 8080),)},
        "locality": Place(region, zone, subzone),
        **fields,
    }
    return Workload(f"uid-{number}", f"reviews-{number}", "shop", **values)


class World:
    """A mesh of one service, and a waypoint in r1/z1 before it."""

    def __init__(self, *pods: Workload, config: DestinationConfig | None = None, seed: int = 1, told_of_changes: bool = True) -> None:
        self.state = MeshState()
        self.state.apply(Delta(workloads=pods, services=(SERVICE,)))
        self.config = config
        self.rng = random.Random(seed)
        source = Workload("waypoint", "waypoint", "shop", locality=Place("r1", "z1", ""))
        self.version = 0
        version = (lambda: self.version) if told_of_changes else None
        self.balancer = Balancer(self.state, lambda key: self.config if key == KEY else None, lambda: source, self.rng, version)

    def configure(self, config: DestinationConfig | None) -> None:
        self.config = config
        self.version += 1

    def choose(self, to: Destination = TO, now: float = 0.0, **wish: object) -> Endpoint:
        endpoint = self.balancer.choose(to, Wish(**wish), now)
        assert isinstance(endpoint, Endpoint), endpoint
        return endpoint

    def refusal(self, to: Destination = TO, now: float = 0.0) -> NoEndpoint:
        found = self.balancer.choose(to, Wish(), now)
        assert isinstance(found, NoEndpoint), found
        return found

    def shares(self, picks: int = 1000, now: float = 0.0) -> dict[str, float]:
        counts = Counter(self.choose(now=now).workload.name for _ in range(picks))
        return {name: count / picks for name, count in counts.items()}


def config(
    policy: TrafficPolicy | None = None, labels: Mapping[str, Mapping[str, str]] | None = None, **fields: object
) -> DestinationConfig:
    return DestinationConfig("shop", KEY.hostname, policy=policy or TrafficPolicy(), labels=labels or {}, **fields)


def located(**locality: object) -> DestinationConfig:
    return config(
        TrafficPolicy(
            load_balancer=LoadBalancer(simple=Balance.RANDOM, locality=Locality(**locality)),
            outlier=OutlierDetection(consecutive_5xx=1, max_ejection_percent=100),
        )
    )


def test_an_endpoint_is_dialled_on_its_target_port_in_the_family_that_the_client_used() -> None:
    world = World(pod(1))
    assert str(world.choose(like=ip_address("10.96.0.1")).address) == "10.0.1.1:8080"
    assert str(world.choose(like=ip_address("fd00::99")).address) == "[fd00::1]:8080"


def test_an_endpoint_that_is_chosen_again_is_the_same_object_until_something_changes() -> None:
    world = World(pod(1))
    first, six = world.choose(like=ip_address("10.96.0.1")), world.choose(like=ip_address("fd00::99"))
    assert world.choose(like=ip_address("10.96.0.1")) is first
    assert world.choose(like=ip_address("fd00::99")) is six
    world.state.apply(Delta(workloads=(pod(1, services={KEY: (PortMapping(80, 9090),)}),)))
    assert str(world.choose(like=ip_address("10.96.0.1")).address) == "10.0.1.1:9090"


def test_unhealthy_endpoints_take_nothing_and_none_left_is_said() -> None:
    world = World(pod(1, status=HealthStatus.UNHEALTHY))
    assert world.refusal() == NoEndpoint("shop/reviews.shop.svc.cluster.local port 80 has no healthy endpoint", known=True)


def test_what_does_not_exist_is_told_apart_from_what_is_down() -> None:
    world = World(pod(1))
    assert not world.refusal(Destination("shop", "nobody", 80)).known
    assert not world.refusal(Destination("shop", KEY.hostname, 81)).known
    assert "subset 'v2'" in world.refusal(Destination("shop", KEY.hostname, 80, "v2")).because


def test_a_subset_is_the_endpoints_with_its_labels() -> None:
    labels = {"uid-1": {"version": "v1"}, "uid-2": {"version": "v2"}}
    world = World(pod(1), pod(2), config=config(labels=labels, subsets=(Subset("v2", {"version": "v2"}),)))
    assert {world.choose(Destination("shop", KEY.hostname, 80, "v2")).workload.name for _ in range(50)} == {"reviews-2"}


def test_endpoints_that_come_and_go_are_chosen_and_not_chosen_at_once() -> None:
    world = World(pod(1))
    world.choose()
    world.state.apply(Delta(workloads=(pod(2),), removed_addresses=("uid-1",)))
    assert world.choose().workload.name == "reviews-2"


def test_near_endpoints_take_everything_until_they_fail() -> None:
    world = World(pod(1), pod(2, zone="z2"), pod(3, region="r2"), config=located())
    assert world.shares(200) == {"reviews-1": 1.0}
    world.balancer.answered(world.choose(), 500, 0.0)
    assert world.shares(200) == {"reviews-2": 1.0}
    world.balancer.answered(world.choose(), 500, 0.0)
    assert world.shares(200) == {"reviews-3": 1.0}


def test_near_is_preferred_where_failures_are_seen_and_nobody_says_otherwise() -> None:
    policy = TrafficPolicy(outlier=OutlierDetection(consecutive_5xx=1, max_ejection_percent=100))
    world = World(pod(1), pod(2, zone="z2"), config=config(policy))
    assert world.shares(100) == {"reviews-1": 1.0}
    world.balancer.answered(world.choose(), 500, 0.0)
    assert world.shares(100) == {"reviews-2": 1.0}
    off = TrafficPolicy(load_balancer=LoadBalancer(locality=Locality(enabled=False)), outlier=policy.outlier)
    assert len(World(pod(1), pod(2, zone="z2"), config=config(off)).shares()) == 2


def test_half_of_the_near_ones_down_sends_the_overflow_on() -> None:
    world = World(pod(1), pod(2), pod(3, zone="z2"), config=located())
    first = world.choose()
    world.balancer.answered(first, 500, 0.0)
    far = world.shares(4000).get("reviews-3", 0.0)
    assert 0.25 < far < 0.35  # 1 - 1.4 * 0.5


def test_without_outlier_detection_localities_do_not_matter_unless_the_service_asks() -> None:
    setting = TrafficPolicy(load_balancer=LoadBalancer(simple=Balance.RANDOM, locality=Locality()))
    assert len(World(pod(1), pod(2, zone="z2"), config=config(setting)).shares()) == 2
    setting = TrafficPolicy(load_balancer=LoadBalancer(simple=Balance.RANDOM, locality=Locality(without_outlier_detection=True)))
    assert len(World(pod(1), pod(2, zone="z2"), config=config(setting)).shares()) == 1


def test_failover_names_the_region_that_helps_out() -> None:
    world = World(pod(1, region="r2"), pod(2, region="r3"), config=located(failover=(("r1", "r3"),)))
    assert world.shares(100) == {"reviews-2": 1.0}


def test_distribute_shares_by_percent_and_gives_nothing_to_the_unnamed() -> None:
    rule = Distribute("r1/*", {"r1/z1/*": 80, "r1/z2": 20})
    world = World(pod(1), pod(2, zone="z2"), pod(3, region="r2"), config=located(distribute=(rule,)))
    shares = world.shares(4000)
    assert 0.77 < shares["reviews-1"] < 0.83
    assert "reviews-3" not in shares


def test_priority_goes_by_the_labels_shared_from_the_first_on() -> None:
    labels = {"waypoint": {"team": "a"}, "uid-1": {"team": "b"}, "uid-2": {"team": "a"}}
    policy = located(priority=("team",)).policy
    world = World(pod(1), pod(2), config=config(policy, labels=labels))
    assert world.shares(100) == {"reviews-2": 1.0}
    policy = located(priority=("team=b",)).policy
    assert World(pod(1), pod(2), config=config(policy, labels=labels)).shares(100) == {"reviews-1": 1.0}


def test_a_retry_avoids_the_endpoint_that_failed() -> None:
    world = World(pod(1), pod(2))
    first = world.choose()
    others = Counter(world.choose(tried={first.key}).key == first.key for _ in range(500))
    assert others[True] < 25  # five draws of two


def test_a_retry_elsewhere_leaves_the_nearest_level() -> None:
    world = World(pod(1), pod(2, zone="z2"), config=located())
    assert world.choose(elsewhere=1).workload.name == "reviews-2"
    assert world.choose(elsewhere=5).workload.name == "reviews-1"


def test_all_ejected_is_no_endpoint_with_the_reasons_and_time_heals() -> None:
    world = World(pod(1), config=located())
    endpoint = world.choose()
    world.balancer.happened_here(endpoint, LocalOutcome.FAILED, 0.0)
    refusal = world.refusal()
    assert refusal.known
    assert "1 answers in a row were 5xx" in refusal.because
    assert world.choose(now=100.0).workload.name == "reviews-1"


def test_what_was_learnt_of_a_host_stays_when_others_come() -> None:
    world = World(pod(1), pod(2), config=located())
    bad = world.choose()
    world.balancer.answered(bad, 500, 0.0)
    world.state.apply(Delta(workloads=(pod(3),)))
    assert bad.workload is not None
    assert bad.workload.name not in world.shares(300)


def test_too_few_healthy_disregards_ejections() -> None:
    outlier = OutlierDetection(consecutive_5xx=1, max_ejection_percent=100, min_health_percent=60)
    world = World(pod(1), pod(2), config=config(TrafficPolicy(outlier=outlier)))
    world.balancer.answered(world.choose(), 500, 0.0)
    assert len(world.shares(300)) == 2


def test_least_request_counts_what_began_and_ended() -> None:
    world = World(pod(1), pod(2))
    busy = world.choose()
    for _ in range(20):
        world.balancer.began(busy)
    assert busy.workload is not None
    assert world.shares(500)[busy.workload.name] < 0.35
    for _ in range(20):
        world.balancer.ended(busy)
    assert world.shares(500)[busy.workload.name] > 0.4


def hashing(key: HashHeader | HashCookie | HashQuery | HashSource) -> DestinationConfig:
    return config(TrafficPolicy(load_balancer=LoadBalancer(hash=ConsistentHash(key))))


def get(path: bytes = b"/", *headers: tuple[bytes, bytes]) -> Request:
    return Request(b"GET", b"http", b"reviews", path, list(headers))


def test_the_same_key_goes_to_the_same_endpoint() -> None:
    for key, request, other in (
        (HashHeader("X-User"), get(b"/", (b"x-user", b"ann")), get()),
        (HashQuery("u ser"), get(b"/?a=1&u%20ser=ann"), get(b"/?user=ann")),
        (HashCookie("id"), get(b"/", (b"cookie", b"a=b; id=ann")), get(b"/", (b"cookie", b"a=b"))),
    ):
        world = World(*(pod(n) for n in range(1, 9)), config=hashing(key))
        affinity = world.balancer.find_affinity(TO, request, CLIENT)
        assert affinity.key is not None
        assert len({world.choose(affinity=affinity).key for _ in range(50)}) == 1
        assert world.balancer.find_affinity(TO, other, CLIENT).key is None
    world = World(*(pod(n) for n in range(1, 9)), config=hashing(HashSource()))
    assert world.balancer.find_affinity(TO, None, CLIENT).key is not None


def test_a_cookie_with_a_ttl_is_made_where_there_is_none() -> None:
    world = World(pod(1), config=hashing(HashCookie("id", path="/shop", ttl=60.0, attributes=(("SameSite", "Strict"),))))
    affinity = world.balancer.find_affinity(TO, get(), CLIENT)
    assert affinity.set_cookie is not None
    name, *rest = affinity.set_cookie.split(b"; ")
    assert rest == [b"Max-Age=60", b"Path=/shop", b"SameSite=Strict", b"HttpOnly"]
    again = world.balancer.find_affinity(TO, get(b"/", (b"cookie", name)), CLIENT)
    assert again.key == affinity.key
    assert again.set_cookie is None
    session = World(pod(1), config=hashing(HashCookie("id", ttl=0.0))).balancer.find_affinity(TO, get(), CLIENT)
    assert session.set_cookie is not None
    assert b"Max-Age" not in session.set_cookie


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda pair: (min(pair), max(1, *pair))), min_size=1, max_size=5))
def test_shares_of_levels_sum_to_one_and_nearer_levels_never_carry_less_than_they_can(healthy: list[tuple[int, int]]) -> None:
    shares = share_out(healthy)
    if all(good == 0 for good, _ in healthy):
        assert shares == [0.0] * len(healthy)
        return
    assert abs(sum(shares) - 1.0) < 1e-9
    assert all(share >= 0 for share in shares)
    assert all(share == 0 for share, (good, _) in zip(shares, healthy, strict=True) if good == 0)
    if healthy[0][0] == healthy[0][1]:
        assert shares[0] == 1.0


@given(
    st.lists(
        st.tuples(
            st.integers(1, 4), st.sampled_from(["up", "down", "gone", "service", "no service", "plain", "located", "hash", "500", "200"])
        ),
        max_size=40,
    )
)
def test_what_is_remembered_of_a_destination_outlives_no_change(steps: list[tuple[int, str]]) -> None:
    worlds = [World(told_of_changes=told, seed=3) for told in (True, False)]
    request = Request(b"GET", b"http", b"x", b"/", [(b"x-user", b"ann")])
    for now, (number, step) in enumerate(steps):
        for world in worlds:
            match step:
                case "up" | "down":
                    status = HealthStatus.HEALTHY if step == "up" else HealthStatus.UNHEALTHY
                    world.state.apply(Delta(workloads=(pod(number, zone=f"z{number % 3}", status=status),)))
                case "gone":
                    world.state.apply(Delta(removed_addresses=(f"uid-{number}",)))
                case "service":
                    world.state.apply(Delta(services=(replace(SERVICE, ports=(ServicePort(80, 8080 + number),)),)))
                case "no service":
                    world.state.apply(Delta(removed_addresses=(str(KEY),)))
                case "plain":
                    world.configure(None)
                case "located":
                    world.configure(located())
                case "hash":
                    world.configure(config(TrafficPolicy(load_balancer=LoadBalancer(hash=ConsistentHash(HashHeader("x-user"))))))
                case status:
                    found = world.balancer.choose(TO, Wish(), float(now))
                    if isinstance(found, Endpoint):
                        world.balancer.began(found)
                        world.balancer.answered(found, int(status), float(now))
        one, other = (
            (world.balancer.find_affinity(TO, request, CLIENT), world.balancer.choose(TO, Wish(), float(now))) for world in worlds
        )
        assert one == other
        assert [world.balancer.describe(float(now)) for world in worlds[:1]] == [
            world.balancer.describe(float(now)) for world in worlds[1:]
        ]


@given(
    st.randoms(use_true_random=False),
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["up", "down", "gone", "500", "200"])), max_size=40),
)
def test_whatever_happened_a_choice_is_a_healthy_endpoint_that_is_there(rng: random.Random, steps: list[tuple[int, str]]) -> None:
    world = World(config=located())
    world.balancer._rng = rng
    there: dict[int, bool] = {}
    for now, (number, step) in enumerate(steps):
        match step:
            case "up" | "down":
                there[number] = step == "up"
                status = HealthStatus.HEALTHY if step == "up" else HealthStatus.UNHEALTHY
                world.state.apply(Delta(workloads=(pod(number, zone=f"z{number % 3}", status=status),)))
            case "gone":
                there.pop(number, None)
                world.state.apply(Delta(removed_addresses=(f"uid-{number}",)))
            case status:
                found = world.balancer.choose(TO, Wish(), float(now))
                if isinstance(found, Endpoint):
                    world.balancer.answered(found, int(status), float(now))
        found = world.balancer.choose(TO, Wish(), float(now))
        healthy = {f"reviews-{n}" for n, up in there.items() if up}
        if isinstance(found, Endpoint):
            assert found.workload is not None
            assert found.workload.name in healthy
        else:
            assert not healthy or "ejected" in found.because
