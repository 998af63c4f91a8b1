"""Where requests go when endpoints are ill, at a waypoint and at Envoy: ejection, and what spills to the next priority."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pytest
import trio
from msgspec.structs import replace

from mesh.model.address import NamespacedHostname, SocketAddress
from mesh.model.l7.destination import Balance, DestinationConfig, LoadBalancer, Locality, OutlierDetection, TrafficPolicy
from mesh.model.workload import Locality as Place
from mesh.model.workload import PortMapping, Workload
from mesh.testing.envoy import Config
from tests.interop.beside_envoy import DEFAULT, Application, cluster, envoy, manager
from tests.unit.waypoint_py.harness import HOST, H1Client, World, default_route, loopback

pytestmark = pytest.mark.interop

REQUESTS = 400
HERE = Place("r", "z", "s")
ILL = {"health_status": "UNHEALTHY"}


class Named(Application):
    """An application at several addresses that answers with a status of its own, and counts."""

    def __init__(self, endpoints: int, status: int = 200) -> None:
        super().__init__({"/": self._answer}, ip="0.0.0.0")  # whatever loopback address is dialled
        self._status = status
        self.count = 0
        self.endpoints = tuple(SocketAddress(loopback(), self.address.port) for _ in range(endpoints))

    def take(self) -> int:
        """How many there were since it was last asked."""
        count, self.count = self.count, 0
        return count

    def _answer(self, sock: socket.socket) -> None:
        self.count += 1
        sock.sendall(b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % self._status)


@contextmanager
def named(endpoints: int, status: int = 200) -> Iterator[Named]:
    with closing(Named(endpoints, status)) as application:
        yield application


async def _shares(stream: trio.abc.Stream, applications: tuple[Named, ...], number: int) -> list[int]:
    """How many of ``number`` requests each application got."""
    client = H1Client(stream)
    statuses = Counter([(await client.get("/")).status for _ in range(number)])
    assert set(statuses) <= {200, 503}
    await stream.aclose()
    return [application.take() for application in applications]


def _compare(number: int, theirs: Config, policy: TrafficPolicy, workloads: Sequence[Workload], *applications: Named) -> list[list[int]]:
    """Ours and theirs."""
    world = World()
    world.us = replace(world.us, locality=HERE)
    with envoy([theirs], lambda log: manager(log, [DEFAULT])) as beside:
        found: list[list[int]] = []

        async def main() -> None:
            world.describe(*workloads, routes=[default_route(retry=None)])
            world.push(DestinationConfig("shop", HOST, policy=policy))
            found.append(await _shares(await world.open(), applications, number))
            stream = await trio.open_tcp_stream(str(beside.address.ip), beside.address.port)
            found.append(await _shares(stream, applications, number))
            for application in applications:
                application.hang_up()
            await world.until(lambda: not any(application.open for application in applications))

        world.run(main)
    return found


def _pods(application: Named, locality: Place = HERE) -> list[Workload]:
    found = []
    for address in application.endpoints:
        name, serves = f"pod-{address.ip}", {NamespacedHostname("shop", HOST): (PortMapping(80, address.port),)}
        found.append(Workload(f"Kubernetes//Pod/shop/{name}", name, "shop", (address.ip,), locality=locality, services=serves))
    return found


@pytest.mark.parametrize(("percent", "expected"), [
    (50, [[35, 5], [35, 5]]),
    # Of two, ten percent are none. One may be ejected all the same, as with Envoy before 1.31: else the default would protect nobody who
    # has fewer than ten.
    (10, [[35, 5], [20, 20]]),
])  # fmt: skip
def test_an_endpoint_that_fails_is_ejected_after_as_many_failures(percent: int, expected: list[list[int]]) -> None:
    with named(1) as good, named(1, status=503) as bad:
        theirs = cluster(
            *("application", *good.endpoints, *bad.endpoints),
            lb_policy="ROUND_ROBIN",
            outlier_detection={"consecutive_5xx": 5, "max_ejection_percent": percent, "enforcing_success_rate": 0},
            common_lb_config={"healthy_panic_threshold": {}},
        )
        outlier = OutlierDetection(max_ejection_percent=percent)
        policy = TrafficPolicy(load_balancer=LoadBalancer(simple=Balance.ROUND_ROBIN), outlier=outlier)
        assert _compare(40, theirs, policy, [*_pods(good), *_pods(bad)], good, bad) == expected


@pytest.mark.parametrize(("well", "near_share"), [(3, 1.0), (2, 0.7), (1, 0.35)])
def test_what_the_nearest_cannot_carry_spills_to_the_next(well: int, near_share: float) -> None:
    with named(well) as near, named(4 - well, status=503) as ill, named(4) as far:
        theirs = cluster(
            "application",
            lb_policy="RANDOM",
            common_lb_config={"healthy_panic_threshold": {}},
        )
        theirs["load_assignment"]["endpoints"] = [
            {"priority": 0, "lb_endpoints": [*map(_endpoint, near.endpoints), *[_endpoint(each) | ILL for each in ill.endpoints]]},
            {"priority": 1, "lb_endpoints": list(map(_endpoint, far.endpoints))},
        ]
        policy = TrafficPolicy(
            load_balancer=LoadBalancer(simple=Balance.RANDOM, locality=Locality()),
            outlier=OutlierDetection(consecutive_5xx=1, max_ejection_percent=100),
        )
        workloads = [*_pods(near), *_pods(ill), *_pods(far, Place("elsewhere"))]
        ours, envoys = _compare(REQUESTS, theirs, policy, workloads, near, ill, far)
        assert (ours[1], envoys[1]) == (4 - well, 0)  # ours find out by asking once
        for counts in (ours, envoys):
            assert abs(counts[0] / REQUESTS - near_share) < (0.1 if near_share < 1 else 0.05)


def _endpoint(address: SocketAddress) -> Config:
    return {"endpoint": {"address": {"socket_address": {"address": str(address.ip), "port_value": address.port}}}}
