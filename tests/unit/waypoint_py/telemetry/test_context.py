"""Trace contexts: what is read of headers, what goes on, and who decides about sampling."""

from __future__ import annotations

import random

import pytest

from mesh.http.message import Headers
from waypoint_py.telemetry.context import NOTHING, Decision, Incoming, decide, read_context, write_context

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
LOW = TRACE[16:]
TRACE_ID, SPAN_ID, LOW_ID = int(TRACE, 16), int(SPAN, 16), int(LOW, 16)


def headers(*pairs: tuple[str, str]) -> Headers:
    return [(name.encode(), value.encode()) for name, value in pairs]


def parent(value: str) -> Headers:
    return headers(("traceparent", value))


def b3(value: str) -> Headers:
    return headers(("b3", value))


def multi(**fields: str) -> Headers:
    return headers(*((f"x-b3-{name}", value) for name, value in fields.items()))


@pytest.mark.parametrize(("value", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("ff", True)], ids=str)
def test_a_traceparent_says_trace_span_and_decision(value: str, sampled: bool) -> None:
    found = read_context(parent(f"00-{TRACE}-{SPAN}-{value}"))
    assert (found.trace_id, found.parent_id, found.sampled) == (TRACE_ID, SPAN_ID, sampled)
    assert found.random == bool(int(value, 16) & 2)
    assert (found.w3c, found.b3, found.multi) == (True, False, False)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0x",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{LOW}-{SPAN}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"01-{TRACE}-{SPAN}-01more",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_a_malformed_traceparent_is_none(value: str) -> None:
    assert read_context(parent(value)) == Incoming(present=True)


def test_a_traceparent_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert read_context(parent(f"01-{TRACE}-{SPAN}-01-later")).trace_id == TRACE_ID
    assert read_context(parent(f"cc-{TRACE}-{SPAN}-01")).sampled is True


def test_of_two_traceparents_none_is_believed() -> None:
    assert read_context(parent(f"00-{TRACE}-{SPAN}-01") * 2) == Incoming(present=True)


def test_tracestate_in_several_headers_is_one_list() -> None:
    said = parent(f"00-{TRACE}-{SPAN}-01") + headers(("tracestate", "a=1"), ("tracestate", "b=2"))
    assert read_context(said).tracestate == b"a=1,b=2"


def test_without_a_traceparent_tracestate_means_nothing() -> None:
    assert read_context(headers(("tracestate", "a=1"))) == Incoming(present=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", Incoming(sampled=False)),
        ("1", Incoming(sampled=True)),
        ("d", Incoming(sampled=True, debug=True)),
        (f"{TRACE}-{SPAN}", Incoming(TRACE_ID, SPAN_ID)),
        (f"{LOW}-{SPAN}", Incoming(LOW_ID, SPAN_ID, narrow=True)),
        (f"{TRACE}-{SPAN}-0", Incoming(TRACE_ID, SPAN_ID, False)),
        (f"{TRACE}-{SPAN}-1", Incoming(TRACE_ID, SPAN_ID, True)),
        (f"{TRACE}-{SPAN}-d", Incoming(TRACE_ID, SPAN_ID, True, debug=True)),
        (f"{TRACE}-{SPAN}-1-{LOW}", Incoming(TRACE_ID, SPAN_ID, True)),
        (f"{TRACE.upper()}-{SPAN}-1", Incoming(TRACE_ID, SPAN_ID, True)),
    ],
)
def test_b3_in_one_header(value: str, expected: Incoming) -> None:
    assert read_context(b3(value)) == expected._replace(b3=True, present=True)


