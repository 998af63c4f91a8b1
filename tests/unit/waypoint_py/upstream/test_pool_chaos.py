"""A random walk through everything that may happen to a pool at once: every request is told one end, and no count is left over."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable

import pytest

from mesh.model.l7.destination import TrafficPolicy
from mesh.testing.proxies import open_descriptors, wait_until
from tests.unit.waypoint_py.upstream.conftest import Agent, Answer, Application, ServerEnd, World, endpoint_at, in_mesh, limited
from waypoint_py.upstream.session import Endpoint, UpstreamProtocol, UpstreamStream

POLICIES = (
    TrafficPolicy(),
    limited(max_connections=3),
    limited(max_connections=2, max_pending=3),
    limited(max_requests=4, max_requests_per_connection=2),
    limited(max_concurrent_streams=2, http_idle_timeout=0.02),
    limited(max_connection_duration=0.03),
)


def unreliable(rng: random.Random) -> Callable[[ServerEnd], None]:
    """A server that may do anything at any time."""

    def script(end: ServerEnd) -> None:
        while (request := end.read_request()) is not None:
            stream, path, body = request
            match rng.randrange(14):
                case 0:
                    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                case 1:
                    return
                case 2:
                    end.send("R", stream, b"untouched" if rng.random() < 0.5 else b"")
                case 3:
                    end.send("H", stream, b"200")
                    end.send("D", stream, b"half")
                    return
                case 4:
                    end.answer(stream, path)
                    end.send("G", 0)
                case 5:
                    end.sock.sendall(b"nonsense 1 0\n")
                case 6:
                    time.sleep(0.005)
                    end.answer(stream, body)
                case 7:
                    end.send("H", stream, b"204.")
                case _:
                    end.answer(stream, path + body)

    return script


class Walk:
    """Requests begun and called off in turn, on one loop."""

    def __init__(self, world: World, endpoints: list[Endpoint], rng: random.Random) -> None:
        self.world, self.endpoints, self.rng = world, endpoints, rng
        self.answers: list[Answer] = []
        self.given_up: list[Answer] = []

    def step(self) -> None:
        rng = self.rng
        under_way = [answer for answer in self.answers if answer not in self.given_up]
        if under_way and rng.random() < 0.15:
            victim = rng.choice(under_way)
            self.given_up.append(victim)
            assert victim.cancel is not None
            cancel = victim.cancel
            self.world.call(lambda: (cancel.cancel(), victim.calls.append("given up")))
            return
        body = b"x" * rng.choice([1, 1000, 200_000]) if rng.random() < 0.4 else None
        protocol = rng.choice([UpstreamProtocol.HTTP1, UpstreamProtocol.HTTP2])
        self.answers.append(self.world.ask(rng.choice(self.endpoints), f"/{len(self.answers)}", protocol=protocol, body=body))

    def check(self) -> None:
        for answer in self.answers:
            if answer in self.given_up:
                assert answer.calls[-1] == "given up", "no word after that"
            else:
                answer.wait()
            assert answer.calls.count("open") <= 1
            assert sum(answer.calls.count(end) for end in ("complete", "failed", "response, ended")) <= 1


@pytest.mark.parametrize("seed", range(12))
def test_a_random_walk_leaves_every_count_at_nothing(world: World, serve: Callable[..., Application], agent: Agent, seed: int) -> None:
    rng = random.Random(seed)
    applications = [serve(unreliable(random.Random(seed + number))) for number in range(3)]
    policy = POLICIES[seed % len(POLICIES)]
    endpoints = [endpoint_at(application.address, policy) for application in applications]
    endpoints += [in_mesh(endpoint) for endpoint in endpoints]
    walk = Walk(world, endpoints, rng)
    for _ in range(120):
        walk.step()
        if rng.random() < 0.1:
            time.sleep(0.01)
    walk.check()

    def counts() -> list[tuple[int, int]]:
        return [(breaker.requests, breaker.pending) for breaker in world.pool._breakers.values()]

    assert set(world.thread.call(counts)) <= {(0, 0)}
    world.call(lambda: world.pool.close(gracefully=True))
    wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "every connection to go")


def keep_open(stream: UpstreamStream) -> None:
    stream.send_data(b"x" * 100_000)


def test_requests_that_never_end_are_called_off_without_trace(world: World, serve: Callable[..., Application], agent: Agent) -> None:
    application = serve(lambda end: [None for _ in iter(end.read, None)])
    before = open_descriptors()
    endpoint = in_mesh(endpoint_at(application.address))
    for protocol in (UpstreamProtocol.HTTP1, UpstreamProtocol.HTTP2):
        answers = []
        for _ in range(20):
            answer = Answer()
            answer.on_open = keep_open
            answers.append(world.ask(endpoint, protocol=protocol, ended=False, answer=answer))
        wait_until(lambda answers=answers: all("open" in answer.calls for answer in answers), "all to be open")
        world.call(lambda answers=answers: [answer.stream.reset() for answer in answers])
        assert not any(answer.over for answer in answers)
    world.call(lambda: world.pool.close(gracefully=True))
    wait_until(lambda: world.call(lambda: world.pool.connections) == 0, "every connection to go")
    wait_until(lambda: open_descriptors() <= before, "descriptors to be given back")
