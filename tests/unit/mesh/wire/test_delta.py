"""Delta xDS without I/O: what a client says, how a server takes it."""

from __future__ import annotations

import pytest

from mesh.wire.delta import MAX_NAME, MAX_TYPES, Answer, DeltaClient, DeltaServer, Interest, Kind, Outcome, Request, nonce_of
from mesh.wire.errors import RemoteProtocolError

A, B = "type/A", "type/B"


# --- client ---


def test_the_first_requests_name_every_type_in_order_and_claim_nothing() -> None:
    assert DeltaClient((Interest(A), Interest(B))).start() == [Request(A), Request(B)]


def test_an_on_demand_type_begins_with_nothing() -> None:
    client = DeltaClient((Interest(A, on_demand=True),))
    assert client.start() == [Request(A, ("*",), ("*",))]
    assert client.synced


def test_a_response_is_acknowledged_by_its_nonce_alone() -> None:
    client = DeltaClient((Interest(A),))
    client.start()
    assert client.receive(A, "n1", accepted={"x": "1"}) == Request(A, nonce="n1")


def test_a_refusal_names_every_bad_resource() -> None:
    client = DeltaClient((Interest(A),))
    client.start()
    reply = client.receive(A, "n1", accepted={"x": "1"}, errors=["y: broken", "z: worse"])
    assert reply == Request(A, nonce="n1", error="y: broken; z: worse")


def test_a_reconnect_claims_what_is_held_and_not_what_was_refused_or_removed() -> None:
    client = DeltaClient((Interest(A), Interest(B)))
    client.start()
    client.receive(A, "n1", accepted={"x": "1", "y": "1", "z": "1"})
    client.receive(A, "n2", accepted={"x": "2"}, removed=["z", "never seen"], errors=["y: broken now", "w: broken"])
    client.stop()
    assert client.start() == [Request(A, initial_versions={"x": "2", "y": "1"}), Request(B)]


def test_it_is_synced_when_every_type_was_answered_and_stays_so() -> None:
    client = DeltaClient((Interest(A), Interest(B)))
    client.start()
    assert client.waiting_for == (A, B)
    client.receive(A, "n", accepted={})
    assert not client.synced
    client.receive(B, "n", accepted={})
    assert client.synced
    client.stop()
    assert client.synced


def test_only_the_first_answer_ever_is_the_whole_set() -> None:
    client = DeltaClient((Interest(A), Interest(B, on_demand=True)))
    client.start()
    assert client.is_whole(A)
    assert not client.is_whole(B)
    client.receive(A, "n", accepted={})
    assert not client.is_whole(A)
    client.stop()
    client.start()
    assert not client.is_whole(A)


def test_a_name_on_demand_is_asked_for_once_and_again_on_the_next_stream() -> None:
    client = DeltaClient((Interest(A, on_demand=True),))
    assert client.subscribe(A, ["early"]) is None
    assert client.start() == [Request(A, ("*",), ("*",), {"early": ""})]
    assert client.subscribe(A, ["x", "x", "early"]) == Request(A, subscribe=("x",))
    assert client.subscribe(A, ["x"]) is None
    client.receive(A, "n", accepted={"x": "1", "x's pod": "4"})
    client.stop()
    assert client.start()[0].initial_versions == {"early": "", "x": "1", "x's pod": "4"}
    assert client.unsubscribe(A, ["x", "unknown"]) == Request(A, unsubscribe=("x",))
    client.stop()
    assert "x" not in client.start()[0].initial_versions


def test_a_type_nobody_asked_for_is_acknowledged() -> None:
    assert DeltaClient((Interest(A),)).receive(B, "n", accepted={"x": "1"}) == Request(B, nonce="n")


# --- server ---


def test_a_first_request_without_names_is_for_everything() -> None:
    server = DeltaServer()
    assert server.receive(Request(A, initial_versions={"x": "1"})) == Outcome(Kind.FIRST, Answer(A, None, {"x": "1"}))
    assert server.watches[A].wildcard
    assert not server.watches[A].names


def test_a_star_that_is_taken_back_at_once_is_for_nothing_and_still_answered() -> None:
    server = DeltaServer()
    assert server.receive(Request(A, ("*",), ("*",))) == Outcome(Kind.FIRST, Answer(A, ()))
    assert not server.watches[A].wildcard