@pytest.mark.parametrize(
    "value",
    ["", "2", "-", "---", TRACE, f"{TRACE}-{SPAN}-", f"{TRACE}-{SPAN}-2", f"{TRACE}-{SPAN}-1-xyz", f"{TRACE}-{SPAN}-1-{LOW}-1",
     f"{TRACE[1:]}-{SPAN}",
     f"{'0' * 32}-{SPAN}-1", f"{TRACE}-{'0' * 16}-1"],
)  # fmt: skip
def test_a_malformed_b3_header_is_none(value: str) -> None:
    assert read_context(b3(value)) == Incoming(present=True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"traceid": TRACE, "spanid": SPAN}, Incoming(TRACE_ID, SPAN_ID)),
        ({"traceid": LOW, "spanid": SPAN, "sampled": "1"}, Incoming(LOW_ID, SPAN_ID, True, narrow=True)),
        ({"traceid": TRACE, "spanid": SPAN, "sampled": "0", "parentspanid": LOW}, Incoming(TRACE_ID, SPAN_ID, False)),
        ({"traceid": TRACE, "spanid": SPAN, "sampled": "true"}, Incoming(TRACE_ID, SPAN_ID, True)),
        ({"traceid": TRACE, "spanid": SPAN, "flags": "1"}, Incoming(TRACE_ID, SPAN_ID, True, debug=True)),
        ({"traceid": TRACE, "spanid": SPAN, "flags": "0"}, Incoming(TRACE_ID, SPAN_ID)),
        ({"sampled": "0"}, Incoming(sampled=False)),
        ({"sampled": "1"}, Incoming(sampled=True)),
        ({"flags": "1"}, Incoming(sampled=True, debug=True)),
        ({"traceid": "nonsense", "spanid": SPAN, "sampled": "0"}, Incoming(sampled=False)),
    ],
)
def test_b3_in_several_headers(fields: dict[str, str], expected: Incoming) -> None:
    assert read_context(multi(**fields)) == expected._replace(multi=True, present=True)


@pytest.mark.parametrize("fields", [{"traceid": TRACE}, {"spanid": SPAN}, {"sampled": "yes"}, {"traceid": "x", "spanid": SPAN}])
def test_b3_in_several_headers_that_say_nothing(fields: dict[str, str]) -> None:
    assert read_context(multi(**fields)) == Incoming(present=True)


def test_w3c_goes_before_b3_and_one_header_before_several() -> None:
    other = "1" * 32
    everything = parent(f"00-{TRACE}-{SPAN}-00") + b3(f"{other}-{SPAN}-1") + multi(traceid="2" * 32, spanid=SPAN, sampled="1")
    found = read_context(everything)
    assert (found.trace_id, found.sampled, found.w3c, found.b3, found.multi) == (TRACE_ID, False, True, True, True)
    assert read_context(everything[1:]).trace_id == int(other, 16)


def test_headers_without_a_trace_are_nothing() -> None:
    assert read_context(headers(("accept", "*/*"))) is NOTHING


class Rigged(random.Random):
    """Draws what it is told to."""

    def __init__(self, chance: float) -> None:
        super().__init__(1)
        self.chance = chance

    def random(self) -> float:
        return self.chance


def decided(said: Headers, percent: float = 50.0, chance: float = 0.9) -> Decision:
    return decide(said, percent, Rigged(chance))


PLAIN = headers(("accept", "*/*"))
NO = 0.9
YES = 0.1


def test_a_new_trace_that_is_drawn_begins_here() -> None:
    before = PLAIN.copy()
    decision = decided(PLAIN, chance=YES)
    span = decision.span
    assert span is not None
    assert (span.trace_id, span.parent_id) == (decision.trace_id, 0)
    assert decision.headers == [*PLAIN, (b"traceparent", b"00-%032x-%016x-01" % (span.trace_id, span.span_id))]
    assert before == PLAIN


def test_a_new_trace_that_is_not_drawn_is_told_onwards_as_not_sampled() -> None:
    decision = decided(PLAIN, chance=NO)
    assert decision.span is None
    assert decision.headers is not None
    assert decision.headers[-1][1].endswith(b"-00")


@pytest.mark.parametrize(
    ("percent", "chance", "sampled"), [(0.0, 0.0, False), (100.0, 0.999999, True), (1.0, 0.0099, True), (1.0, 0.01, False)]
)
def test_the_percentage_is_a_percentage(percent: float, chance: float, sampled: bool) -> None:
    assert (decided(PLAIN, percent, chance).span is not None) == sampled


def test_what_was_sampled_before_is_sampled_here_whatever_the_percentage() -> None:
    said = parent(f"00-{TRACE}-{SPAN}-03") + headers(("tracestate", "a=1"))
    decision = decided(said, 0.0)
    span = decision.span
    assert span is not None
    assert (span.trace_id, span.parent_id, span.tracestate) == (TRACE_ID, SPAN_ID, b"a=1")
    assert span.span_id != SPAN_ID
    assert decision.headers == [(b"traceparent", b"00-%s-%016x-03" % (TRACE.encode(), span.span_id)), (b"tracestate", b"a=1")]


