"""A request's body between client and upstream: nothing is lost, nothing is sent twice in one try, and the client gets its credit once."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from waypoint_py.body import REPLAY_AT_MOST, RequestBody
from waypoint_py.grpc import MessageCounter


def _take(body: RequestBody, most: int = 1 << 30) -> bytes:
    taken = bytearray()
    while (piece := body.take(most)) is not None:
        taken += piece
    return bytes(taken)


def test_a_body_is_given_out_as_it_came() -> None:
    body = RequestBody()
    body.push(b"ab")
    body.push(memoryview(b"cd"))
    assert body.take(3) is not None
    assert _take(body, 1) == b"cd"
    assert body.credit() == 4
    assert body.credit() == 0
    body.push(b"e")
    assert not body.exhausted
    body.finish([(b"a", b"b")])
    assert _take(body) == b"e"
    assert body.exhausted
    assert body.trailers == [(b"a", b"b")]


def test_another_try_gets_all_of_it_and_the_client_no_credit_again() -> None:
    body = RequestBody(replayable=True)
    body.push(b"abc")
    assert _take(body, 2) == b"abc"
    assert body.credit() == 3
    body.rewind()
    body.push(b"def")
    body.finish([])
    assert _take(body) == b"abcdef"
    assert body.credit() == 3
    assert body.exhausted


def test_a_body_that_is_too_large_is_sent_once() -> None:
    body = RequestBody(replayable=True)
    piece = b"x" * 65536
    for _ in range(REPLAY_AT_MOST // len(piece)):
        body.push(piece)
    assert body.replayable
    sent = len(_take(body))
    body.push(b"y")
    assert not body.replayable
    assert _take(body) == b"y"
    assert body.credit() == sent + 1


def test_what_was_sent_is_dropped_where_no_other_try_may_follow() -> None:
    body = RequestBody()
    for _ in range(100):
        body.push(b"x" * 1000)
        assert len(_take(body)) == 1000
        assert not body.pieces()


def test_a_body_without_bytes_is_none() -> None:
    body = RequestBody()
    assert not body.empty
    body.finish([])
    assert body.empty
    assert body.exhausted
    assert body.take(10) is None


@given(st.lists(st.binary(max_size=200_000), max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_credit_equals_what_was_sent_for_the_first_time(pieces: list[bytes], rng: random.Random, replayable: bool) -> None:
    body = RequestBody(replayable=replayable)
    granted = credited = 0
    for piece in pieces:
        body.push(piece)
        if rng.random() < 0.3 and piece:
            granted += len(piece)
            body.grant(len(piece))
        if rng.random() < 0.6:
            body.take(rng.randrange(1, 100_000))
            credited += body.credit()
        if replayable and body.replayable and rng.random() < 0.3:
            body.rewind()
    if body.replayable:
        body.rewind()
        assert _take(body) == b"".join(pieces)
    else:
        _take(body)
    body.finish([])
    credited += body.credit()
    assert body.exhausted
    assert credited + granted == sum(map(len, pieces))


@given(st.lists(st.binary(max_size=40), max_size=8), st.randoms(use_true_random=False))
def test_messages_are_counted_however_they_are_cut(messages: list[bytes], rng: random.Random) -> None:
    data = b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)
    counter, at = MessageCounter(), 0
    while at < len(data):
        step = rng.randrange(1, 20)
        counter.feed(data[at : at + step])
        at += step
    assert counter.count == len(messages)
    counter.feed(b"\0\0\0\0\5ab")
    assert counter.count == len(messages)
