"""Injected faults, and copies of requests."""

from __future__ import annotations

import random

import pytest

from mesh.model.l7.routing import Destination, Fault, Mirror
from tests.corpus.facts import asked
from waypoint_py.routing.fault import draw_fault
from waypoint_py.routing.grpc import trailers_only
from waypoint_py.routing.mirror import draw_mirrors, mirrored, shadow_authority
from waypoint_py.verdict import Flag

RNG = random.Random(3)


def test_an_abort_is_an_answer_of_ours_with_its_flag() -> None:
    injection = draw_fault(Fault(status=418, abort_percent=100), RNG, "VirtualService shop/a")
    assert injection is not None
    assert injection.delay == 0
    assert injection.reply is not None
    assert (injection.reply.status, injection.reply.body, injection.reply.details) == (418, b"fault filter abort", "fault_filter_abort")
    assert injection.reply.flags == (Flag.FAULT_INJECTED,)
    assert injection.reply.because == "VirtualService shop/a: injected fault"


def test_a_grpc_abort_has_its_status() -> None:
    injection = draw_fault(Fault(grpc_status=14, abort_percent=100), RNG)
    assert injection is not None
    assert injection.reply is not None
    assert (injection.reply.status, injection.reply.grpc_status) == (200, 14)
    assert trailers_only(injection.reply).headers == [
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"14"),
        (b"grpc-message", b"fault filter abort"),
    ]


def test_a_delay_comes_before_the_abort_and_the_log_shows_both() -> None:
    injection = draw_fault(Fault(5.0, 100, 503, None, 100), RNG)
    assert injection is not None
    assert injection.delay == 5.0
    assert injection.reply is not None
    assert injection.reply.flags == (Flag.DELAY_INJECTED, Flag.FAULT_INJECTED)


def test_a_delay_alone_lets_the_request_go_on() -> None:
    injection = draw_fault(Fault(0.5, 100), RNG)
    assert injection is not None
    assert (injection.delay, injection.reply) == (0.5, None)


@pytest.mark.parametrize(
    "fault", [Fault(), Fault(delay=1.0), Fault(status=500), Fault(abort_percent=100), Fault(delay_percent=100), Fault(1.0, 0, 500, None, 0)]
)
def test_a_fault_without_percentage_or_without_anything_to_do_never_hits(fault: Fault) -> None:
    assert all(draw_fault(fault, RNG) is None for _ in range(100))


def test_delay_and_abort_are_drawn_by_themselves() -> None:
    rng = random.Random(5)
    drawn = [draw_fault(Fault(1.0, 30, 500, None, 20), rng) for _ in range(4000)]
    hits = [each for each in drawn if each is not None]
    delayed = sum(each.delay > 0 for each in hits)
    aborted = sum(each.reply is not None for each in hits)
    both = sum(each.delay > 0 and each.reply is not None for each in hits)
    assert abs(delayed / 4000 - 0.30) < 0.03
    assert abs(aborted / 4000 - 0.20) < 0.03
    assert abs(both / 4000 - 0.06) < 0.02


def mirror(name: str, percent: float = 100.0) -> Mirror:
    return Mirror(Destination("shop", name, 80), percent)


def test_every_mirror_is_drawn_by_itself() -> None:
    rng = random.Random(9)
    mirrors = (mirror("a", 20), mirror("b", 50), mirror("c", 35), mirror("all"), mirror("none", 0))
    counts = {each.destination.hostname: 0 for each in mirrors}
    for _ in range(4000):
        for each in draw_mirrors(mirrors, rng):
            counts[each.destination.hostname] += 1
    assert (counts["all"], counts["none"]) == (4000, 0)
    assert [round(counts[name] / 4000, 1) for name in "ab"] == [0.2, 0.5]
    assert abs(counts["c"] / 4000 - 0.35) < 0.03


@pytest.mark.parametrize(
    ("authority", "shadow"),
    [
        ("b", "b-shadow"),
        ("b:80", "b-shadow:80"),
        ("10.0.0.1:80", "10.0.0.1-shadow:80"),
        ("[fd00::1]:80", "[fd00::1]:80"),
        ("[fd00::1]", "[fd00::1]"),
        ("", ""),
    ],
)
def test_a_copy_can_be_told_by_its_authority(authority: str, shadow: str) -> None:
    assert shadow_authority(authority.encode()) == shadow.encode()


def test_a_copy_is_a_request_of_its_own() -> None:
    request = asked("/a?b", ("x", "1"), method="POST")
    request.expect_continue = True
    copy = mirrored(request)
    copy.replace(b"x", b"2")
    assert (copy.method, copy.path, copy.authority, copy.expect_continue) == (b"POST", b"/a?b", b"b-shadow", False)
    assert (request.authority, request.headers, request.expect_continue) == (b"b", [(b"x", b"1")], True)
