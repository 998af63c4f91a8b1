"""Whatever headers say of traces: reading never fails, and what is passed on is well-formed and names one parent."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from mesh.http.message import Headers
from waypoint_py.telemetry.context import Incoming, decide, read_context, write_context

NAMES = [
    b"traceparent", b"tracestate", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags", b"accept",
]  # fmt: skip
HEX = "0123456789abcdef"
trace_ids = st.integers(1, 2**128 - 1)
span_ids = st.integers(1, 2**64 - 1)
pieces = st.one_of(
    st.sampled_from(["00", "01", "ff", "0", "1", "d", "-", "", "true", "0" * 16, "0" * 32]),
    st.text(HEX, min_size=16, max_size=16),
    st.text(HEX, min_size=32, max_size=32),
    st.text(HEX + "-", max_size=40),
)
values = st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=6).map(lambda parts: "-".join(parts).encode()), pieces.map(str.encode))
anything: st.SearchStrategy[Headers] = st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=8)
W3C = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[0-3]")
SINGLE = re.compile(rb"(?:[0-9a-f]{16}){1,2}-[0-9a-f]{16}-[01d](?:-[0-9a-f]{16})?")


@given(anything)
def test_reading_never_fails_and_never_gives_half_a_context(said: Headers) -> None:
    found = read_context(said)
    assert bool(found.trace_id) == bool(found.parent_id)
    assert 0 <= found.trace_id < 2**128
    assert 0 <= found.parent_id < 2**64
    if found.trace_id:
        assert found.w3c or found.b3 or found.multi
    if found.debug:
        assert found.sampled is not None
    if found.narrow and not found.w3c:
        assert found.trace_id < 2**64


@given(anything, st.floats(0, 100), st.integers())
def test_what_goes_on_is_well_formed_and_agrees_with_what_is_recorded(said: Headers, percent: float, seed: int) -> None:
    before = list(said)
    incoming = read_context(said)
    decision = decide(said, percent, random.Random(seed))
    assert said == before
    assert (decision.span is not None) == (incoming.sampled is True) or incoming.sampled is None
    if decision.headers is None:
        assert incoming.sampled is False
        return
    kept = [pair for pair in decision.headers if pair[0] == b"accept"]
    assert kept == [pair for pair in said if pair[0] == b"accept"]
    parents = [value for name, value in decision.headers if name == b"traceparent"]
    singles = [value for name, value in decision.headers if name == b"b3"]
    assert len(parents) <= 1
    assert all(map(W3C.fullmatch, parents))
    assert all(map(SINGLE.fullmatch, singles))
    onwards = read_context(decision.headers)
    assert onwards.trace_id == decision.trace_id
    assert onwards.sampled is (decision.span is not None)
    assert onwards.debug is (incoming.debug and decision.span is not None)
    if decision.span is not None:
        assert onwards.parent_id == decision.span.span_id
        assert decision.span.parent_id == incoming.parent_id
    elif incoming.trace_id:
        assert onwards.parent_id == incoming.parent_id


@given(trace_ids, span_ids, span_ids, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_what_is_written_is_read_back(
    trace_id: int, span_id: int, parent_id: int, sampled: bool, w3c: bool, single: bool, multi: bool, drawn: bool
) -> None:
    narrow = trace_id < 2**64 and not w3c and (single or multi)
    forms = Incoming(trace_id, parent_id, sampled, narrow=narrow, random=drawn and w3c, w3c=w3c, b3=single, multi=multi)
    found = read_context(write_context([], forms, trace_id, span_id, parent_id, sampled=sampled))
    assert found == forms._replace(parent_id=span_id, w3c=w3c or not (single or multi), present=True)