def test_what_an_on_demand_client_claims_counts_as_subscribed() -> None:
    server = DeltaServer()
    assert server.receive(Request(A, ("*",), ("*",), {"x": "1", "y": ""})).answer == Answer(A, ("x", "y"), {"x": "1", "y": ""})
    assert server.watches[A].names == {"x", "y"}


def _opened(*, on_demand: bool = False) -> DeltaServer:
    server = DeltaServer()
    server.receive(Request(A, ("*",), ("*",)) if on_demand else Request(A))
    server.sent(A, "n1")
    return server


def test_acknowledgements_are_not_answered() -> None:
    server = _opened()
    assert server.receive(Request(A, nonce="n1")) == Outcome(Kind.ACK)
    assert server.watches[A].nonce_acked == "n1"


def test_an_old_nonce_is_stale() -> None:
    server = _opened()
    server.sent(A, "n2")
    assert server.receive(Request(A, nonce="n1")) == Outcome(Kind.STALE)
    assert server.watches[A].nonce_acked == ""


def test_a_refusal_is_remembered_until_the_next_acknowledgement() -> None:
    server = _opened()
    assert server.receive(Request(A, nonce="n1", error="bad")) == Outcome(Kind.NACK, None, "bad")
    assert server.watches[A].error == "bad"
    server.sent(A, "n2")
    server.receive(Request(A, nonce="n2"))
    assert server.watches[A].error == ""


def test_a_refusal_of_one_part_is_remembered_though_the_others_are_acknowledged() -> None:
    server = _opened()
    first, second = nonce_of("n2", 0), nonce_of("n2", 1)
    server.sent(A, first)
    server.sent(A, second)
    server.receive(Request(A, nonce=first, error="bad"))
    server.receive(Request(A, nonce=second))
    assert (server.watches[A].nonce_acked, server.watches[A].error) == (second, "bad")
    server.sent(A, nonce_of("n3", 0))
    server.receive(Request(A, nonce=nonce_of("n3", 0)))
    assert server.watches[A].error == ""


def test_a_set_is_whole_with_its_last_part_and_not_before() -> None:
    client = DeltaClient([Interest(A)])
    client.start()
    client.receive(A, "n.0", accepted={"a": "1"}, more=True)
    assert (client.synced, client.is_whole(A)) == (False, True)
    # What came is not asked for again, and the rest of it completes the set.
    client.stop()
    assert client.start()[0].initial_versions == {"a": "1"}
    assert client.is_whole(A)
    client.receive(A, "m.0", accepted={"b": "1"})
    assert (client.synced, client.is_whole(A)) == (True, False)


@pytest.mark.parametrize("nonce", ["", "n1", "stale"])
def test_new_names_are_answered_whatever_else_the_request_says(nonce: str) -> None:
    server = _opened(on_demand=True)
    assert server.receive(Request(A, subscribe=("x", "x", "y"), nonce=nonce)).answer == Answer(A, ("x", "y"))


def test_a_name_asked_for_again_is_answered_again() -> None:
    server = _opened(on_demand=True)
    server.receive(Request(A, subscribe=("x",)))
    assert server.receive(Request(A, subscribe=("x",))).answer == Answer(A, ("x",))


def test_unsubscribing_is_bookkeeping() -> None:
    server = _opened(on_demand=True)
    server.receive(Request(A, subscribe=("x",)))
    assert server.receive(Request(A, unsubscribe=("x",))) == Outcome(Kind.CHANGE)
    assert not server.watches[A].names


def test_a_star_later_makes_the_watch_whole_and_taking_it_back_ends_that() -> None:
    server = _opened(on_demand=True)
    assert server.receive(Request(A, subscribe=("*",))).answer == Answer(A, None)
    assert server.watches[A].wildcard
    server.receive(Request(A, unsubscribe=("*",)))
    assert not server.watches[A].wildcard


def test_a_request_that_says_nothing_gets_nothing() -> None:
    assert _opened().receive(Request(A)) == Outcome(Kind.NOTHING)


def test_what_one_client_may_make_the_server_remember_is_bounded() -> None:
    server = DeltaServer()
    with pytest.raises(RemoteProtocolError, match="too long"):
        server.receive(Request(A, subscribe=("x" * (MAX_NAME + 1),)))
    for number in range(MAX_TYPES):
        server.receive(Request(f"type/{number}"))
    with pytest.raises(RemoteProtocolError, match="too many resource types"):
        server.receive(Request("one more"))
