"""Which failures are tried again: Envoy's conditions against everything that can come back."""

from __future__ import annotations

import random

import pytest

from mesh.http.message import Response
from mesh.model.l7.destination import RetryBudget
from mesh.model.l7.routing import Retry
from tests.corpus.facts import asked
from waypoint_py.routing.retry import CONDITIONS, Again, Decision, Enough, RetryState, Room
from waypoint_py.upstream.session import FailureKind, UpstreamFailure
from waypoint_py.verdict import Flag

RNG = random.Random(1)
REQUEST = asked()
STATUSES = (200, 304, 400, 404, 409, 429, 500, 501, 502, 503, 504, 599)
KINDS = tuple(FailureKind)
RESETS = {kind for kind in KINDS if kind is not FailureKind.OVERFLOW}
NOT_CONNECTED = {FailureKind.CONNECT, FailureKind.CONNECT_TIMEOUT, FailureKind.TLS, FailureKind.REFUSED}
FIVES = {500, 501, 502, 503, 504, 599}


def state(*on: str, **fields: object) -> RetryState:
    return RetryState(Retry(on=on, **fields), REQUEST)


def failure(kind: FailureKind) -> UpstreamFailure:
    return UpstreamFailure(kind, "because")


def response(status: int = 200, *headers: tuple[bytes, bytes]) -> Response:
    return Response(status, list(headers))


def again(decision: Decision) -> bool:
    return isinstance(decision, Again)


@pytest.mark.parametrize(
    ("condition", "statuses", "kinds", "per_try_timeout"),
    [
        ("5xx", FIVES, RESETS, True),
        ("gateway-error", {502, 503, 504}, RESETS, True),
        ("reset", set(), RESETS, True),
        ("reset-before-request", set(), set(), False),
        ("connect-failure", set(), NOT_CONNECTED, False),
        ("envoy-ratelimited", set(), set(), False),
        ("retriable-4xx", {409}, set(), False),
        ("refused-stream", set(), {FailureKind.REFUSED_STREAM}, False),
        ("retriable-status-codes", {404, 503}, set(), False),
        ("retriable-headers", set(), set(), False),
        ("http3-post-connect-failure", set(), set(), False),
        ("cancelled", set(), set(), False),
        ("deadline-exceeded", set(), set(), False),
        ("internal", set(), set(), False),
        ("resource-exhausted", set(), set(), False),
        ("unavailable", set(), set(), False),
    ],
)
def test_conditions(condition: str, statuses: set[int], kinds: set[FailureKind], per_try_timeout: bool) -> None:
    assert condition in CONDITIONS
    listed = (404, 503)
    assert {status for status in STATUSES if again(state(condition, statuses=listed).after_response(response(status), RNG))} == statuses
    assert {kind for kind in KINDS if again(state(condition).after_failure(failure(kind), RNG))} == kinds
    assert again(state(condition).after_per_try_timeout(RNG)) is per_try_timeout


def test_a_reset_before_the_request_was_sent() -> None:
    unsent = {kind for kind in KINDS if again(state("reset-before-request").after_failure(failure(kind), RNG, request_sent=False))}
    assert unsent == RESETS


@pytest.mark.parametrize(
    ("condition", "code"), [("cancelled", 1), ("deadline-exceeded", 4), ("internal", 13), ("resource-exhausted", 8), ("unavailable", 14)]
)
def test_grpc_conditions_hold_for_trailers_only_responses(condition: str, code: int) -> None:
    codes = {number for number in range(17) if again(state(condition).after_response(response(200, (b"grpc-status", b"%d" % number)), RNG))}
    assert codes == {code}
    assert not again(state(condition).after_response(response(200, (b"grpc-status", b"x")), RNG))


def test_another_proxys_rate_limit_is_not_retried_unless_asked_for() -> None:
    limited = response(503, (b"x-envoy-ratelimited", b"true"))
    assert not again(state("5xx", "retriable-status-codes", statuses=(503,)).after_response(limited, RNG))
    assert again(state("envoy-ratelimited").after_response(limited, RNG))


def test_istios_default_repeats_no_request_that_an_application_may_have_seen() -> None:
    default = Retry()
    kinds = {kind for kind in KINDS if again(RetryState(default, REQUEST).after_failure(failure(kind), RNG))}
    assert kinds == NOT_CONNECTED | {FailureKind.REFUSED_STREAM}
    assert not any(again(RetryState(default, REQUEST).after_response(response(status), RNG)) for status in STATUSES)
    assert not again(RetryState(default, REQUEST).after_per_try_timeout(RNG))


def test_attempts_are_retries_and_the_flag_says_that_they_are_used_up() -> None:
    retries = state("5xx", attempts=2)
    first, second, third = (retries.after_response(response(503), RNG) for _ in range(3))
    assert again(first)
    assert again(second)
    assert third == Enough("503 (5xx) after 2 retries", Flag.UPSTREAM_RETRY_LIMIT_EXCEEDED)
    assert retries.retries == 2