@pytest.mark.parametrize(
    "said",
    [
        parent(f"00-{TRACE}-{SPAN}-00") + headers(("tracestate", "a=1")),
        b3(f"{TRACE}-{SPAN}-0"),
        b3("0"),
        multi(traceid=TRACE, spanid=SPAN, sampled="0"),
        multi(sampled="0"),
    ],
)
def test_what_was_not_sampled_before_passes_unchanged(said: Headers) -> None:
    decision = decided(said, 100.0, 0.0)
    assert (decision.span, decision.headers) == (None, None)


def test_b3_in_one_header_goes_on_in_one() -> None:
    decision = decided(b3(f"{LOW}-{SPAN}-1"))
    assert decision.span is not None
    assert decision.headers == b3(f"{LOW}-{decision.span.span_id:016x}-1-{SPAN}")


def test_b3_in_several_headers_goes_on_in_several() -> None:
    decision = decided(multi(traceid=TRACE, spanid=SPAN, parentspanid=LOW, sampled="1"))
    assert decision.span is not None
    assert decision.headers == multi(traceid=TRACE, spanid=f"{decision.span.span_id:016x}", parentspanid=SPAN, sampled="1")


def test_debug_stays_debug() -> None:
    one, several = decided(b3(f"{TRACE}-{SPAN}-d"), 0.0), decided(multi(traceid=TRACE, spanid=SPAN, flags="1"), 0.0)
    assert one.span is not None
    assert one.headers == b3(f"{TRACE}-{one.span.span_id:016x}-d-{SPAN}")
    assert several.span is not None
    assert several.headers == multi(traceid=TRACE, spanid=f"{several.span.span_id:016x}", parentspanid=SPAN, flags="1")


@pytest.mark.parametrize(("chance", "said"), [(YES, "1"), (NO, "0")])
def test_a_decision_that_b3_left_open_is_made_here_and_told(chance: float, said: str) -> None:
    decision = decided(multi(traceid=TRACE, spanid=SPAN), chance=chance)
    assert decision.headers is not None
    assert (b"x-b3-sampled", said.encode()) in decision.headers
    assert (b"x-b3-traceid", TRACE.encode()) in decision.headers
    assert ((b"x-b3-spanid", SPAN.encode()) in decision.headers) == (chance == NO)  # who records nothing is nobody's parent


def test_a_bare_yes_begins_a_trace() -> None:
    decision = decided(b3("1"), 0.0)
    assert decision.span is not None
    assert decision.span.parent_id == 0
    assert decision.headers == b3(f"{decision.span.trace_id:032x}-{decision.span.span_id:016x}-1")


@pytest.mark.parametrize("chance", [YES, NO])
def test_a_broken_context_is_replaced_and_not_passed_on_beside_the_new_one(chance: float) -> None:
    said = parent("garbage") + headers(("tracestate", "a=1"), ("b3", "rubbish"), ("accept", "*/*"))
    decision = decided(said, chance=chance)
    assert decision.headers is not None
    assert [name for name, _ in decision.headers] == [b"accept", b"traceparent"]


def test_both_forms_name_the_same_parent_afterwards() -> None:
    decision = decided(parent(f"00-{TRACE}-{SPAN}-01") + b3(f"{TRACE}-{SPAN}-1"))
    assert decision.span is not None
    span = f"{decision.span.span_id:016x}"
    assert decision.headers == parent(f"00-{TRACE}-{span}-01") + b3(f"{TRACE}-{span}-1-{SPAN}")


def test_writing_leaves_other_headers_where_they_are() -> None:
    said = [(b"a", b"1"), *parent(f"00-{TRACE}-{SPAN}-01"), (b"c", b"3")]
    written = write_context(said, read_context(said), TRACE_ID, 7, SPAN_ID, sampled=True)
    assert written == [(b"a", b"1"), (b"c", b"3"), (b"traceparent", f"00-{TRACE}-{7:016x}-01".encode())]