@pytest.mark.parametrize("policy", [None, Retry(attempts=0, on=("5xx",)), Retry(on=())])
def test_without_retries_nothing_is_retried_and_no_limit_exceeded(policy: Retry | None) -> None:
    retries = RetryState(policy, REQUEST)
    assert not retries.may_retry
    for decision in (
        retries.after_response(response(503), RNG),
        retries.after_failure(failure(FailureKind.CONNECT), RNG),
        retries.after_per_try_timeout(RNG),
    ):
        assert isinstance(decision, Enough)
        assert decision.flag is None


def test_a_success_is_enough() -> None:
    assert state("5xx").after_response(response(200), RNG) == Enough("the response 200 is no reason to retry")


def test_a_request_whose_body_is_gone_is_not_sent_again() -> None:
    retries = state("5xx")
    decision = retries.after_response(response(503), RNG, replayable=False)
    assert isinstance(decision, Enough)
    assert decision.flag is None
    assert "body" in decision.because
    assert not again(retries.after_failure(failure(FailureKind.RESET), RNG, replayable=False))


def test_a_client_cannot_multiply_its_load() -> None:
    request = asked("/", ("x-envoy-max-retries", "100"), ("x-envoy-retry-on", "5xx"))
    retries = RetryState(Retry(attempts=1, on=("5xx",)), request)
    assert [again(retries.after_response(response(503), RNG)) for _ in range(2)] == [True, False]
    assert not RetryState(None, request).may_retry


@pytest.mark.parametrize(("value", "granted"), [("3", 3), ("0", 0), ("x", 1), ("-1", 1), ("99999", 1)])
def test_a_client_that_is_trusted_says_how_often(value: str, granted: int) -> None:
    retries = RetryState(Retry(attempts=1, on=("5xx",)), asked("/", ("x-envoy-max-retries", value)), honour_client=True)
    assert sum(again(retries.after_response(response(503), RNG)) for _ in range(5)) == granted


@pytest.mark.parametrize(
    ("room", "granted"),
    [
        (Room(active_retries=2, maximum=3), True),
        (Room(active_retries=3, maximum=3), False),
        (Room(active_retries=0, maximum=0), False),
        (Room(active_requests=100, active_retries=19, maximum=0, budget=RetryBudget(20)), True),
        (Room(active_requests=100, active_retries=20, maximum=99, budget=RetryBudget(20)), False),
        (Room(active_requests=1, active_retries=2, budget=RetryBudget(20, 3)), True),
        (Room(active_requests=1, active_retries=3, budget=RetryBudget(20, 3)), False),
    ],
)
def test_retries_of_a_destination_are_bounded(room: Room, granted: bool) -> None:
    decision = state("5xx").after_response(response(503), RNG, room)
    assert again(decision) is granted
    if isinstance(decision, Enough):
        assert decision.flag is Flag.UPSTREAM_OVERFLOW


def test_the_wait_grows_with_full_jitter_up_to_its_bound() -> None:
    ceilings = [0.025, 0.05, 0.1, 0.2, 0.25, 0.25]
    for draw in range(200):
        rng = random.Random(draw)
        retries = state("5xx", attempts=6)
        for ceiling in ceilings:
            decision = retries.after_response(response(503), rng)
            assert isinstance(decision, Again)
            assert 0 <= decision.delay < ceiling
    top = max(
        decision.delay
        for draw in range(200)
        if isinstance(decision := state("5xx", backoff_base=1.0, backoff_max=9.0).after_response(response(503), random.Random(draw)), Again)
    )
    assert 0.9 < top < 1.0


def test_hosts_that_were_tried_are_avoided_unless_they_may_be_tried_again() -> None:
    retries, anywhere = state("5xx"), state("5xx", previous_hosts=True)
    for each in (retries, anywhere):
        each.began("one")
        each.began("two")
    assert (tuple(retries.avoided), tuple(anywhere.avoided)) == (("one", "two"), ())
    assert retries.tried == anywhere.tried == ("one", "two")


def test_other_localities_are_taken_after_every_second_try() -> None:
    retries, near = state("5xx", remote_localities=True), state("5xx")
    seen = []
    for priority in (0, 0, 1, 1, 2):
        seen.append(set(retries.avoided_priorities))
        retries.began("x", priority)
        near.began("x", priority)
    assert seen == [set(), set(), {0}, {0}, {0, 1}]
    assert near.avoided_priorities == frozenset()


def test_a_retry_says_why() -> None:
    decision = state("connect-failure").after_failure(failure(FailureKind.CONNECT_TIMEOUT), RNG)
    assert isinstance(decision, Again)
    assert decision.because == "connection timeout (connect-failure)"


# HTTPRouteRetry: the codes of the route, as the control plane writes them.
@pytest.mark.parametrize(
    ("codes", "attempts", "failing", "succeed_after", "final"),
    [((500,), 3, 500, 2, 200), ((500,), 3, 500, 4, 500), ((500,), 3, 503, 2, 503), ((500, 502, 503, 504), 2, 504, 2, 200)],
)
def test_http_route_retry(codes: tuple[int, ...], attempts: int, failing: int, succeed_after: int, final: int) -> None:
    retries = state("retriable-status-codes", "connect-failure", attempts=attempts, statuses=codes)
    answers = [failing] * succeed_after + [200]
    for status in answers:
        if not again(retries.after_response(response(status), RNG)):
            break
    assert status == final
